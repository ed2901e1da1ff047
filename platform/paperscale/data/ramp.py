"""A batch size that grows with the training: a function of the position alone, as the order of samples is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from paperscale.data.batching import FixedBatches
from paperscale.errors import UserError


@dataclass(frozen=True)
class RampedBatches(FixedBatches):
    """Global batches that are smaller at the beginning of the run.

    A batch's size is that of the stage in which it begins, and a stage ends after a number of samples, so that the
    size follows from the position, whatever has happened before. The last batch of an epoch holds what remains.

    Args:
        samples: samples of an epoch.
        size: samples of a global batch after the ramp.
        stages: samples of a batch, and for how many samples of the run.
    """

    stages: tuple[tuple[int, int], ...] = ()

    def _stage(self, consumed: int) -> tuple[int, float]:
        """Return the size of a batch that begins after ``consumed`` samples of the run, and where its stage ends."""
        for (size, _), end in zip(self.stages, accumulate(count for _, count in self.stages), strict=True):
            if consumed < end:
                return size, end
        return self.size, float("inf")

    def stop(self, epoch: int, position: int) -> int:
        """Return where the global batch ends that begins at ``position``."""
        return min(position + self._stage(epoch * self.samples + position)[0], self.samples)

    def steps(self, epoch: int, start: int, stop: int) -> int:
        """Return the number of global batches from ``start``, where one begins, to ``stop``, where one ends."""
        steps, first = 0, epoch * self.samples
        while start < stop:
            size, end = self._stage(first + start)
            count = -(-int(min(stop, end - first) - start) // size)
            steps, start = steps + count, start + count * size
        return steps


def check_ramp(ramp: Sequence[Sequence[int]], global_batch_size: int) -> tuple[tuple[int, int], ...]:
    """Return the stages of a recipe's ``data.batch_ramp``.

    Raises:
        UserError: a stage is not a batch size up to ``global_batch_size`` and a number of samples.
    """
    for stage in ramp:
        size, samples = stage
        if not 1 <= size <= global_batch_size or samples < 1:
            raise UserError(
                f"data.batch_ramp={[list(stage) for stage in ramp]}: {list(stage)} is no stage of a ramp to "
                f"data.global_batch_size={global_batch_size}; give pairs of a batch size from 1 to "
                f"{global_batch_size} and the number of samples it is for, such as [[{max(1, global_batch_size // 2)}, "
                "10000]]"
            )
    return tuple((size, samples) for size, samples in ramp)
