"""Lightning's Trainer, over a stream whose epochs may have different numbers of batches."""

from __future__ import annotations

from lightning.pytorch import Trainer

from paperscale.data import ShardStream


class StreamTrainer(Trainer):
    """A Trainer that tells a schedule the run's steps exactly, also with a batch size that grows."""

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Return the optimizer steps of the whole training.

        Lightning takes every epoch to have as many batches as the present one.
        """
        estimate = super().estimated_stepping_batches
        stream = getattr(self, "datamodule", None)
        whole = self.limit_train_batches == 1.0 and isinstance(self.limit_train_batches, float)
        if (
            not whole
            or not isinstance(stream, ShardStream)
            or not stream.epochs_differ
            or self.max_epochs in (None, -1)
        ):
            return estimate
        steps = stream.total_steps(max(self.max_epochs or 0, 1))
        if steps is None:
            return estimate
        return steps if self.max_steps == -1 else min(steps, self.max_steps)
