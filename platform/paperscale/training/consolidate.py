"""Weights in one file: written tensor by tensor, of whatever size and from however many files.

The header comes first, from what is known without reading; then each tensor in slices. So the memory that is needed is
a few slices', whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from paperscale.errors import UserError
from paperscale.training.checkpoint import RECIPE, CheckpointManifest, fsync_folder, publish
from paperscale.training.saving import write_durably
from paperscale.training.tensorfile import DTYPES, METADATA_KEY, header, tensor_file
from paperscale.training.weights import Weight, Weights

_SLICE = 32 << 20  # bytes that are read at once
_OF_MANIFEST = ("step", "consumed", "epoch", "run", "wandb_id", "aliases", "buffers")


def write_file(
    weights: Weights, path: Path, dtype: torch.dtype | None = None, facts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write weights as one safetensors file, which is complete or not there.

    Tied weights are written once, under the first of their names; the file's metadata has the others, as
    ``safetensors.torch.load_model`` and the readers of Hugging Face want it.

    Args:
        weights: what to write.
        path: of the file.
        dtype: of floating-point parameters; by default their own. Buffers keep theirs.
        facts: metadata of the file.

    Returns:
        ``bytes`` and ``sha256``.

    Raises:
        UserError: the file is there already, or the weights cannot be read.
        OSError: it cannot be written; nothing is left of it.
    """
    refuse_existing(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: such a file is a safetensors file; name it {path.stem or 'weights'}.safetensors")
    metadata = {"format": "pt", **(facts or {}), **weights.aliases}
    partial = path.with_name(f".{path.name}.partial")
    try:
        written = write_durably(partial, _content(weights, dtype, metadata))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return written


def write_checkpoint(weights: Weights, folder: Path, source: Path, manifest: CheckpointManifest) -> dict[str, Any]:
    """Write weights as a checkpoint of one rank, which can be scored, exported and started from, not continued.

    Args:
        weights: what to write.
        folder: of the new checkpoint.
        source: the checkpoint whose recipe it gets.
        manifest: of that checkpoint.

    Returns:
        ``bytes`` and ``sha256`` of its file of tensors.

    Raises:
        UserError: the folder is there already, or the weights cannot be read.
        OSError: it cannot be written; nothing is left of it.
    """
    refuse_existing(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir()
        files = {tensor_file(0): write_durably(partial / tensor_file(0), _content(weights, None, None))}
        files[RECIPE] = write_durably(partial / RECIPE, [(source / RECIPE).read_bytes()])
        facts = {key: getattr(manifest, key) for key in _OF_MANIFEST}
        publish(partial, folder, files, {**facts, "world_size": 1, "strategy": weights.origin})
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return files[tensor_file(0)]


def refuse_existing(path: Path) -> None:
    """Check where something is to be written.

    Raises:
        UserError: something is there already, or its folder is not.
    """
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or choose another name with -o")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or choose another name with -o")


def _content(
    weights: Weights, dtype: torch.dtype | None, metadata: dict[str, str] | None
) -> Iterator[memoryview | bytes]:
    """Yield a file's header and data; with ``metadata`` ``None``, as a rank writes its part of a checkpoint."""
    kinds = {name: _kind(weight, dtype) for name, weight in weights.tensors.items()}
    ordered = sorted(kinds, key=lambda name: -kinds[name].itemsize)  # each begins at a multiple of its own
    table: dict[str, Any] = {}
    at = 0
    for name in ordered:
        weight = weights.tensors[name]
        end = at + weight.numel * kinds[name].itemsize
        shape, key = (weight.shape, name) if metadata is not None else ((weight.numel,), f"model/{name}")
        table[key] = {"dtype": DTYPES[kinds[name]], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    if metadata is None:
        places = {f"model/{name}": [list(weights.tensors[name].shape), 0] for name in ordered}
        metadata = {"format": "pt", METADATA_KEY: json.dumps(places)}
    head = header({**table, "__metadata__": metadata})
    return chain([head], chain.from_iterable(_slices(weights.tensors[name], kinds[name]) for name in ordered))


def _kind(weight: Weight, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or weight.is_buffer or not weight.dtype.is_floating_point:
        return weight.dtype
    return dtype


def _slices(weight: Weight, dtype: torch.dtype) -> Iterator[memoryview]:
    step = _SLICE // weight.dtype.itemsize
    for start in range(0, weight.numel, step):
        part = weight.read(start, min(start + step, weight.numel)).to(dtype).contiguous()
        yield part.view(torch.uint8).numpy().data
