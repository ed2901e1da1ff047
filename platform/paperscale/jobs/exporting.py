"""Weights under the names of other libraries, where a paper's module has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from paperscale.atomic import write_atomically
from paperscale.data import ShardStream
from paperscale.data.tokenizer import Tokenizer
from paperscale.errors import UserError, nearest
from paperscale.jobs import snapshot
from paperscale.jobs.run import Run
from paperscale.nn.exchange import Names, Part
from paperscale.training.checkpoint import RECIPE, fsync_folder
from paperscale.training.consolidate import write_file
from paperscale.training.recipe import RecipeCLI, built_on_meta
from paperscale.training.weights import Weight, Weights, joined

_OF_HUGGINGFACE = "model.safetensors", "config.json"
_LONGEST = ("max_position_embeddings", "n_positions")
"""Where a ``config.json`` has the tokens of a sequence."""


def export_as(
    format: str, checkpoint: Path, weights: Weights, out: Path, dtype: torch.dtype | None, facts: Mapping[str, str]
) -> tuple[Weights, dict[str, Any]]:
    """Write weights for another library.

    The module says how with ``export_names(format)``, from its own names to the other's; what it leaves out is not
    written. For ``huggingface`` it gives the content of ``config.json`` with ``export_config(format)`` too, and the
    tokenizer of the recipe's set is written beside it, where there is one.

    Args:
        format: ``torchvision`` or ``huggingface``.
        checkpoint: whose recipe makes the module.
        weights: of the checkpoint.
        out: the file; of ``huggingface`` the folder.
        dtype: of the parameters, see :func:`write_file`.
        facts: metadata of the file.

    Returns:
        The weights under the other names, and what :func:`write_file` does; ``note`` says why no tokenizer is there.

    Raises:
        UserError: the module has no such names, the library no such network, or the checkpoint not what is named.
    """
    recipe = _recipe(checkpoint)
    module = recipe.model
    foreign = _renamed(weights, _asked(module, "export_names", format), type(module).__name__)
    if format != "huggingface":
        return foreign, write_file(foreign, out, dtype, facts)
    config = _asked(module, "export_config", format)
    further, note = _tokenizer(recipe.datamodule, config)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir()
    try:
        written = write_file(foreign, partial / _OF_HUGGINGFACE[0], dtype, facts)
        for name, content in {_OF_HUGGINGFACE[1]: json.dumps(config, indent=2) + "\n", **further}.items():
            write_atomically(partial / name, content.encode())
        partial.rename(out)
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return foreign, {**written, "note": note}


def _recipe(checkpoint: Path) -> RecipeCLI:
    """Make the objects of the checkpoint's recipe, the module without its weights where that can be."""
    snapshot.use(Run(checkpoint.parent.parent))
    return built_on_meta([f"--config={checkpoint / RECIPE}"])


def _tokenizer(data: ShardStream, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return the files of the set's tokenizer by their names, and why there are none where text has one."""
    tokenizer: Any = getattr(data, "tokenizer", None)
    if tokenizer is None:
        return {}, ""
    try:
        found: Tokenizer = tokenizer()
    except UserError as error:
        return {}, f"without its tokenizer: {error}"
    longest = next((config[key] for key in _LONGEST if key in config), None)
    return found.huggingface_files(longest), ""


def _asked(module: LightningModule, method: str, format: str) -> dict[str, Any]:
    """Return what a module says of a library's network.

    Raises:
        UserError: it says nothing, or why the library has none.
    """
    own = "leave --format out for a safetensors file with the model's own names"
    if (function := getattr(module, method, None)) is None:
        raise UserError(f"{type(module).__name__} has no {method}, which would say how {format} has it; {own}")
    try:
        found = function(format)
    except UserError as error:
        raise UserError(f"{error}, or {own}") from error
    if not found:
        network = type(getattr(module, "network", module)).__name__
        raise UserError(f"{format} has no network like {network}; {own}")
    return found


def _renamed(weights: Weights, names: Names, module: str) -> Weights:
    tensors: dict[str, Weight] = {}
    parts: dict[str, dict[Part, Weight]] = {}
    for name, other in names.items():
        if (weight := weights.named(name)) is None:
            hint = nearest(name, weights.tensors) or "; name what its state_dict has"
            raise UserError(f"{module}.export_names: the checkpoint has no '{name}'{hint}")
        if isinstance(other, str):
            tensors[other] = weight
        else:
            parts.setdefault(other.name, {})[other] = weight
    for other, found in parts.items():
        ordered = sorted(found)
        if [part.number for part in ordered] != list(range(ordered[0].of)):
            raise UserError(f"{module}.export_names: of '{other}' not all parts are there; name a tensor for each")
        tensors[other] = joined([found[part] for part in ordered], ordered[0].transposed)
    return replace(weights, tensors=tensors, aliases={})
