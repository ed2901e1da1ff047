"""Writing checkpoints while the training goes on.

On the step path a rank only copies what it writes into a buffer. A thread writes the buffer, makes it durable, hashes
it, and puts what it has written into the store that the ranks share; rank 0's thread collects these, writes the
manifest, gives the checkpoint its name and tells the others. No rank enters a collective for it. One checkpoint is
written at a time, so that there is one buffer; who comes too early waits for the one before.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch.distributed import Store

from paperscale.training.checkpoint import Retention, all_checkpoints, checkpoint_name, publish, step_of

_CHUNK = 16 << 20
_LOOK_S = 0.05
_KEY = "paperscale/checkpoint"
SUPERSEDED = "superseded"

Files = dict[str, "list[memoryview | bytes]"]


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written.

    Attributes:
        step: optimizer steps taken.
        files: what this rank writes: name to content.
        facts: of the manifest.
    """

    step: int
    files: Files
    facts: dict[str, Any] = field(default_factory=dict)


class Saver:
    """Writes this rank's part of checkpoints in a thread, and publishes them on rank 0.

    Args:
        folder: where checkpoints go.
        keep: which of them are kept.
        rank: of this process.
        world_size: processes.
        store: shared by the ranks; ``None`` for a single process.
        attempt: number of this attempt; what it has not finished does not get into the way of another's.
        is_current: whether this attempt still owns the run.
        resume: the checkpoint the run continues from; newer ones have not verified.
    """

    def __init__(
        self,
        folder: Path,
        keep: Retention,
        rank: int = 0,
        world_size: int = 1,
        store: Store | None = None,
        attempt: int = 1,
        is_current: Callable[[], bool] = lambda: True,
        resume: Path | None = None,
    ):
        self.folder, self.keep, self.rank, self.world_size = folder, keep, rank, world_size
        self.store, self.attempt, self.is_current = store, attempt, is_current
        self.left: list[str] = []
        """What could not be removed after the last checkpoint, and why (rank 0)."""
        self._passed_over = {path for path in all_checkpoints(folder) if resume and step_of(path) > step_of(resume)}
        self._thread: threading.Thread | None = None
        self._outcome = ""
        self._started = 0

    def start(self, job: Job) -> None:
        """Begin to write; the one before must have been waited for."""
        assert self._thread is None  # noqa: S101
        self._started += 1
        self._thread = threading.Thread(target=self._save, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def first(self) -> bool:
        """Return whether none has been begun yet."""
        return self._started == 0

    @property
    def writing(self) -> bool:
        """Return whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def written(self) -> bool:
        """Return whether a checkpoint is done, well or badly, and nobody has waited for it yet."""
        return self._thread is not None and not self._thread.is_alive()

    def linger(self, seconds: float) -> None:
        """Let the checkpoint that is being written be finished, if that takes no longer than ``seconds``."""
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> str | None:
        """Wait for the checkpoint that is being written.

        Returns:
            What went wrong, the same on all ranks; empty if nothing did; ``None`` if there was none to wait for.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._outcome

    def _save(self, job: Job) -> None:
        try:
            self._outcome = self._agree(job, self._write(job))
        except Exception as error:  # the store is gone, and with it the rank that holds it
            self._outcome = _what(error)

    def _partial(self, step: int) -> Path:
        return self.folder / f".{checkpoint_name(step)}.partial-{self.attempt}"

    def _write(self, job: Job) -> dict[str, Any]:
        """Write this rank's files; return their sizes and hashes, or what went wrong."""
        partial = self._partial(job.step)
        try:
            partial.mkdir(exist_ok=True)
            return {"files": {name: write_durably(partial / name, parts) for name, parts in job.files.items()}}
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return {"error": f"rank {self.rank}: {_what(error)}" if self.world_size > 1 else _what(error)}

    def _agree(self, job: Job, written: dict[str, Any]) -> str:
        """Publish the checkpoint on rank 0, once all ranks have written; return what went wrong on any of them."""
        if self.store is None:
            return self._publish(job, [written])
        prefix = f"{_KEY}/{self.attempt}/{self._started}"
        keys = [f"{prefix}/{rank}" for rank in range(self.world_size)]
        result = f"{prefix}/result"
        self.store.set(keys[self.rank], json.dumps(written))
        if self.rank == 0:
            outcome = self._publish(job, [json.loads(self._await(key)) for key in keys])
            self.store.set(result, outcome)
            for key in keys:
                self.store.delete_key(key)
            return outcome
        return self._await(result)

    def _await(self, key: str) -> str:
        """Return what another rank has put into the store. A look now and then: a wait would block the main thread."""
        assert self.store is not None  # noqa: S101
        while not self.store.check([key]):
            time.sleep(_LOOK_S)
        return self.store.get(key).decode()

    def _publish(self, job: Job, written: list[dict[str, Any]]) -> str:
        partial, final = self._partial(job.step), self.folder / checkpoint_name(job.step)
        try:
            error = next((part["error"] for part in written if "error" in part), "")
            if not error and not self.is_current():
                error = SUPERSEDED
            if not error:
                files = {name: entry for part in written for name, entry in part["files"].items()}
                publish(partial, final, files, {**job.facts, "step": job.step})
        except Exception as failure:  # whatever it is, the other ranks wait for an outcome
            error = _what(failure)
        if error:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            self._passed_over.discard(final)
            self.left = self._prune()
        return error

    def _prune(self) -> list[str]:
        """Remove old checkpoints; whatever comes of it, the new one is written."""
        try:
            return self.keep.prune(self.folder, self._passed_over)
        except OSError as error:
            return [f"{self.folder} cannot be listed ({error.strerror})"]


def _what(error: Exception) -> str:
    """Return an error in words: those of the operating system need no name."""
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def write_durably(path: Path, parts: Iterable[memoryview | bytes]) -> dict[str, Any]:
    """Write a file, wait until it is on the disk, and return its size and SHA-256.

    Raises:
        OSError: it could not be written; nothing is left under its name.
    """
    hashed, size = sha256(), 0
    try:
        with path.open("wb") as file:
            for part in parts:
                view = memoryview(part)
                for at in range(0, len(view), _CHUNK):
                    chunk = view[at : at + _CHUNK]
                    file.write(chunk)
                    hashed.update(chunk)
                    size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return {"bytes": size, "sha256": hashed.hexdigest()}
