"""What a checkpoint holds, from its headers: no tensor is read."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paperscale.training.checkpoint import RANK_FILES, read_manifest, read_state, step_of
from paperscale.training.tensorfile import Stored, TensorReader

_STATE = "state.pt"
_OURS = "paperscale"


def inspect(checkpoint: Path, tensors: bool = False) -> dict[str, Any]:
    """Return what a checkpoint holds.

    Args:
        checkpoint: its folder.
        tensors: whether to list every tensor.

    Raises:
        UserError: its manifest, a header or its small state cannot be read.
    """
    manifest, reader = read_manifest(checkpoint), TensorReader(checkpoint)
    model = {name.removeprefix("model/"): of for name, of in reader.tensors.items() if name.startswith("model/")}
    buffers = {name: model[name] for name in manifest.buffers if name in model}
    averages = {name: of for name, of in reader.tensors.items() if name.startswith("ema/")}
    state = read_state(checkpoint / _STATE) if _STATE in manifest.files else {}
    facts = {key: value for key, value in asdict(manifest).items() if key not in ("files", "buffers")}
    found = {
        "checkpoint": checkpoint.name,
        "path": str(checkpoint),
        **facts,
        "step": manifest.step or step_of(checkpoint),
        "files": {name: entry["bytes"] for name, entry in manifest.files.items()},
        "bytes": sum(entry["bytes"] for entry in manifest.files.values()),
        "parameters": _summary({name: of for name, of in model.items() if name not in buffers}),
        "buffers": _summary(buffers),
        "averages": _summary(averages) if averages else None,
        "optimizers": list(_optimizers(reader, state)),
        "random": _random(checkpoint, manifest.files),
    }
    if tensors:
        found["tensors"] = [_row(name, of) for name, of in sorted(reader.tensors.items())]
    return found


def _summary(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return counts of tensors and elements, by the model's parts and by type."""
    depth = _common(tensors) + 1
    by_part: Counter[str] = Counter()
    by_type: Counter[str] = Counter()
    for name, of in tensors.items():
        by_part[".".join(name.split(".")[:depth])] += of.numel
        by_type[_type(of)] += of.numel
    return {"tensors": len(tensors), "elements": by_type.total(), "by_part": dict(by_part), "by_type": dict(by_type)}


def _common(names: Iterable[str]) -> int:
    """Return how many leading parts all names share: a module that holds one network is not what is looked for."""
    shared = 0
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return shared


def _optimizers(reader: TensorReader, state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each optimizer's class, its groups with their settings, and what it keeps of each parameter."""
    for index, saved in enumerate(state.get(_OURS, {}).get("optimizers", [])):
        kept: dict[str, dict[str, Any]] = {}
        for name, of in reader.tensors.items():
            if name.startswith(f"optimizer{index}/"):
                entry = kept.setdefault(name.rpartition("/")[2], {"tensors": 0, "elements": 0, "dtype": _type(of)})
                entry["tensors"] += 1
                entry["elements"] += of.numel
        groups = [{**group, "params": len(group["params"])} for group in saved["groups"]]
        yield {"class": saved["class"], "groups": groups, "state": kept, "numbers": _keys(saved["numbers"].values())}


def _keys(states: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({key for state in states for key in state})


def _random(checkpoint: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many ranks' random number generators there are, and which of each."""
    ranks = sorted(fnmatch.filter(files, RANK_FILES))
    generators = sorted(read_state(checkpoint / ranks[0])["random"]) if ranks else []
    return {"ranks": len(ranks), "generators": generators}


def _row(name: str, of: Stored) -> dict[str, Any]:
    files = list(dict.fromkeys(extent.path.name for extent in of.extents))
    return {"name": name, "shape": list(of.shape), "dtype": _type(of), "files": files}


def _type(of: Stored) -> str:
    return str(of.dtype).removeprefix("torch.")
