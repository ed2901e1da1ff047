"""Tensors of a checkpoint on disk: safetensors files of one-dimensional pieces, written by each rank on its own.

``tensors-00000.safetensors`` holds each piece under its tensor's name, as a one-dimensional tensor; the file's metadata
says which elements they are. Any reader of safetensors opens it, and none of them runs code from it. The data part of
the file is one buffer that is filled on the step path and written later; reading takes only the bytes that are needed,
and does not map the file: what was read is not held.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from paperscale.errors import UserError
from paperscale.training.checkpoint import TENSOR_FILES
from paperscale.training.pieces import Piece

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of elements, as safetensors names them."""
METADATA_KEY = "paperscale"
"""Of a file's metadata: which elements its pieces are."""
_COPIERS = 8
_A_THREAD_COPIES = 8 << 20  # bytes: below, it is not worth another thread
_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of the same size, that NumPy has
_MOST_OPEN = 64  # files: a thousand ranks write a thousand, and a process may have no more open


def tensor_file(rank: int) -> str:
    """Return the name of the file that one rank writes."""
    return f"tensors-{rank:05d}.safetensors"


class Buffer:
    """Memory that holds a rank's pieces while they are written, kept for the next checkpoint."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._reserving: threading.Thread | None = None

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Have the memory ready when these pieces are taken: a thread lets the system hand it out, page by page."""
        size, on_gpu = _size(pieces := list(pieces)), _on_gpu(pieces)
        self._reserving = threading.Thread(target=self._grow, args=(size, on_gpu), name="buffer", daemon=True)
        self._reserving.start()

    def _grow(self, size: int, on_gpu: bool) -> None:
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # first given back: never two of them
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            self._bytes.numpy().fill(0)  # NumPy lets the interpreter go on

    def take(self, pieces: Iterable[Piece]) -> list[memoryview | bytes]:
        """Copy pieces and return the content of a file that holds them: its header and its data.

        Raises:
            ValueError: an element's type has no name in safetensors.
        """
        ordered = sorted(pieces, key=lambda piece: -piece.tensor.element_size())  # each begins at a multiple of its own
        size, on_gpu = _size(ordered), _on_gpu(ordered)
        if self._reserving is not None:
            self._reserving.join()
        self._grow(size, on_gpu)
        at = 0
        copies: list[tuple[Tensor, Tensor]] = []
        table: dict[str, Any] = {}
        places: dict[str, list[Any]] = {}
        for piece in ordered:
            tensor = piece.tensor.detach()
            end = at + tensor.numel() * tensor.element_size()
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{piece.name}: elements of type {tensor.dtype} cannot be kept in a checkpoint")
            into = self._bytes[at:end].view(tensor.dtype).view(tensor.shape)
            if tensor.is_cuda:
                into.copy_(tensor, non_blocking=True)
            else:
                copies.append((into, tensor))
            table[piece.name] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [at, end]}
            places[piece.name] = [list(piece.shape), piece.start]
            at = end
        _copy_in_threads(copies)
        if on_gpu:
            torch.cuda.synchronize()
        table["__metadata__"] = {"format": "pt", METADATA_KEY: json.dumps(places)}
        return [header(table), self._bytes[:size].numpy().data]


def _size(pieces: Iterable[Piece]) -> int:
    return sum(piece.tensor.nbytes for piece in pieces)


def _on_gpu(pieces: Iterable[Piece]) -> bool:
    return any(piece.tensor.is_cuda for piece in pieces)


def _copy_in_threads(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors of the CPU, given as target and source.

    Each thread copies its share without a word to the others. Torch's own parallel copy lets its threads meet at the
    end of each tensor: on cores that also read data, each meeting waits for a thread that does not run.
    """
    total = sum(source.nbytes for _, source in copies)
    threads = min(torch.get_num_threads(), _COPIERS, 1 + total // _A_THREAD_COPIES)
    shares: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(threads)]
    at = 0
    for target, source in copies:
        shares[min(at * threads // max(total, 1), threads - 1)].append((target, source))
        at += source.nbytes
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_copy, shares))


def _copy(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    for target, source in copies:
        numbers = _NUMBERS[source.element_size()]
        np.copyto(target.view(numbers).numpy(), source.view(numbers).numpy())


def header(table: dict[str, Any]) -> bytes:
    """Return the first bytes of a safetensors file with these entries."""
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Extent(NamedTuple):
    """Where elements of a tensor lie.

    Attributes:
        start: the first of them.
        stop: the one after the last.
        path: the file.
        offset: of the first, in bytes from the beginning of the file.
    """

    start: int
    stop: int
    path: Path
    offset: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        shape: of the tensor.
        dtype: of its elements.
        extents: where they lie, in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    extents: list[Extent] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


class TensorReader:
    """Reads the tensors of a checkpoint, any run of elements, whatever ranks have written them.

    Args:
        checkpoint: its folder, or any folder of safetensors files, or one such file.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.tensors: dict[str, Stored] = {}
        self._open: dict[Path, FileIO] = {}
        self._by_prefix: dict[str, list[str]] | None = None
        for path in self._files():
            self._index(path)
        for name, stored in self.tensors.items():
            stored.extents.sort()
            if any(one.stop > other.start for one, other in pairwise(stored.extents)):
                raise UserError(f"{checkpoint}: two files hold the same elements of {name}; restore it from a copy")

    def _files(self) -> list[Path]:
        if self.checkpoint.is_file():
            return [self.checkpoint]
        own = sorted(self.checkpoint.glob(TENSOR_FILES))
        return own or sorted(self.checkpoint.glob("*.safetensors"))

    def _index(self, path: Path) -> None:
        dtypes = {name: dtype for dtype, name in DTYPES.items()}
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                table = json.loads(file.read(size) if size < path.stat().st_size else b"")
            room = path.stat().st_size - 8 - size
            facts = table.pop("__metadata__", {})
            plain = {name: [entry["shape"], 0] for name, entry in table.items()}
            places = json.loads(facts[METADATA_KEY]) if METADATA_KEY in facts else plain
            for name, (shape, start) in places.items():
                dtype, (first, last) = dtypes[table[name]["dtype"]], table[name]["data_offsets"]
                stored = self.tensors.setdefault(name, Stored(tuple(shape), dtype))
                stop = start + (last - first) // dtype.itemsize
                same = (dtype, tuple(shape)) == (stored.dtype, stored.shape) and min(shape, default=0) >= 0
                if not (same and 0 <= first <= last <= room and 0 <= start <= stop <= stored.numel):
                    raise ValueError(f"its header says that {name} lies where it cannot")
                stored.extents.append(Extent(start, stop, path, 8 + size + first))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a readable file of tensors ({error}); restore it from a copy") from error

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names_of(self, prefix: str) -> list[str]:
        """Return the tensors of one parameter: the names that are ``prefix`` and a word."""
        if self._by_prefix is None:
            self._by_prefix = {}
            for name in self.tensors:
                self._by_prefix.setdefault(name[: name.rindex("/") + 1], []).append(name)
        return self._by_prefix.get(prefix, [])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a tensor, shape [stop - start].

        Raises:
            UserError: the checkpoint has no such tensor, or not all of these elements.
        """
        if name not in self.tensors:
            raise UserError(f"{self.checkpoint} has no {name}; use the recipe that made it, or `fit --init-from`")
        stored = self.tensors[name]
        stop = stored.numel if stop is None else stop
        parts = [e for e in stored.extents if max(e.start, start) < min(e.stop, stop)]
        found = sum(min(part.stop, stop) - max(part.start, start) for part in parts)
        if found != stop - start:
            raise UserError(
                f"{self.checkpoint}: {name} has {found:,} of the elements {start:,} to {stop:,}; a file is missing, "
                "restore it from a copy"
            )
        out = torch.empty(stop - start, dtype=stored.dtype)
        room, size = out.view(torch.uint8).numpy().data, stored.dtype.itemsize
        for part in parts:
            low, high = max(part.start, start), min(part.stop, stop)
            offset = part.offset + (low - part.start) * size
            self._read_into(room[(low - start) * size : (high - start) * size], part.path, offset)
        return out

    def whole(self, name: str) -> Tensor:
        """Return a tensor in its shape."""
        return self.read(name).view(self.tensors[name].shape)

    def fill(self, piece: Piece) -> None:
        """Copy a piece's elements from the checkpoint into it.

        Raises:
            UserError: the checkpoint has no such tensor, or one of another shape.
        """
        if piece.name in self.tensors and self.tensors[piece.name].shape != piece.shape:
            raise UserError(
                f"{self.checkpoint}: {piece.name} has the shape {list(self.tensors[piece.name].shape)}, the model's is "
                f"{list(piece.shape)}; use the recipe that made the checkpoint"
            )
        if piece.tensor.numel():
            piece.fill(self.read(piece.name, piece.start, piece.stop))

    def _read_into(self, room: memoryview, path: Path, offset: int) -> None:
        """Fill a buffer with what lies in a file from ``offset`` on."""
        if path not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = FileIO(path)
        while room:
            if (count := os.preadv(self._open[path].fileno(), [room], offset)) == 0:
                raise UserError(f"{path} is cut short; restore it from a copy")
            room, offset = room[count:], offset + count
