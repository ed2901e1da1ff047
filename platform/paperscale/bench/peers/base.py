"""What a peer is to the runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from paperscale.bench.works import View

IMAGES = "images.jpg"  # the folder of image files in a source
TOKENS = {"tokens": ("tokens.bin", 512), "million": ("million.bin", 8)}  # files of uint16 and their blocks' length


class Loader(Protocol):
    """A set, open for reading; ``reads_ahead = True`` where a buffer is filled before the first batch."""

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches of one pass, or of the rest of it after :meth:`restore`."""
        ...

    def state(self) -> Any:
        """Return the state after the batch that was yielded last, picklable."""
        ...

    def restore(self, state: Any) -> None:
        """Go on after that state in the next :meth:`epoch`."""
        ...


class Peer(Protocol):
    """A library that stores and loads samples."""

    def write(self, kind: str, source: Path, out: Path) -> None:
        """Write a set (``images``, ``tokens`` or ``million``) in the library's own format."""
        ...

    def open(self, view: View, source: Path, out: Path) -> Loader:
        """Open what was written."""
        ...


def images(source: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each image, in order."""
    for path in sorted((source / IMAGES).iterdir()):
        yield int(path.stem), path.read_bytes()


def blocks(kind: str, source: Path) -> Any:
    """Return the token blocks, uint16 [blocks, length], memory-mapped."""
    import numpy as np

    name, length = TOKENS[kind]
    return np.memmap(source / name, np.uint16, "r").reshape(-1, length)


class Keeping:
    """Resuming with a ``loader`` that keeps its own state."""

    loader: Any

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches; the library counts the passes itself."""
        return iter(self.loader)

    def state(self) -> Any:
        """Return the loader's state."""
        return self.loader.state_dict()

    def restore(self, state: Any) -> None:
        """Give the loader its state."""
        self.loader.load_state_dict(state)


class Skipping:
    """Resuming where a library keeps no state: the number of batches, which are read again and thrown away."""

    _done = 0
    _skip = 0

    def _pass(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number >= self._skip:
                self._done = number + 1
                yield batch
        self._skip = 0

    def state(self) -> int:
        """Return the number of batches of this pass."""
        return self._done

    def restore(self, state: int) -> None:
        """Skip that many batches."""
        self._skip = state
