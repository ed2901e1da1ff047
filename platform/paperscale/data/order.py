"""The order of samples: ``(shard sizes, seed, epoch, position) -> sample``, and nothing else.

Shards are permuted, laid end to end, and shuffled inside windows of a bounded number of samples. Reading stays
close to sequential, memory is bounded by one window, and a seek costs one window's permutation wherever it lands.

**Epochs.** Position ``p`` of a run with ``N`` samples belongs to epoch ``p // N``; each epoch visits every sample
exactly once. Batches never straddle two epochs. How positions are cut into batches is in
:mod:`paperscale.data.batching`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from paperscale.data.random import permutation
from paperscale.errors import UserError

_SHARDS, _SAMPLES = 1, 2  # keep the two permutations of an epoch independent of each other
_WINDOWS = 3  # planned windows that are kept: threads work on both sides of a border


class Taken(NamedTuple):
    """Samples at consecutive positions.

    Attributes:
        samples: their numbers, int64 [n].
        epochs: how often each has been visited before, int64 [n]: what its augmentation is drawn from.
    """

    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]


class Order(Protocol):
    """A sequence of samples, epoch after epoch."""

    def __len__(self) -> int:
        """Return the number of positions of one epoch."""

    def take(self, epoch: int, start: int, stop: int) -> Taken:
        """Return the samples at positions ``start`` to ``stop`` of ``epoch``."""


class Windows:
    """The few windows that were planned last, for several threads."""

    def __init__(self, plan: Callable[[int, int], Any]):
        self._plan = plan
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return the plan of window ``(epoch, number)``. Two threads may both make it: it is the same."""
        found = self._kept.get(key)
        if found is None:
            found = self._plan(*key)
            kept = OrderedDict([*list(self._kept.items())[1 - _WINDOWS :], (key, found)])
            self._kept = kept  # replaced whole, never changed: readers need no lock
        return found

    def __reduce__(self) -> tuple[type[Windows], tuple[Callable[[int, int], Any]]]:  # worker processes plan their own
        return Windows, (self._plan,)


class SampleOrder:
    """The sequence of samples of a set of shards.

    Args:
        sizes: samples of each shard.
        seed: fixes the order together with the epoch.
        shuffle: ``False`` gives the order in which the samples were written.
        window: samples that are shuffled together; bounds memory (24 bytes a sample) and the span of reading.
    """

    def __init__(
        self, sizes: Sequence[int] | NDArray[np.int64], *, seed: int = 0, shuffle: bool = True, window: int = 1 << 16
    ):
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._samples = int(self.starts[-1])
        self._shards: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._windows = Windows(self._shuffled)

    def __len__(self) -> int:
        """Return the number of samples of one epoch."""
        return self._samples

    def take(self, epoch: int, start: int, stop: int) -> Taken:
        """Return the samples at positions ``start`` to ``stop`` of ``epoch``."""
        samples = self.samples(epoch, start, stop)
        return Taken(samples, np.full(len(samples), epoch))

    def samples(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sample numbers at positions ``start`` to ``stop`` of ``epoch``, shape [stop - start].

        A sample's number counts the samples of the set in the order they were written: 0 .. len(self) - 1.
        """
        stop = min(stop, self._samples)
        if not self.shuffle:
            return np.arange(start, stop)
        return windowed(start, stop, self.window, lambda number: self._windows[epoch, number])

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shard of each sample and its row inside that shard."""
        shards = self.starts.searchsorted(samples, side="right") - 1
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
        order, begins = self._permuted_shards(epoch)
        start = number * self.window
        stop = min(start + self.window, len(self))
        first, last = np.searchsorted(begins, [start, stop - 1], side="right") - 1
        ranges = []
        for k in range(first, last + 1):
            low, high = max(start, begins[k]), min(stop, begins[k + 1])
            ranges.append(self.starts[order[k]] + np.arange(low - begins[k], high - begins[k]))
        samples = np.concatenate(ranges)
        return samples[permutation(len(samples), self.seed, epoch, _SAMPLES, number)]


def windowed(start: int, stop: int, window: int, plan: Callable[[int], NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return positions ``start`` to ``stop`` of a sequence that is planned window by window."""
    number, first = divmod(start, window)
    if start < stop <= (number + 1) * window:  # nearly always
        return plan(number)[first : first + stop - start]
    parts = []
    while start < stop:
        number, first = divmod(start, window)
        part = plan(number)[first : first + stop - start]
        parts.append(part)
        start += len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class MixedOrder:
    """Several sets in exact proportions, each with epochs of its own.

    After ``p`` positions the share of each set differs from its weight's by less than one sample for each doubling
    of the number of sets, at every ``p``; where ``p`` times every weight is whole, it is exact. Which set a position
    takes from is a closed formula, so that a seek costs nothing: positions are split between the first half of the
    sets and the second by rounding, and so on within each half.

    Args:
        orders: the order of each set.
        weights: share of each set's samples; any positive scale.
        samples: positions of an epoch of the mixture; by default the samples of all sets together.

    Raises:
        UserError: the weights are not positive, one for each set.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], samples: int | None = None):
        if len(weights) != len(orders) or any(not weight > 0 for weight in weights):
            raise UserError(f"data.weights={list(weights)}: give one positive number for each of {len(orders)} sets")
        self.orders, self.weights = list(orders), list(weights)
        self.offsets = np.concatenate([[0], np.cumsum([len(order) for order in orders])])
        self._samples = int(self.offsets[-1]) if samples is None else samples

    def __len__(self) -> int:
        """Return the number of positions of one epoch of the mixture."""
        return self._samples

    def counts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of the first ``positions`` fall on each set, int64 [sets, positions]."""
        return np.stack(self._split(np.asarray(positions, np.int64), 0, len(self.orders)))

    def _split(self, positions: NDArray[np.int64], low: int, high: int) -> list[NDArray[np.int64]]:
        if high - low == 1:
            return [positions]
        middle = (low + high) // 2
        share = sum(self.weights[low:middle]) / sum(self.weights[low:high])
        left = np.floor(positions * share + 0.5).astype(np.int64)
        return self._split(left, low, middle) + self._split(positions - left, middle, high)

    def take(self, epoch: int, start: int, stop: int) -> Taken:
        """Return the samples at positions ``start`` to ``stop`` of the mixture's ``epoch``.

        A sample's number counts the samples of all sets, one set after the other.
        """
        base = epoch * self._samples
        stop = min(stop, self._samples)
        counts = self.counts(np.arange(base + start, base + stop + 1))
        samples, epochs = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        for number, order in enumerate(self.orders):
            here = np.flatnonzero(np.diff(counts[number]))
            position, last = int(counts[number][0]), int(counts[number][-1])
            filled = 0
            while position < last:  # the positions of this set are consecutive in its own sequence
                own_epoch, first = divmod(position, len(order))
                part = order.samples(own_epoch, first, min(len(order), first + last - position))
                rows = here[filled : filled + len(part)]
                samples[rows], epochs[rows] = part + self.offsets[number], own_epoch
                filled += len(part)
                position += len(part)
        return Taken(samples, epochs)
