"""How the order is cut into global batches, and global batches into the pieces of ranks and micro-steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from paperscale.data.order import Order, Taken, Windows, windowed
from paperscale.data.random import permutation
from paperscale.errors import UserError

_BATCHES = 3  # the permutation of a window's batches; 1 and 2 are of shards and samples


class Batches(Protocol):
    """A sequence of global batches over an epoch's positions."""

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""

    def stop(self, epoch: int, position: int) -> int:
        """Return where the global batch ends that begins at ``position``."""

    def split(self, epoch: int, start: int, stop: int, parts: int) -> list[int]:
        """Return where each of ``parts`` even pieces of a global batch begins, and where the last ends."""

    def mass(self, epoch: int, start: int, stop: int) -> int:
        """Return what a mean over the positions' loss is over: samples, or tokens."""

    def steps(self, epoch: int, start: int, stop: int) -> int | None:
        """Return the number of global batches from ``start``, where one begins, to ``stop``, where one ends.

        ``None`` where that is not known before they are made.
        """


@dataclass(frozen=True)
class FixedBatches:
    """Global batches of a fixed number of samples; the last of an epoch holds what remains.

    Args:
        samples: samples of an epoch.
        size: samples of a global batch.
    """

    samples: int
    size: int

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return self.samples

    def stop(self, epoch: int, position: int) -> int:
        """Return where the global batch ends that begins at ``position``."""
        return min(position + self.size, self.samples)

    def split(self, epoch: int, start: int, stop: int, parts: int) -> list[int]:
        """Return pieces whose numbers of samples differ by at most one."""
        return [start + (stop - start) * part // parts for part in range(parts + 1)]

    def mass(self, epoch: int, start: int, stop: int) -> int:
        """Return the number of samples."""
        return stop - start

    def steps(self, epoch: int, start: int, stop: int) -> int | None:
        """Return the number of global batches from ``start``, where one begins, to ``stop``, where one ends."""
        return -(-(stop - start) // self.size)


class _Bucketed(NamedTuple):
    """A window's plan: its samples in the order of its batches, and where each batch ends."""

    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]
    mass: NDArray[np.int64]
    longest: NDArray[np.int64]
    stops: NDArray[np.int64]


class TokenBatches:
    """Global batches of samples of like length, within a budget of tokens (Vaswani et al. 2017, section 5.1).

    Inside a window of the order, samples are sorted by their longest side and cut wherever another one would exceed
    the budget on any side; the batches are then shuffled. So the samples of a global batch, and the sequence of
    global batches, are a pure function of the order and the lengths: the same at any world size. A sample that
    exceeds the budget by itself is a batch of its own.

    Args:
        order: the order that is cut; its windows are shuffled already.
        lengths: tokens of samples, given their numbers: int64 [samples, sides], for example source and target.
        max_tokens: tokens of a global batch, on each side.
        seed: fixes the order of batches together with the epoch.
        window: samples that are sorted together.
    """

    def __init__(
        self,
        order: Order,
        lengths: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        max_tokens: int,
        *,
        seed: int = 0,
        window: int = 1 << 16,
    ):
        self.order, self.lengths, self.max_tokens = order, lengths, max_tokens
        self.seed, self.window = seed, window
        self._windows = Windows(self._plan)

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return len(self.order)

    def _plan(self, epoch: int, number: int) -> _Bucketed:
        start = number * self.window
        samples, epochs = self.order.take(epoch, start, min(start + self.window, len(self.order)))
        lengths = self.lengths(samples)
        by_length = np.argsort(lengths.max(1), kind="stable")
        stops = cut(lengths[by_length], self.max_tokens)
        starts = np.concatenate([[0], stops[:-1]])
        batches = permutation(len(stops), self.seed, epoch, _BATCHES, number)
        rows = by_length[np.concatenate([np.arange(starts[b], stops[b]) for b in batches])]
        ends = np.cumsum((stops - starts)[batches])
        return _Bucketed(samples[rows], epochs[rows], lengths[rows, -1], lengths[rows].max(1), ends)

    def take(self, epoch: int, start: int, stop: int) -> Taken:
        """Return the samples at positions ``start`` to ``stop`` of ``epoch``, in the order of the batches."""
        stop = min(stop, len(self))
        samples = windowed(start, stop, self.window, lambda number: self._windows[epoch, number].samples)
        return Taken(samples, windowed(start, stop, self.window, lambda number: self._windows[epoch, number].epochs))

    def stop(self, epoch: int, position: int) -> int:
        """Return where the global batch ends that begins at ``position``."""
        number, inside = divmod(position, self.window)
        stops = self._windows[epoch, number].stops
        return int(number * self.window + stops[stops.searchsorted(inside, side="right")])

    def split(self, epoch: int, start: int, stop: int, parts: int) -> list[int]:
        """Return pieces of like numbers of tokens: none exceeds its share by a whole sample."""
        number, inside = divmod(start, self.window)
        totals = np.cumsum(self._windows[epoch, number].longest[inside : inside + stop - start])
        shares = totals[-1] * np.arange(1, parts) / parts
        return [start, *(start + totals.searchsorted(shares, side="right")).tolist(), stop]

    def mass(self, epoch: int, start: int, stop: int) -> int:
        """Return the number of tokens on the last side: the target's."""
        return int(windowed(start, stop, self.window, lambda number: self._windows[epoch, number].mass).sum())

    def steps(self, epoch: int, start: int, stop: int) -> None:
        """Return ``None``: epochs differ, and counting their batches would mean planning all of them."""
        return


def cut(lengths: NDArray[np.int64], max_tokens: int) -> NDArray[np.int64]:
    """Return where batches end that hold at most ``max_tokens`` on each side, samples taken in the order given.

    Args:
        lengths: int64 [samples, sides].
        max_tokens: the budget of each side.
    """
    totals = np.cumsum(lengths, 0)
    stops, start = [], 0
    before = np.zeros(lengths.shape[1], np.int64)
    while start < len(lengths):
        fits = [totals[:, side].searchsorted(before[side] + max_tokens, side="right") for side in range(len(before))]
        start = max(start + 1, min(int(stop) for stop in fits))
        stops.append(start)
        before = totals[start - 1]
    return np.array(stops, np.int64)


class Piece(NamedTuple):
    """What one rank computes in one micro-step: positions ``start`` to ``stop`` of ``epoch``.

    Attributes:
        epoch: of the stream.
        start: first position.
        stop: position after the last.
        weight: the piece's share of its global batch times the number of pieces: what the loss is scaled by so that
            averaging over ranks and micro-steps gives the mean over the global batch. Exactly 1 where the global
            batch divides evenly; 0 for a rank that has no sample left in a batch.
        consumed: samples that the run has consumed once the optimizer has stepped after this piece.
        last: whether the optimizer steps after this piece.
    """

    epoch: int
    start: int
    stop: int
    weight: float
    consumed: int
    last: bool


@dataclass(frozen=True)
class BatchPlan:
    """How global batches are cut into the pieces of ranks and micro-steps.

    Args:
        batches: the global batches.
        world_size: ranks.
        accumulate: micro-steps of an optimizer step.
        passed_over: ranges of consumed samples, each from the beginning of a global batch to the end of one, that the
            run is not trained on.
    """

    batches: Batches
    world_size: int = 1
    accumulate: int = 1
    passed_over: tuple[tuple[int, int], ...] = ()

    def beyond(self, consumed: int) -> int:
        """Return where the run goes on after ``consumed`` samples."""
        for start, stop in sorted(self.passed_over):
            if start <= consumed < stop:
                consumed = stop
        return consumed

    def steps(self, epoch: int) -> int | None:
        """Return the number of global batches of an epoch; ``None`` where that is not known beforehand."""
        first, last = epoch * len(self.batches), (epoch + 1) * len(self.batches)
        starts = sorted(start for start, _ in self.passed_over)
        total, consumed = 0, self.beyond(first)
        while consumed < last:
            end = min([last, *(start for start in starts if start > consumed)])
            if (steps := self.batches.steps(epoch, consumed - first, end - first)) is None:
                return None
            total, consumed = total + steps, self.beyond(end)
        return total

    def pieces(self, rank: int, consumed: int) -> Iterator[Piece]:
        """Yield the pieces of ``rank`` from ``consumed`` samples to the end of that epoch."""
        samples = len(self.batches)
        epoch = consumed // samples
        first = epoch * samples
        position = self.beyond(consumed) - first
        parts = self.world_size * self.accumulate
        while position < samples:
            end = self.batches.stop(epoch, position)
            before, after = first + position, self.beyond(first + end)
            mass = self.batches.mass(epoch, position, end)
            bounds = self.batches.split(epoch, position, end, parts)
            for micro in range(self.accumulate):
                part = micro * self.world_size + rank
                start, stop = bounds[part], bounds[part + 1]
                weight = self.batches.mass(epoch, start, stop) * parts / mass if stop > start else 0.0
                last = micro == self.accumulate - 1
                yield Piece(epoch, start, stop, weight, after if last else before, last)
            position = after - first


def even_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return one rank's ``(start, stop)`` ranges that visit every sample once over all ranks.

    Every rank gets the same number of batches, which differ by at most one sample, because collectives inside a
    forward pass (DDP broadcasts its buffers) must be entered by all ranks alike. For that reason a batch of one
    sample may become one of two.

    Raises:
        UserError: there are fewer samples than ranks.
    """
    if samples < world_size:
        raise UserError(
            f"{samples} samples cannot be evaluated by {world_size} processes, so that each is visited once; use at "
            f"most {samples} processes or a larger split"
        )
    largest_share = -(-samples // world_size)
    batches = min(-(-largest_share // batch_size), samples // world_size)
    parts = batches * world_size
    bounds = [samples * k // parts for k in range(rank * batches, (rank + 1) * batches + 1)]
    return list(pairwise(bounds))
