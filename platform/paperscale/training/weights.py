"""A model's weights outside a run: of a checkpoint, of a file, or the mean of several; read as they are needed.

Names are those of the model's ``state_dict``. Nothing is read before it is asked for, and any run of a tensor's
elements can be had alone: a rank reads what it holds, and a file is written of more than would fit into memory.
"""

from __future__ import annotations

import argparse
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperscale.errors import UserError
from paperscale.nn.exchange import Part
from paperscale.training.checkpoint import MANIFEST, read_manifest
from paperscale.training.pieces import persistent_buffers, piece_of
from paperscale.training.tensorfile import TensorReader

_NESTED = ("state_dict", "model_state_dict", "model", "model_ema")  # where training scripts put a model's state


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer that is read as it is needed.

    Attributes:
        shape: of the tensor.
        dtype: of its elements.
        read: returns the elements from one number to another in row-major order, shape [stop - start].
        is_buffer: whether it is known to be a buffer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    is_buffer: bool = False

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """The state of a model.

    Attributes:
        origin: what it was read from, for messages.
        tensors: by name.
        aliases: further names of tied weights to the names they are kept under.
    """

    origin: str
    tensors: Mapping[str, Weight]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def named(self, name: str) -> Weight | None:
        """Return a tensor by either of its names, ``None`` if there is none."""
        return self.tensors.get(self.aliases.get(name, name))


def open_weights(path: Path) -> Weights:
    """Return the weights of a checkpoint, of a safetensors file or a folder of such files, or of a file of PyTorch's.

    Raises:
        UserError: there is nothing that can be read without running code from it.
    """
    if (path / MANIFEST).exists():
        return of_checkpoint(path)
    if path.is_file() and path.suffix != ".safetensors":
        return _of_pickle(path)
    reader = TensorReader(path)
    if not reader.tensors:
        raise UserError(f"{path} holds no weights; name a run, a checkpoint's folder or a .safetensors file")
    tensors = {name: Weight(s.shape, s.dtype, partial(reader.read, name)) for name, s in reader.tensors.items()}
    return Weights(str(path), tensors)


def of_checkpoint(checkpoint: Path, averages: bool = False) -> Weights:
    """Return the weights and buffers of a checkpoint.

    Args:
        checkpoint: its folder.
        averages: the exponential moving averages in place of the weights.

    Raises:
        UserError: it cannot be read, or has no averages.
    """
    manifest, reader = read_manifest(checkpoint), TensorReader(checkpoint)
    if averages and not has_averages(reader):
        raise UserError(
            f"{checkpoint} holds no averages: its recipe has no ema.decay; leave --ema out for the weights themselves"
        )
    tensors = {}
    for full in reader.tensors:
        if full.startswith("model/"):
            name = full.removeprefix("model/")
            kept = f"ema/{name}" if averages and f"ema/{name}" in reader else full
            stored = reader.tensors[kept]
            tensors[name] = Weight(stored.shape, stored.dtype, partial(reader.read, kept), name in manifest.buffers)
    return Weights(str(checkpoint), tensors, manifest.aliases)


def of_model(model: nn.Module, origin: str) -> Weights:
    """Return the state of a model that may be on the meta device, for its names and shapes.

    Args:
        model: the model.
        origin: what it is called in messages.
    """
    return Weights(origin, {name: _held(tensor) for name, tensor in state_of(model)}, aliases_of(model))


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Return the further names of tied weights to the names they are kept under."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: kept for name, parameter in named if (kept := first[id(parameter)]) != name}


def has_averages(reader: TensorReader) -> bool:
    """Return whether a checkpoint holds averages of the weights."""
    return any(name.startswith("ema/") for name in reader.tensors)


def _of_pickle(path: Path) -> Weights:
    """Return what a file of PyTorch's holds, if it holds tensors and plain data alone."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # options, which many scripts keep beside
            mapped = zipfile.is_zipfile(path)  # what PyTorch wrote before 1.6 is not, and is read into memory
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged or a hostile file makes of the reader
        raise UserError(
            f"{path} is not read: it is damaged, or holds more than tensors and plain data, and to load that would run "
            "code from it; where you trust it, load it yourself and write its state dict with "
            "safetensors.torch.save_file"
        ) from error
    origin = str(path)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, origin = content[key], f"{key} of {path}"
            break
    items = content.items() if isinstance(content, Mapping) else ()
    found = {str(name): tensor for name, tensor in items if isinstance(tensor, Tensor)}
    if not found:
        raise UserError(f"{path} holds no state dict; save the model's state_dict() with safetensors.torch.save_file")
    return Weights(origin, {name: _held(tensor) for name, tensor in found.items()})


def _held(tensor: Tensor) -> Weight:
    """Return a tensor that is there already, or on a file that is mapped."""

    def read(start: int, stop: int) -> Tensor:
        return tensor.detach().reshape(-1)[start:stop]

    return Weight(tuple(tensor.shape), tensor.dtype, read)


def taken(weight: Weight, part: Part) -> Weight:
    """Return a part of another library's tensor; the tensor itself where it cannot be divided so.

    Of a transposed one everything is read for any elements: they are apart in it.
    """
    turned = weight.shape[::-1] if part.transposed else weight.shape
    if part == Part(part.name) or not turned or turned[0] % part.of:
        return weight
    shape = (turned[0] // part.of, *turned[1:])
    first = part.number * math.prod(shape)

    def read(start: int, stop: int) -> Tensor:
        if not part.transposed:
            return weight.read(first + start, first + stop)
        return _turned(weight.read(0, weight.numel).view(weight.shape)).reshape(-1)[first + start : first + stop]

    return replace(weight, shape=shape, read=read)


def with_rows(weight: Weight, rows: int) -> Weight:
    """Return a tensor with more rows: its own again and again."""

    def read(start: int, stop: int) -> Tensor:
        runs, size = [], weight.numel
        while start < stop:
            first = start % size
            runs.append(weight.read(first, min(size, first + stop - start)))
            start += len(runs[-1])
        return torch.cat(runs)

    return replace(weight, shape=(rows, *weight.shape[1:]), read=read)


def joined(parts: Sequence[Weight], transposed: bool) -> Weight:
    """Return the other library's tensor of which these are the parts, in their order; see :func:`taken`."""
    shape = (sum(weight.shape[0] for weight in parts), *parts[0].shape[1:])

    def read(start: int, stop: int) -> Tensor:
        whole = torch.cat([weight.read(0, weight.numel).view(weight.shape) for weight in parts])
        return (_turned(whole) if transposed else whole).reshape(-1)[start:stop]

    return replace(parts[0], shape=shape[::-1] if transposed else shape, read=read)


def _turned(tensor: Tensor) -> Tensor:
    return tensor.permute(*reversed(range(tensor.dim())))


def mean(several: Sequence[Weights]) -> Weights:
    """Return the mean of the weights of several checkpoints, oldest first.

    Each element is added up in float64 and rounded once, to float32. Buffers of whole numbers, which only count, are
    the last checkpoint's.

    Raises:
        UserError: they are not of one model.
    """
    last = several[-1]
    shapes = [{name: weight.shape for name, weight in of.tensors.items()} for of in several]
    for of, shape in zip(several, shapes, strict=True):
        if shape != shapes[-1]:
            other = sorted(name for name, _ in shape.items() ^ shapes[-1].items())
            raise UserError(f"{of.origin} and {last.origin} differ in {other[0]}; average checkpoints of one model")
    tensors = {
        name: _mean([of.tensors[name] for of in several]) if weight.dtype.is_floating_point else weight
        for name, weight in last.tensors.items()
    }
    return replace(last, origin=f"the mean of {len(several)} checkpoints", tensors=tensors)


def _mean(weights: list[Weight]) -> Weight:
    dtype = torch.promote_types(weights[-1].dtype, torch.float32)

    def read(start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, dtype=torch.float64)
        for weight in weights:
            total += weight.read(start, stop)
        return total.div_(len(weights)).to(dtype)

    return replace(weights[-1], dtype=dtype, read=read)


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters and persistent buffers, tied ones once."""
    yield from model.named_parameters()
    yield from persistent_buffers(model)


def read_weights(model: nn.Module, weights: Weights) -> None:
    """Fill a model's parameters and persistent buffers, in a process that holds it wholly.

    Raises:
        UserError: they are of another model.
    """
    for name, tensor in state_of(model):
        weight = weights.named(name)
        if weight is None or weight.shape != tuple(tensor.shape):
            what = "is missing" if weight is None else f"has the shape {list(weight.shape)}, not {list(tensor.shape)}"
            raise UserError(f"{weights.origin}: {name} {what}; use the recipe that made it")
        piece_of(name, tensor).fill(weight.read(0, weight.numel))
