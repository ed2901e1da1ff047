"""Checkpoints that are complete and verified, or not there (contract 2).

A checkpoint is a folder ``step-00000400/``::

    state.pt         what Lightning saves: model, optimizers, schedulers, loops, the DataModule's position
    rank-00000.pt    what only this rank knows: random number generators, metric state
    manifest.json    size and SHA-256 of every other file, and what the state is of

It is written aside, every file is made durable, hashed into the manifest, and then renamed into place.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from paperscale.data.index import sha256
from paperscale.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps taken.
        consumed: training samples consumed.
        world_size: ranks that wrote it.
        files: name to ``{"bytes": ..., "sha256": ...}``.
        versions: of the libraries that wrote it.
    """

    step: int
    consumed: int
    world_size: int
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]
    version: int = VERSION


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Return a checkpoint's manifest.

    Raises:
        UserError: it is missing or damaged.
    """
    path = checkpoint / MANIFEST
    try:
        return CheckpointManifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a readable manifest ({error})") from error


def verify(checkpoint: Path) -> CheckpointManifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UserError: a file is missing, cut short or changed; names it.
    """
    manifest = read_manifest(checkpoint)
    for name, expected in manifest.files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file} is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise UserError(f"{file} has {size} bytes, {expected['bytes']} were written")
        if sha256(file) != expected["sha256"]:
            raise UserError(f"{file} is not what was written (SHA-256 differs)")
    return manifest


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, newest first, verified or not."""
    return sorted(folder.glob("step-*"), reverse=True)


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and why each newer one was passed over."""
    passed_over = []
    for checkpoint in all_checkpoints(folder):
        try:
            verify(checkpoint)
        except UserError as error:
            passed_over.append(f"{checkpoint.name}: {error}")
        else:
            return checkpoint, passed_over
    return None, passed_over


def rank_file(rank: int) -> str:
    """Return the name of the file that one rank writes."""
    return f"rank-{rank:05d}.pt"


def publish(partial: Path, final: Path, *, step: int, consumed: int, world_size: int) -> None:
    """Make a complete checkpoint durable and give it its name. Called on one rank, after all have written."""
    import lightning
    import torch

    from paperscale import __version__

    files = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    versions = {"paperscale": __version__, "torch": torch.__version__, "lightning": lightning.__version__}
    manifest = CheckpointManifest(step, consumed, world_size, files, versions)
    with (partial / MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(partial)
    partial.rename(final)
    fsync_folder(final.parent)


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


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints."""
    for old in all_checkpoints(folder)[keep_last:]:
        doomed = old.with_name(f".{old.name}.partial")  # half-removed must not look like a checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed)


class _Watched:
    """A file that remembers why a write failed: torch's own error does not say."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_durably(state: Any, path: Path) -> None:
    """Write a ``torch.save`` file and wait until it is on the disk.

    Raises:
        OSError: it could not be written; nothing is left under its name.
    """
    import torch

    try:
        with path.open("wb") as file:
            watched = _Watched(file)
            try:
                torch.save(state, cast(IO[bytes], watched))
            except RuntimeError:
                if watched.error is None:
                    raise
                raise watched.error from None
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


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
    """When checkpoints are written and how many are kept.

    Attributes:
        every_n_steps: optimizer steps between checkpoints; ``None`` for none inside an epoch.
        every_n_epochs: epochs between checkpoints.
        keep_last: newest checkpoints that are kept; at least 2, so that one is left if the newest is damaged.
    """

    every_n_steps: int | None = None
    every_n_epochs: int = 1
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise UserError("checkpoint.keep_last must be at least 2, so that one is left if the newest is damaged")
