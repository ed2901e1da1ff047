"""``ShardStream``: what every DataModule of shards shares: position, order, division over ranks, loaders.

A training batch is a dictionary that holds, beside what the model reads::

    sample  int64 [batch], the samples' numbers in their split
    cursor  where the stream stands, see :class:`Cursor`
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from paperscale.data.loader import OrderedLoader
from paperscale.data.order import BatchPlan, Piece, SampleOrder, even_batches
from paperscale.data.shards import ShardSet
from paperscale.errors import UserError

Batch = dict[str, Any]


class Cursor(NamedTuple):
    """Where the stream stands after a training batch.

    Attributes:
        consumed: samples consumed by the run once this batch is trained on: the whole state of the stream.
        weight: scale of the batch's loss, see :class:`~paperscale.data.order.Piece`.
        last: whether the optimizer steps after this batch.
    """

    consumed: int
    weight: float
    last: bool


class ShardStream(LightningDataModule):
    """Streams samples from a folder of shards, the same ones at any world size and thread count.

    Args:
        path: the set, as written by ``paperscale data prepare``.
        global_batch_size: samples of one optimizer step over all ranks.
        micro_batch_size: the most samples of one forward pass on one rank; the gradient is accumulated over as
            many passes as that takes. By default one pass.
        eval_batch_size: samples of one forward pass in validation and test.
        train: split (or splits joined by ``+``) to train on.
        val: split to validate on; ``None`` for no validation.
        test: split to test on.
        seed: fixes the order and the augmentation; by default the run's ``seed_everything``.
        window: samples shuffled together.
        num_threads: threads that read and decode; 0 reads in the training thread.
    """

    def __init__(
        self,
        path: str,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        eval_batch_size: int = 250,
        train: str = "train",
        val: str | None = "val",
        test: str = "test",
        seed: int | None = None,
        window: int = 1 << 16,
        num_threads: int = 1,
    ):
        super().__init__()
        for name, value in (("global_batch_size", global_batch_size), ("window", window)):
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, not {value}")
        self.path = path
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.splits = {"train": train, "val": val, "test": test}
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.window = window
        self.num_threads = num_threads
        self.consumed = 0
        self._shards: dict[str, ShardSet] = {}

    @abstractmethod
    def read(self, shards: ShardSet, order: SampleOrder, samples: NDArray[np.int64], epoch: int | None) -> Batch:
        """Read and decode samples; ``epoch`` is that of their augmentation, ``None`` for none. Called on threads."""

    # -- the stream's state: one integer -------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Return the samples consumed, and what the order was made from, to refuse another one on resume."""
        return {"consumed": self.consumed, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the samples that were consumed.

        Raises:
            UserError: the data, the seed or the batch size is not that of the checkpoint.
        """
        for name, now in self._identity().items():
            if state_dict[name] != now:
                raise UserError(
                    f"the checkpoint was made with data.{name}={state_dict[name]}, this run has {now}: its order "
                    f"of samples cannot be continued; restore data.{name} or start a new run"
                )
        self.consumed = state_dict["consumed"]

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "samples": sum(self.shards("train").sizes),
            "window": self.window,
            "global_batch_size": self.global_batch_size,
        }

    # -- what a run must know before it starts -------------------------------------------------------------

    def shards(self, stage: str) -> ShardSet:
        """Return the shards of ``train``, ``val`` or ``test``, opened once.

        Raises:
            UserError: the set or the split does not exist.
        """
        split = self.splits[stage]
        if split is None:
            raise UserError(f"data.{stage} is not set: name the split to use, for example data.{stage}={stage}")
        if split not in self._shards:
            self._shards[split] = ShardSet(Path(self.path), split)
        return self._shards[split]

    def check(self) -> None:
        """Look at every shard that the run will read, as far as the file system's own facts tell.

        Raises:
            UserError: one is missing or was replaced.
        """
        for stage, split in self.splits.items():
            if split is not None:
                self.shards(stage).check()

    def accumulate(self, world_size: int) -> int:
        """Return the forward passes of one optimizer step.

        Raises:
            UserError: there are more processes than samples in a global batch.
        """
        if world_size > self.global_batch_size:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} cannot be divided over {world_size} processes; "
                f"use at most {self.global_batch_size} processes or a larger data.global_batch_size"
            )
        share = -(-self.global_batch_size // world_size)
        return -(-share // (self.micro_batch_size or share))

    # -- loaders -------------------------------------------------------------------------------------------

    def train_dataloader(self) -> OrderedLoader[Piece, Batch]:
        """Return the training batches of this rank, from where the stream stands to the end of its epoch."""
        shards = self.shards("train")
        rank, world_size = self._rank()
        order = SampleOrder(shards.sizes, seed=self.seed, window=self.window)
        accumulate = self.accumulate(world_size)
        plan = BatchPlan(len(order), self.global_batch_size, world_size, accumulate)

        def pieces() -> Iterator[Piece]:
            return plan.pieces(rank, self.consumed)

        def prepare(piece: Piece) -> Batch:
            # A rank with nothing left of a short batch still takes part in its collectives, with weight zero.
            stop = max(piece.stop, piece.start + 1)
            samples = order.samples(piece.epoch, min(piece.start, len(order) - 1), stop)
            cursor = Cursor(piece.consumed, piece.weight, piece.last)
            return {**self.read(shards, order, samples, piece.epoch), "cursor": cursor}

        return OrderedLoader(pieces, prepare, plan.steps_per_epoch() * accumulate, self.num_threads)

    def val_dataloader(self) -> OrderedLoader[tuple[int, int], Batch] | list[Any]:
        """Return the validation batches of this rank; each sample is visited once over all ranks."""
        return self._eval_dataloader("val") if self.splits["val"] else []

    def test_dataloader(self) -> OrderedLoader[tuple[int, int], Batch]:
        """Return the test batches of this rank; each sample is visited once over all ranks."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> OrderedLoader[tuple[int, int], Batch]:
        """Return the test split."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, stage: str) -> OrderedLoader[tuple[int, int], Batch]:
        shards = self.shards(stage)
        order = SampleOrder(shards.sizes, shuffle=False)
        ranges = even_batches(len(order), self.eval_batch_size, *self._rank())

        def prepare(bounds: tuple[int, int]) -> Batch:
            return self.read(shards, order, order.samples(0, *bounds), None)

        return OrderedLoader(lambda: ranges, prepare, len(ranges), self.num_threads)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
