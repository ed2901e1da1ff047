"""How well an order is shuffled, and whether a resumed run goes on exactly: figures of sample numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Batches = Sequence[Sequence[int]]

NEAR = 100


@dataclass(frozen=True)
class Shuffle:
    """Statistics of one pass over samples numbered in writing order.

    Attributes:
        span: mean over batches of the standard deviation of the numbers, as a share of all samples: 0.289 at random.
        shards_per_batch: shards of ``shard_size`` samples, in writing order, that a batch comes from.
        near: share of consecutive samples that were written within 100 of each other.
    """

    span: float
    shards_per_batch: float
    near: float


def shuffle_of(batches: Batches, samples: int, shard_size: int) -> Shuffle:
    """Return the statistics of a pass."""
    arrays = [np.asarray(batch, np.int64) for batch in batches]
    order = np.concatenate(arrays)
    return Shuffle(
        span=float(np.mean([array.std() for array in arrays]) / samples),
        shards_per_batch=float(np.mean([len(np.unique(array // shard_size)) for array in arrays])),
        near=float(np.mean(np.abs(np.diff(order)) <= NEAR)),
    )


def random_shuffle(samples: int, batch_size: int, shard_size: int) -> Shuffle:
    """Return the statistics of a permutation drawn at random."""
    order = np.random.default_rng(0).permutation(samples)
    batches = [order[start : start + batch_size].tolist() for start in range(0, samples, batch_size)]
    return shuffle_of(batches, samples, shard_size)


def global_batches(ranks: Sequence[Batches]) -> list[list[int]]:
    """Return the global batches: the ranks' batches of the same step, one after the other."""
    steps = max((len(batches) for batches in ranks), default=0)
    return [[sample for batches in ranks if step < len(batches) for sample in batches[step]] for step in range(steps)]


def verdict(before: Batches, after: Batches, uninterrupted: Batches, samples: int) -> str:
    """Return what became of an epoch that was interrupted and resumed.

    Args:
        before: global batches up to the interruption.
        after: global batches of the resumed run.
        uninterrupted: global batches of a run that was not interrupted.
        samples: of the epoch.
    """
    seen = Counter(sample for batches in (before, after) for batch in batches for sample in batch)
    lost = samples - len(seen)
    repeated = sum(seen.values()) - len(seen)
    if lost or repeated:
        parts = [f"{lost:,} lost"] * bool(lost) + [f"{repeated:,} repeated"] * bool(repeated)
        return ", ".join(parts)
    rest = uninterrupted[len(before) :]
    if [list(batch) for batch in after] == [list(batch) for batch in rest]:
        return "exact, same order"
    if [sorted(batch) for batch in after] == [sorted(batch) for batch in rest]:
        return "exact, same global batches"
    return "exact, another order"
