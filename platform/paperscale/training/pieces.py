"""State as pieces: what a rank holds of a tensor is a run of its elements, whatever divides them over the ranks.

A replica (DDP) is the whole tensor, a shard of FSDP2 some of its rows, a partition of ZeRO any stretch of its
elements: in row-major order each of them is one contiguous run. So one form serves every strategy and any number of
ranks: which tensor, from which element on, and the elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's elements that this rank holds.

    Attributes:
        name: of the tensor: ``model/<parameter>``, ``optimizer0/<parameter>/<state>``, ``ema/<parameter>``.
        shape: of the whole tensor.
        start: the first element, in row-major order.
        tensor: the elements, of any shape; live storage, into which values can be copied.
        replicated: whether every rank holds the same.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor
    replicated: bool = False

    @property
    def stop(self) -> int:
        """Return the element after the last."""
        return self.start + self.tensor.numel()

    def fill(self, values: Tensor) -> None:
        """Copy values, shape [stop - start], into the piece."""
        self.tensor.detach().copy_(values.view(self.tensor.shape))

    def part(self, start: int, stop: int) -> Piece:
        """Return the elements from ``start`` to ``stop`` of the whole tensor, all of which lie in this piece."""
        if (start, stop) == (self.start, self.stop):
            return self
        elements = self.tensor.detach().reshape(-1)[start - self.start : stop - self.start]
        return Piece(self.name, self.shape, start, elements, self.replicated)


def piece_of(name: str, tensor: Tensor) -> Piece:
    """Return this rank's piece of a tensor.

    Raises:
        ValueError: it is divided in a way that leaves no contiguous run.
    """
    if not isinstance(tensor, DTensor):
        return Piece(name, tuple(tensor.shape), 0, tensor.detach(), replicated=True)
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    placements = [p for p, size in zip(tensor.placements, mesh.shape, strict=True) if size > 1]
    if all(isinstance(p, Replicate) for p in placements):
        return Piece(name, tuple(tensor.shape), 0, local, replicated=True)
    sharded = [i for i, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    if len(sharded) != 1 or tensor.placements[sharded[0]] != Shard(0):
        raise ValueError(f"{name} is divided as {tensor.placements}: only divisions of the first dimension are kept")
    rows = -(-tensor.shape[0] // mesh.size(sharded[0]))  # of every rank but the last ones
    first = min(rows * mesh.get_local_rank(sharded[0]), tensor.shape[0])
    return Piece(name, tuple(tensor.shape), first * (tensor.numel() // tensor.shape[0]), local)


def to_write(pieces: Iterable[Piece], rank: int, world_size: int) -> Iterator[Piece]:
    """Yield what this rank writes, so that each element is written once: a replica's elements are shared out."""
    pieces = list(pieces)
    yield from (piece for piece in pieces if not piece.replicated and piece.tensor.numel())
    replicas = [piece for piece in pieces if piece.replicated]
    total = sum(piece.tensor.numel() for piece in replicas)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    at = 0
    for piece in replicas:
        size = piece.tensor.numel()
        start, stop = max(first - at, 0), min(last - at, size)
        if start < stop:
            yield piece.part(piece.start + start, piece.start + stop)
        at += size


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that belong into a checkpoint, by name."""
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
