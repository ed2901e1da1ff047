"""``WebDatasetStream``: a user's own WebDataset pipeline as a DataModule, where exactness is not needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from paperscale.data.loader import OrderedLoader, Workers
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch, Cursor, ShardStream, at_least
from paperscale.errors import UserError, nearest


class WebDatasetStream(ShardStream):
    """Trains on the batches of a pipeline that the user wrote.

    The pipeline decides on order, shuffling and division over ranks. Nothing about it can be resumed: after an
    interruption it starts anew, so samples are repeated and others missed, which the log says.

    Args:
        pipeline: ``package.module:function``; called as ``function(split, rank, world_size, seed)``, it returns an
            iterable of batches, dictionaries of tensors, for example a ``wds.WebDataset`` with its stages.
        global_batch_size: samples of one optimizer step over all ranks: what the batches add up to.
        steps_per_epoch: batches of an epoch on each rank; a pipeline that ends before is begun again.
        val: split to validate on; ``None`` for no validation.
        test: split to test on.
        stream: the further arguments of :class:`~paperscale.data.stream.ShardStream` that apply: ``train``, ``seed``.
    """

    def __init__(
        self,
        pipeline: str,
        global_batch_size: int,
        steps_per_epoch: int,
        val: str | None = "val",
        test: str = "test",
        **stream: Any,
    ):
        at_least(1, steps_per_epoch=steps_per_epoch)
        super().__init__([], global_batch_size, val=val, test=test, **stream)
        self.name, self.pipeline, self.steps_per_epoch = pipeline, find(pipeline), steps_per_epoch

    def pass_over(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Pass over nothing: the pipeline starts anew after an interruption, with other samples."""

    def epoch_around(self, consumed: int) -> tuple[int, int]:
        """Return the samples consumed at the beginning and at the end of the epoch that ``consumed`` is in."""
        samples = self.steps_per_epoch * self.global_batch_size
        first = consumed // samples * samples
        return first, first + samples

    def end_of_batch(self, start: int) -> int:
        """Return the samples consumed at the end of the global batch that begins after ``start`` of them."""
        return start + self.global_batch_size

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "global_batch_size": self.global_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to count; the pipeline itself starts anew."""
        super().load_state_dict(state_dict)
        if self.consumed % (self.steps_per_epoch * self.global_batch_size):
            print(
                "WARNING data: a WebDataset pipeline cannot continue in the middle of an epoch; it starts anew, some "
                "samples are repeated and others missed. Exact: index the shards (`paperscale data index DIR`) and "
                "use ImageShards, TokenBlocks or TokenDocuments",
                file=sys.stderr,
                flush=True,
            )

    def check(self) -> None:
        """Look at nothing: only the pipeline knows what it reads."""

    def fill(
        self, shards: ShardSet, batch: Batch, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        """Is never called: the pipeline makes whole batches."""
        raise NotImplementedError

    def train_dataloader(self) -> OrderedLoader[Any, Batch]:
        """Return the training batches of this rank, to the end of the epoch."""
        rank, world_size = self._rank()
        size = self.steps_per_epoch * self.global_batch_size

        def batches() -> Iterator[Batch]:
            begin = self.consumed
            found = self._forever(self.splits["train"] or "train", rank, world_size)
            for step in range(1, (size - begin % size) // self.global_batch_size + 1):
                yield {**next(found), "cursor": Cursor(begin + step * self.global_batch_size, 1.0, True)}

        return OrderedLoader(batches, _Whole(), self.steps_per_epoch, Workers(threads=0))

    def accumulate(self, world_size: int) -> int:
        """Return 1: the pipeline's batches are what is trained on."""
        return 1

    def _forever(self, split: str, rank: int, world_size: int) -> Iterator[Batch]:
        checked = False
        while True:
            empty = True
            for batch in self.batches_of(split, rank, world_size):
                if not checked:
                    self._check_size(batch, world_size)
                checked, empty = True, False
                yield batch
            if empty:
                raise UserError(
                    f"the pipeline gives rank {rank} of {world_size} no batch of '{split}'; check its split"
                )

    def batches_of(self, split: str, rank: int, world_size: int) -> Iterator[Batch]:
        """Yield the pipeline's batches.

        Raises:
            UserError: it cannot be called, or gives something else.
        """
        where = f"data.pipeline={self.name}"
        try:
            found = iter(self.pipeline(split, rank, world_size, self.seed))
        except TypeError as error:
            raise UserError(
                f"{where}: {error}; it is called as function(split, rank, world_size, seed) and returns an iterable"
            ) from error
        for batch in found:
            if not isinstance(batch, dict):
                raise UserError(
                    f"{where} gives {type(batch).__name__}, not dictionaries of tensors; end it with a .map()"
                )
            yield batch

    def _check_size(self, batch: Batch, world_size: int) -> None:
        """Refuse batches that do not add up to what the recipe says is trained on."""
        size = next((len(value) for value in batch.values() if hasattr(value, "__len__")), 0)
        if size * world_size != self.global_batch_size:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size}, but the pipeline's batches of {size} on "
                f"{world_size} processes are {size * world_size}; set it to that, or change the pipeline"
            )

    def _eval_dataloader(self, stage: str) -> Any:
        split = self.splits[stage] or stage
        rank, world_size = self._rank()
        return OrderedLoader(lambda: self.batches_of(split, rank, world_size), _Whole(), None, Workers(threads=0))


class _Whole:
    """A reader of plans that are batches already."""

    def start(self, plan: Batch) -> _Whole:
        self.batch = plan
        return self

    parts: tuple[Callable[[], None], ...] = ()

    def finish(self) -> Batch:
        return self.batch

    def describe(self, plan: Batch) -> str:
        return "a WebDataset pipeline"


def find(name: str) -> Callable[..., Iterable[Batch]]:
    """Return the function that ``package.module:function`` names.

    Raises:
        UserError: there is none.
    """
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ValueError("no colon in it")
        found = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"data.pipeline={name}: {error}; write package.module:function") from error
    if not callable(getattr(found, function, None)):
        raise UserError(f"data.pipeline={name}: no function '{function}'{nearest(function, vars(found))}")
    return getattr(found, function)
