"""The order of samples: ``(shard sizes, seed, epoch, position) -> sample``, and nothing else.

Shards are permuted, laid end to end, and shuffled inside windows of a bounded number of samples. Reading stays
close to sequential, memory is bounded by one window, and a seek costs one window's permutation wherever it lands.

**Epochs.** Position ``p`` of a run with ``N`` samples belongs to epoch ``p // N``; each epoch visits every sample
exactly once. Batches never straddle two epochs: the last global batch of an epoch is the short one, it holds the
``N mod global_batch_size`` samples that remain, divided over the ranks as evenly as whole samples allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from paperscale.data.random import permutation

_SHARDS, _SAMPLES = 1, 2  # keep the two permutations of an epoch independent of each other


class SampleOrder:
    """The sequence of samples of a set of shards.

    Args:
        sizes: samples of each shard.
        seed: fixes the order together with the epoch.
        shuffle: ``False`` gives the order in which the samples were written.
        window: samples that are shuffled together; bounds memory (16 bytes a sample) and the span of reading.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int = 0, shuffle: bool = True, window: int = 1 << 16):
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._shards: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._window: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Return the number of samples of one epoch."""
        return int(self.starts[-1])

    def samples(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sample numbers at positions ``start`` to ``stop`` of ``epoch``, shape [stop - start].

        A sample's number counts the samples of the set in the order they were written: 0 .. len(self) - 1.
        """
        stop = min(stop, len(self))
        if not self.shuffle:
            return np.arange(start, stop)
        parts = []
        while start < stop:
            number = start // self.window
            samples = self._shuffled(epoch, number)
            first = start - number * self.window
            part = samples[first : first + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shard of each sample and its row inside that shard."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        return shards, samples - self.starts[shards]

    def _permuted_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards in the order of ``epoch`` and the position at which each begins (and the end)."""
        cached = self._shards  # one read: several threads share this object
        if cached is None or cached[0] != epoch:
            order = permutation(len(self.sizes), self.seed, epoch, _SHARDS)
            cached = self._shards = (epoch, order, np.concatenate([[0], np.cumsum(self.sizes[order])]))
        return cached[1:]

    def _shuffled(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Return the sample numbers of one window, shuffled."""
        cached = self._window
        if cached is None or cached[0] != (epoch, number):
            order, begins = self._permuted_shards(epoch)
            start = number * self.window
            stop = min(start + self.window, len(self))
            first, last = np.searchsorted(begins, [start, stop - 1], side="right") - 1
            ranges = []
            for k in range(first, last + 1):
                low, high = max(start, begins[k]), min(stop, begins[k + 1])
                ranges.append(self.starts[order[k]] + np.arange(low - begins[k], high - begins[k]))
            samples = np.concatenate(ranges)
            shuffled = samples[permutation(len(samples), self.seed, epoch, _SAMPLES, number)]
            cached = self._window = ((epoch, number), shuffled)
        return cached[1]


@dataclass(frozen=True)
class Piece:
    """What one rank computes in one micro-step: positions ``start`` to ``stop`` of ``epoch``.

    Attributes:
        weight: the piece's share of its global batch times the number of pieces: what the loss is scaled by so that
            averaging over ranks and micro-steps gives the mean over the global batch's samples. Exactly 1 where the
            global batch divides evenly; 0 for a rank that has no sample left in an epoch's last batch.
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
        samples: samples of an epoch.
        global_batch_size: samples of an optimizer step, over all ranks.
        world_size: ranks.
        accumulate: micro-steps of an optimizer step.
    """

    samples: int
    global_batch_size: int
    world_size: int = 1
    accumulate: int = 1

    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps of one epoch."""
        return -(-self.samples // self.global_batch_size)

    def pieces(self, rank: int, consumed: int) -> Iterator[Piece]:
        """Yield the pieces of ``rank`` from ``consumed`` samples to the end of that epoch."""
        epoch, position = divmod(consumed, self.samples)
        parts = self.world_size * self.accumulate
        while position < self.samples:
            size = min(self.global_batch_size, self.samples - position)
            after = epoch * self.samples + position + size
            for micro in range(self.accumulate):
                part = micro * self.world_size + rank
                start, stop = position + size * part // parts, position + size * (part + 1) // parts
                weight = (stop - start) * parts / size
                last = micro == self.accumulate - 1
                yield Piece(epoch, start, stop, weight, after if last else after - size, last)
            position += size


def even_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return one rank's ``(start, stop)`` ranges that visit every sample once over all ranks.

    Every rank gets the same number of batches, which differ by at most one sample, because collectives inside a
    forward pass (DDP broadcasts its buffers) must be entered by all ranks alike. For that reason a batch of one
    sample may become one of two.

    Raises:
        ValueError: there are fewer samples than ranks.
    """
    if samples < world_size:
        raise ValueError(f"{samples} samples cannot be divided over {world_size} ranks")
    largest_share = -(-samples // world_size)
    batches = min(-(-largest_share // batch_size), samples // world_size)
    parts = batches * world_size
    bounds = [samples * k // parts for k in range(rank * batches, (rank + 1) * batches + 1)]
    return list(pairwise(bounds))
