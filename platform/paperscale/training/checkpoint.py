"""Checkpoints that are complete and verified, or not there (contract 2).

A checkpoint is a folder ``step-00000400/``::

    tensors-00000.safetensors   the part of weights, buffers, optimizer state and averages that a rank has written
    rank-00000.pt               what only that rank knows: random number generators, metric state
    state.pt                    loops, schedulers, callbacks, the DataModule's position, the optimizers' settings
    recipe.yaml                 the resolved recipe
    manifest.json               size and SHA-256 of every other file, and what the state is of

It is written aside, every file is made durable, hashed into the manifest, and then renamed into place. The same files,
whatever the strategy and the number of ranks: who reads takes the elements that it needs (see
:mod:`paperscale.training.tensorfile`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Any, Literal

from paperscale.atomic import write_atomically
from paperscale.data.index import sha256
from paperscale.errors import UserError

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
VERSION = 2
_READERS = 8
RANK_FILES, TENSOR_FILES = "rank-*.pt", "tensors-*.safetensors"
"""What ranks write, each its own."""
_RESTORE = "restore it from a copy, or use another checkpoint"


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps taken.
        consumed: training samples consumed.
        world_size: ranks that wrote it.
        files: name to ``{"bytes": ..., "sha256": ...}``.
        versions: of the libraries that wrote it.
        epoch: epochs begun before it; the number of finished ones where it ends an epoch.
        strategy: class of the strategy that wrote it.
        metrics: of the validation of these weights, empty where they were not validated.
        run: name of the run.
        wandb_id: id of its W&B run.
        created: Unix time.
        aliases: names of tied weights to the names they are kept under.
        version: of the layout.
        checksum: SHA-256 of the other fields.
    """

    step: int
    consumed: int
    world_size: int
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]
    epoch: int = 0
    strategy: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    run: str = ""
    wandb_id: str = ""
    created: float = 0.0
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    version: int = VERSION
    checksum: str = ""


def _checksum(fields: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's fields."""
    text = json.dumps({key: value for key, value in fields.items() if key != "checksum"}, sort_keys=True)
    return new_sha256(text.encode()).hexdigest()


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Return a checkpoint's manifest.

    Raises:
        UserError: it is missing or damaged.
    """
    path = checkpoint / MANIFEST
    try:
        fields = json.loads(path.read_text())
        if (version := fields["version"]) != VERSION:
            raise UserError(f"{path}: version {version}, this release reads {VERSION}; use the release that wrote it")
        if fields["checksum"] != _checksum(fields):
            raise UserError(f"{path} is not what was written (its checksum differs); {_RESTORE}")
        return CheckpointManifest(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a readable manifest ({error}); {_RESTORE}") from error


def verify(checkpoint: Path, hashes: bool = True) -> CheckpointManifest:
    """Check every file of a checkpoint against its manifest.

    Args:
        checkpoint: its folder.
        hashes: read the files; without it only their sizes are looked at.

    Raises:
        UserError: a file is missing, cut short, changed, unreadable, or not of this checkpoint; names it.
    """
    manifest = read_manifest(checkpoint)
    try:
        _verify_files(checkpoint, manifest.files, hashes)
    except OSError as error:
        raise UserError(f"{error.filename or checkpoint} cannot be read ({error.strerror}); {_RESTORE}") from error
    return manifest


def _verify_files(checkpoint: Path, files: dict[str, dict[str, Any]], hashes: bool) -> None:
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {_RESTORE}")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise UserError(f"{file} has {size} bytes, {expected['bytes']} were written; {_RESTORE}")
    for file in (file for pattern in (RANK_FILES, TENSOR_FILES) for file in checkpoint.glob(pattern)):
        if file.name not in files:
            raise UserError(f"{file} is not of this checkpoint; move it elsewhere")
    if not hashes:
        return
    with ThreadPoolExecutor(_READERS) as pool:  # hashing gives the interpreter free
        found_hashes = pool.map(sha256, [checkpoint / name for name in files])
        for (name, expected), found in zip(files.items(), found_hashes, strict=True):
            if found != expected["sha256"]:
                raise UserError(f"{checkpoint / name} is not what was written (SHA-256 differs); {_RESTORE}")


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, newest first, verified or not."""
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(found, key=step_of, reverse=True)


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and why each newer one was passed over."""
    return first_verified(all_checkpoints(folder))


def first_verified(checkpoints: Iterable[Path], hashes: bool = True) -> tuple[Path | None, list[str]]:
    """Return the first checkpoint that verifies, and why each before it was passed over."""
    passed_over = []
    for checkpoint in checkpoints:
        try:
            verify(checkpoint, hashes)
        except UserError as error:
            passed_over.append(f"{checkpoint.name}: {error}")
        else:
            return checkpoint, passed_over
    return None, passed_over


def rank_file(rank: int) -> str:
    """Return the name of the file that one rank writes."""
    return f"rank-{rank:05d}.pt"


def publish(partial: Path, final: Path, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Give a checkpoint whose files are all durable its name. Called on one rank, after all have written.

    Args:
        partial: the folder it was written into.
        final: its name.
        files: name to size and SHA-256.
        facts: further fields of the manifest.

    Raises:
        OSError: it could not be written; whatever had the name before is still there.
    """
    import lightning
    import torch

    from paperscale import __version__

    versions = {"paperscale": __version__, "torch": torch.__version__, "lightning": lightning.__version__}
    fields = asdict(CheckpointManifest(files=files, versions=versions, created=time.time(), **facts))
    _write_manifest(partial, fields)
    fsync_folder(partial)
    if final.exists():  # only one that did not verify can have this name
        with contextlib.suppress(OSError):  # what cannot be deleted has at least another name
            remove(final)
    partial.rename(final)
    fsync_folder(final.parent)


def add_metrics(checkpoint: Path, metrics: dict[str, float]) -> None:
    """Note in a checkpoint's manifest what a validation of its weights has found since it was written."""
    with contextlib.suppress(OSError, UserError):  # gone or unwritable: it is not the best one then
        _write_manifest(checkpoint, {**asdict(read_manifest(checkpoint)), "metrics": metrics})


def _write_manifest(checkpoint: Path, fields: dict[str, Any]) -> None:
    content = {**fields, "checksum": _checksum(fields)}
    write_atomically(checkpoint / MANIFEST, json.dumps(content, indent=1).encode())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_unfinished(folder: Path) -> None:
    """Remove what interrupted saves and removals have left. Called before an attempt begins to write."""
    for left in folder.glob(".step-*.partial*"):
        shutil.rmtree(left, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; half-removed it must not look like one.

    Raises:
        OSError: some of it is left, under another name.
    """
    doomed = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        last: the newest.
        every_n_steps: for good, those at multiples of this; 0 for none.
        best: those with the best metric.
        metric: logged in validation; empty for none.
        lower: whether less of it is better.
    """

    last: int = 2
    every_n_steps: int = 0
    best: int = 0
    metric: str = ""
    lower: bool = False

    def prune(self, folder: Path, passed_over: Collection[Path] = ()) -> list[str]:
        """Remove the other checkpoints.

        Args:
            folder: where they are.
            passed_over: those that did not verify when the run was continued from an older one; not among the ones
                that are kept, and removed once a newer one is there.

        Returns:
            What could not be removed, and why. It is tried again the next time.
        """
        found = [checkpoint for checkpoint in all_checkpoints(folder) if checkpoint not in passed_over]
        kept = {*found[: self.last], *ranked(found, self.metric, self.lower)[: self.best]}
        old = [c for c in found if c not in kept and not (self.every_n_steps and step_of(c) % self.every_n_steps == 0)]
        old += [c for c in passed_over if found and c.exists() and step_of(c) < step_of(found[0])]
        problems = []
        for doomed in (*folder.glob(".step-*.partial"), *sorted(old, key=step_of)):
            try:
                (remove if doomed in old else shutil.rmtree)(doomed)
            except OSError as error:
                problems.append(f"{doomed.name} cannot be removed ({error.strerror}); remove it by hand")
        return problems


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def ranked(checkpoints: list[Path], metric: str, lower: bool) -> list[Path]:
    """Return the checkpoints that were validated, best first; of equals the newer one."""
    scored = []
    for checkpoint in checkpoints:
        with contextlib.suppress(UserError):
            if (value := read_manifest(checkpoint).metrics.get(metric)) is not None and not math.isnan(value):
                scored.append((value if lower else -value, checkpoint))
    return [checkpoint for _, checkpoint in sorted(scored, key=lambda pair: pair[0])]


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a ``.pt`` file; it holds plain data and tensors only, and no code of it is run.

    Raises:
        UserError: it is unreadable or holds anything else.
    """
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its parts do
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {found[1]}" if found else type(error).__name__
        raise UserError(f"{path} is not plain data and was not loaded ({what}); {_RESTORE}") from error
    return state


def random_state() -> dict[str, Any]:
    """Return the state of every random number generator of this process."""
    import numpy as np
    import torch

    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every random number generator of this process where :func:`random_state` found it."""
    import numpy as np
    import torch

    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class CheckpointOptions:
    """When checkpoints are written and which are kept.

    Attributes:
        every_n_steps: optimizer steps between checkpoints; ``None`` for none inside an epoch.
        every_n_epochs: epochs between checkpoints.
        keep_last: newest checkpoints that are kept; at least 2, so that one is left if the newest is damaged.
        keep_every_n_steps: checkpoints at multiples of this are kept for good.
        monitor: metric of the validation that says which checkpoint is best, such as ``val/accuracy``.
        mode: ``max`` if more of it is better, ``min`` if less is.
        keep_best: checkpoints that are kept for being best, beside the newest.
        wait: write on the step path, as if there were no thread for it.
    """

    every_n_steps: int | None = None
    every_n_epochs: int = 1
    keep_last: int = 2
    keep_every_n_steps: int | None = None
    monitor: str | None = None
    mode: Literal["max", "min"] = "max"
    keep_best: int = 1
    wait: bool = False

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise UserError("checkpoint.keep_last must be at least 2, so that one is left if the newest is damaged")
        for name in ("every_n_steps", "every_n_epochs", "keep_every_n_steps", "keep_best"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"checkpoint.{name} is {value}; use 1 or more, or leave it out")

    @property
    def retention(self) -> Retention:
        """Return which checkpoints are kept."""
        best = self.keep_best if self.monitor else 0
        return Retention(self.keep_last, self.keep_every_n_steps or 0, best, self.monitor or "", self.mode == "min")
