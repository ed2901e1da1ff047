"""``ShardStream``: what every DataModule of shards shares: position, order, division over ranks, faults, loaders.

A training batch is a dictionary that holds, beside what the model reads::

    sample  int64 [batch], the samples' numbers in their split
    cursor  where the stream stands, see :class:`Cursor`
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import zlib
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from paperscale.data.batching import Batches, BatchPlan, FixedBatches, Piece, even_batches
from paperscale.data.faults import FaultLog, SampleFault, Skipped
from paperscale.data.loader import OrderedLoader, Workers, cores
from paperscale.data.order import MixedOrder, Order, SampleOrder
from paperscale.data.ramp import RampedBatches, check_ramp
from paperscale.data.shards import MANIFEST, ShardSet
from paperscale.errors import UserError

Batch = dict[str, Any]

_UNDECODABLE = (ValueError, OSError, SyntaxError, EOFError, zlib.error)  # PIL has a SyntaxError for broken PNG
_PART = 16  # the least rows that a thread fills at a time
_MOST_THREADS = 16
_LOOK_AHEAD = 16  # batches whose samples a remote folder is asked for beforehand


class Cursor(NamedTuple):
    """Where the stream stands after a training batch.

    Attributes:
        consumed: samples consumed by the run once this batch is trained on: the whole state of the stream.
        weight: scale of the batch's loss, see :class:`~paperscale.data.batching.Piece`.
        last: whether the optimizer steps after this batch.
        skipped: samples of this batch that could not be read and are not in it.
    """

    consumed: int
    weight: float
    last: bool
    skipped: tuple[Skipped, ...] = ()


class ShardStream(LightningDataModule):
    """Streams samples from shards, the same ones at any world size, thread count and process count.

    Args:
        path: the set, as written by ``paperscale data prepare`` or adopted by ``paperscale data index``: a folder,
            or a URL (``https://``, ``s3://``). Several sets are trained on as one.
        global_batch_size: samples of one optimizer step over all ranks.
        micro_batch_size: the most samples of one forward pass on one rank; the gradient is accumulated over as
            many passes as that takes. By default one pass.
        eval_batch_size: samples of one forward pass in validation and test.
        train: split (or splits joined by ``+``) to train on.
        val: split to validate on; ``None`` for no validation.
        test: split to test on.
        seed: fixes the order and the augmentation; by default the run's ``seed_everything``.
        window: samples shuffled together.
        weights: with several sets: the share of each in every batch, exact; each set then has epochs of its own.
        epoch_samples: with ``weights``: samples of an epoch; by default those of all sets together.
        num_threads: threads that read and decode; 0 reads in the training thread; by default one for each core, or none
            for packed text where there is no GPU.
        num_processes: worker processes that do it instead, for transforms in plain Python.
        on_fault: what a damaged sample does: ``fail`` ends the run, ``skip`` goes on without it.
        max_skipped: with ``skip``: samples that may be skipped before the run ends.
        batch_ramp: smaller global batches at the beginning: pairs of a batch size and the number of samples that it is
            for, after which ``global_batch_size`` holds. The number of forward passes of a step stays the same.
    """

    threads_share_batches = True
    """Whether several threads fill a batch; where the work is Python's, one does it faster."""

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int,
        micro_batch_size: int | None = None,
        eval_batch_size: int = 250,
        train: str = "train",
        val: str | None = "val",
        test: str = "test",
        seed: int | None = None,
        window: int = 1 << 16,
        weights: list[float] | None = None,
        epoch_samples: int | None = None,
        num_threads: int | None = None,
        num_processes: int = 0,
        on_fault: str = "fail",
        max_skipped: int = 100,
        batch_ramp: list[tuple[int, int]] | None = None,
    ):
        super().__init__()
        at_least(1, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, window=window)
        at_least(1, eval_batch_size=eval_batch_size, epoch_samples=epoch_samples)
        at_least(0, num_threads=num_threads, num_processes=num_processes, max_skipped=max_skipped)
        if on_fault not in ("fail", "skip"):
            raise UserError(f"data.on_fault={on_fault}: choose fail or skip")
        if epoch_samples is not None and weights is None:
            raise UserError("data.epoch_samples is for mixtures: give data.weights too, or leave it out")
        self.paths = [path] if isinstance(path, str) else list(path)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.batch_ramp = check_ramp(batch_ramp or (), global_batch_size)
        self.passed_over: tuple[tuple[int, int], ...] = ()
        self.eval_batch_size = eval_batch_size
        self.splits = {"train": train, "val": val, "test": test}
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.window, self.weights, self.epoch_samples = window, weights, epoch_samples
        self.workers = Workers(self.default_threads() if num_threads is None else num_threads, num_processes)
        self.on_fault = on_fault
        self.consumed = 0
        self.faults, self.eval_faults = FaultLog(max_skipped), FaultLog(max_skipped)
        self._sets: dict[tuple[str, str], ShardSet] = {}
        self._total_steps: dict[int, int | None] = {}

    def default_threads(self) -> int:
        """Return the threads that read and decode where ``num_threads`` is not given: one for each core."""
        return min(cores(), _MOST_THREADS)

    def allocate(self, count: int, train: bool) -> Batch:
        """Return tensors for a batch of ``count`` samples, to be filled; the first dimension is the sample."""
        raise NotImplementedError

    def allocate_for(self, source: Source, places: Places, train: bool) -> Batch:
        """Return tensors for the given samples, where their size depends on which they are."""
        return self.allocate(len(places), train)

    mapped = True
    """Whether shards on a local disk are mapped into memory rather than read, see :mod:`~paperscale.data.files`."""

    @abstractmethod
    def fill(
        self, shards: ShardSet, batch: Batch, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        """Read one sample and decode it into row ``row`` of a batch. Called on several threads.

        Args:
            shards: the set that holds the sample.
            batch: what :meth:`allocate` returned.
            row: the sample's place in the batch.
            shard: the sample's shard.
            row_in_shard: its place in the shard.
            sample: its number in the split.
            epoch: of its augmentation; ``None`` for none.

        Raises:
            SampleFault: it cannot be read.
            ValueError: it does not decode.
        """

    def units(self, shards: ShardSet) -> Sequence[int]:
        """Return how many samples each shard holds, where a sample is not a WebDataset sample."""
        return shards.sizes

    def place_of(self, shards: ShardSet, shard: int, unit: int) -> tuple[int, int]:
        """Return the shard, and the row in it, that is read for a sample: its own, where a row is a sample."""
        return shard, unit

    def name_of(self, shards: ShardSet, shard: int, row_in_shard: int) -> str:
        """Return what to call a sample in a message: its key."""
        return shards.key(shard, row_in_shard)

    def fill_rows(self, source: Source, batch: Batch, rows: range, places: Places, train: bool) -> list[Skipped]:
        """Fill some rows of a batch; return those that could not be, in ``skip``."""
        skipped = []
        for row, of, shard, inside, sample, epoch in places.of(rows):
            shards = source.sets[of]
            try:
                try:
                    self.fill(shards, batch, row, shard, inside, sample, epoch if train else None)
                except _UNDECODABLE as error:
                    reason = f"does not decode: {error}"
                    raise SampleFault(shards.tar(shard), self.name_of(shards, shard, inside), reason) from error
            except SampleFault as fault:
                if self.on_fault == "fail":
                    raise
                skipped.append(Skipped(sample, fault.what))
        return skipped

    def clear(self, batch: Batch, row: int) -> None:
        """Make a row that could not be filled one that can be computed with."""
        for value in batch.values():
            value[row] = 0

    def assembled(self, batch: Batch, kept: torch.Tensor | None) -> Batch:
        """Return a filled batch as it is given to the model.

        Args:
            batch: what :meth:`allocate` returned, filled, and ``sample``.
            kept: numbers of the rows that could be read, int64; ``None`` where all could.
        """
        return batch if kept is None else {name: value[kept] for name, value in batch.items()}

    def full_batch(self, samples: int) -> Batch | None:
        """Return a batch of samples of the greatest size, where they differ in size; ``None`` where they do not."""
        return None

    # -- the stream's state: one integer, and what was skipped ---------------------------------------------

    def advance(self, cursor: Cursor) -> list[str]:
        """Move past a batch that was trained on; return what is new to say of damaged samples.

        Raises:
            UserError: too many samples have been skipped.
        """
        self.consumed = cursor.consumed
        return self.faults.record(cursor.skipped) if cursor.skipped else []

    def state_dict(self) -> dict[str, Any]:
        """Return the samples consumed and skipped over all ranks, and what the order was made from."""
        skipped = dict(self.faults.times)
        if self.on_fault == "skip" and torch.distributed.is_initialized():
            everyone: list[dict[int, int]] = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(everyone, skipped)
            for times in everyone:
                for sample, count in times.items():
                    skipped[sample] = max(skipped.get(sample, 0), count)
        return {"consumed": self.consumed, "skipped": skipped, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the samples that were consumed.

        Raises:
            UserError: the data, the seed or the batch size is not that of the checkpoint.
        """
        for name, now in self._identity().items():
            if state_dict.get(name) != now:
                raise UserError(
                    f"the checkpoint was made with data.{name}={state_dict.get(name)}, this run has {now}: its order "
                    f"of samples cannot be continued; restore {_OF.get(name, f'data.{name}')} or start a new run"
                )
        self.consumed = state_dict["consumed"]
        self.pass_over(self.passed_over)
        self.faults.times = dict(state_dict["skipped"])

    def pass_over(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Leave samples out of the training: ranges of consumed samples, from a batch's beginning to a batch's end."""
        self.passed_over = tuple(ranges)
        if ranges:
            self.consumed = self._plan().beyond(self.consumed)

    def _identity(self) -> dict[str, Any]:
        source = self.source("train")
        return {
            "seed": self.seed,
            "samples": len(self._base_order(source)),
            "content": source.fingerprint(),
            "window": self.window,
            "weights": self.weights,
            "global_batch_size": self.global_batch_size,
            "batch_ramp": self.batch_ramp or None,
        }

    # -- what a run must know before it starts -------------------------------------------------------------

    def shards(self, stage: str) -> ShardSet:
        """Return the shards of ``train``, ``val`` or ``test`` of the first set, opened once.

        Raises:
            UserError: the set or the split does not exist.
        """
        return self._set(self.paths[0], stage)

    def _set(self, path: str, stage: str) -> ShardSet:
        split = self.splits[stage]
        if split is None:
            raise UserError(f"data.{stage} is not set: name the split to use, for example data.{stage}={stage}")
        if (path, split) not in self._sets:
            self._sets[path, split] = ShardSet(path, split, mapped=self.mapped)
        return self._sets[path, split]

    def source(self, stage: str) -> Source:
        """Return the samples of ``train``, ``val`` or ``test``, over all sets.

        Raises:
            UserError: there are none.
        """
        if not self.paths:
            raise UserError("data.path names no set; give a folder or a URL")
        sets = [self._set(path, stage) for path in self.paths]
        return Source(sets, [self.units(shards) for shards in sets])

    def without_shards(self, channels: int = 3) -> tuple[ShardStream, list[str]]:
        """Return a copy that makes batches of the right shapes where sets are missing, and the paths of these.

        Args:
            channels: of images that are not there.

        Raises:
            UserError: a set is missing, and the recipe does not tell the shapes of its samples.
        """
        stream = copy.copy(self)
        missing = [path for path in self.paths if "://" not in path and not (Path(path) / MANIFEST).exists()]
        split = self.splits["train"] or "train"
        stream._sets = dict(self._sets) | {(path, split): self.stand_in(path, split, channels) for path in missing}
        return stream, missing

    def stand_in(self, path: str, split: str, channels: int) -> ShardSet:
        """Return what stands for a missing set, see :meth:`without_shards`."""
        raise UserError(
            f"no shards at {path}, and {type(self).__name__} does not tell the shapes of its samples without them; "
            "make them with `paperscale data prepare` or set data.path"
        )

    def check(self) -> None:
        """Look at every shard that the run will read, as far as the file system's own facts tell.

        Raises:
            UserError: one is missing or was replaced, and ``on_fault`` is not ``skip``.
        """
        for stage, split in self.splits.items():
            for path in self.paths if split is not None else []:
                problems = self._set(path, stage).check()
                if problems and self.on_fault == "fail":
                    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                    raise UserError(problems[0] + more)

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

    def halved(self, world_size: int) -> dict[str, int] | None:
        """Return attributes that halve the samples of a forward pass; ``None`` where it is one sample."""
        passes = world_size * self.accumulate(world_size)
        samples = -(-self.global_batch_size // passes)
        return {"micro_batch_size": -(-samples // 2)} if samples > 1 else None

    @property
    def epochs_differ(self) -> bool:
        """Return whether epochs have different numbers of batches that are known beforehand."""
        return bool(self.batch_ramp or self.passed_over)

    def total_steps(self, epochs: int) -> int | None:
        """Return the optimizer steps of the first ``epochs`` epochs; ``None`` where that is not known beforehand.

        What is passed over counts, so that a schedule is the same with and without it.
        """
        if epochs not in self._total_steps:
            _, batches = self._order_and_batches()
            steps = [batches.steps(epoch, 0, len(batches)) for epoch in range(epochs)]
            known = [count for count in steps if count is not None]
            self._total_steps[epochs] = sum(known) if len(known) == epochs else None
        return self._total_steps[epochs]

    def epoch_around(self, consumed: int) -> tuple[int, int]:
        """Return the samples consumed at the beginning and at the end of the epoch that ``consumed`` is in."""
        samples = len(self._order_and_batches()[1])
        first = consumed // samples * samples
        return first, first + samples

    def end_of_batch(self, start: int) -> int:
        """Return the samples consumed at the end of the global batch that begins after ``start`` of them."""
        _, batches = self._order_and_batches()
        epoch, position = divmod(start, len(batches))
        return start - position + batches.stop(epoch, position)

    def samples_between(self, start: int, stop: int) -> list[int]:
        """Return the samples that were consumed from ``start`` to ``stop``, which are of one epoch, as numbers."""
        order, _ = self._order_and_batches()
        epoch, first = divmod(start, len(order))
        return order.take(epoch, first, min(first + stop - start, len(order))).samples.tolist()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch's tensors; Lightning's own way takes everything apart that a batch holds, at every step."""
        if not isinstance(batch, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        moved = dict(batch)
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=device.type == "cuda")
            elif not isinstance(value, Cursor):
                moved[name] = super().transfer_batch_to_device(value, device, dataloader_idx)
        return moved

    # -- loaders -------------------------------------------------------------------------------------------

    def _base_order(self, source: Source) -> Order:
        if self.weights is None:
            return SampleOrder(source.sizes, seed=self.seed, window=self.window)
        orders = [SampleOrder(sizes, seed=self.seed, window=self.window) for sizes in source.units]
        return MixedOrder(orders, self.weights, self.epoch_samples)

    def batches(self, source: Source, order: Order) -> tuple[Order, Batches]:
        """Return how an order is cut into global batches, and the order in which their samples are taken."""
        if self.batch_ramp:
            return order, RampedBatches(len(order), self.global_batch_size, self.batch_ramp)
        return order, FixedBatches(len(order), self.global_batch_size)

    def _order_and_batches(self) -> tuple[Order, Batches]:
        source = self.source("train")
        return self.batches(source, self._base_order(source))

    def _plan(self, world_size: int = 1) -> BatchPlan:
        return BatchPlan(self._order_and_batches()[1], world_size, self.accumulate(world_size), self.passed_over)

    def train_dataloader(self) -> OrderedLoader[Piece, Batch]:
        """Return the training batches of this rank, from where the stream stands to the end of its epoch."""
        source = self.source("train")
        rank, world_size = self._rank()
        accumulate = self.accumulate(world_size)
        order, batches = self.batches(source, self._base_order(source))
        plan = BatchPlan(batches, world_size, accumulate, self.passed_over)
        reader = _Pieces(self, source, order)
        steps = plan.steps(self.consumed // len(order))

        def pieces() -> Iterator[Piece]:
            found = plan.pieces(rank, self.consumed)
            return reader.looked_ahead(found) if source.is_remote else found

        return OrderedLoader(pieces, reader, None if steps is None else steps * accumulate, self.workers)

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
        source = self.source(stage)
        order = SampleOrder(source.sizes, shuffle=False)
        ranges = even_batches(len(order), self.eval_batch_size, *self._rank())
        return OrderedLoader(lambda: ranges, _Ranges(self, source, order), len(ranges), self.workers)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def __getstate__(self) -> dict[str, Any]:  # for worker processes: they read, and have no trainer
        return {**self.__dict__, "trainer": None, "_sets": {}}


_OF = {"content": "the shards at data.path", "samples": "the shards at data.path"}


def at_least(least: int, **values: int | None) -> None:
    """Refuse numbers of the recipe that are too small; ``None`` is none.

    Raises:
        UserError: one is.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"data.{name} must be at least {least}, not {value}")


class Source:
    """The samples of one stage over all sets.

    Args:
        sets: the shards of each set.
        units: samples of each shard, for each set.
    """

    def __init__(self, sets: Sequence[ShardSet], units: Sequence[Sequence[int]]):
        self.sets, self.units = list(sets), [np.asarray(sizes, np.int64) for sizes in units]
        self.sizes = np.concatenate(self.units)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._zeros = np.zeros(1024, np.int64)
        self._first_shards = np.cumsum([0, *(len(sizes) for sizes in self.units)])

    @property
    def is_remote(self) -> bool:
        """Return whether any set is read from a server."""
        return any(hasattr(shards.tars, "prefetch") for shards in self.sets)

    def fingerprint(self) -> str:
        """Return what tells one content of the shards from another."""
        hashes = [shard.sha256 for shards in self.sets for shard in shards.shards]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return set, shard of that set and row inside that shard of each sample."""
        shards = self._starts.searchsorted(samples, side="right") - 1
        rows = samples - self._starts[shards]
        if len(self.sets) == 1:
            return self._zeros[: len(shards)] if len(shards) <= len(self._zeros) else shards * 0, shards, rows
        sets = self._first_shards.searchsorted(shards, side="right") - 1
        return sets, shards - self._first_shards[sets], rows


class Places:
    """Where the samples of a batch are.

    Args:
        source: the sets.
        samples: their numbers, int64 [batch].
        epochs: of their augmentation, int64 [batch].
    """

    def __init__(self, source: Source, samples: NDArray[np.int64], epochs: NDArray[np.int64]):
        self.samples, self.epochs = samples, epochs
        self.sets, self.shards, self.rows = source.locate(samples)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def of(self, rows: range) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield row, set, shard, row in the shard, number and epoch of some samples."""
        columns = (self.sets, self.shards, self.rows, self.samples, self.epochs)
        return zip(rows, *(column[rows.start : rows.stop].tolist() for column in columns), strict=True)


class _Filling:
    """One batch in preparation."""

    def __init__(self, stream: ShardStream, source: Source, places: Places, train: bool):
        self.stream, self.places = stream, places
        with torch.inference_mode(False):  # threads could not write to a tensor of an evaluation loop's inference mode
            self.batch = stream.allocate_for(source, places, train)
        self.skipped: list[Skipped] = []
        share = -(-len(places) // max(1, stream.workers.threads)) if stream.threads_share_batches else len(places)
        size = max(_PART, share)
        self.parts: list[Callable[[], None]] = [
            partial(self._fill, stream, source, range(start, min(start + size, len(places))), train)
            for start in range(0, len(places), size)
        ]

    def _fill(self, stream: ShardStream, source: Source, rows: range, train: bool) -> None:
        self.skipped += stream.fill_rows(source, self.batch, rows, self.places, train)

    def result(self) -> tuple[Batch, tuple[Skipped, ...]]:
        """Return the batch without the samples that could not be read, and those."""
        self.parts = []  # they refer to this object: the batch would live until the cycle is collected
        batch = {**self.batch, "sample": torch.from_numpy(self.places.samples.copy())}
        if not self.skipped:
            return self.stream.assembled(batch, None), ()
        bad = {fault.sample for fault in self.skipped}
        kept = torch.tensor([row for row, sample in enumerate(self.places.samples.tolist()) if sample not in bad])
        if not len(kept):  # a batch must hold something for the collectives that all ranks enter
            kept = torch.zeros(1, dtype=torch.int64)
            self.stream.clear(self.batch, 0)
        return self.stream.assembled(batch, kept), tuple(sorted(self.skipped))


class _Pieces:
    """Makes training batches of pieces."""

    def __init__(self, stream: ShardStream, source: Source, order: Order):
        self.stream, self.source, self.order = stream, source, order

    def start(self, piece: Piece) -> _Training:
        """Begin a batch."""
        # A rank with nothing left of a short batch still takes part in its collectives, with weight zero.
        stop = max(piece.stop, piece.start + 1)
        taken = self.order.take(piece.epoch, min(piece.start, len(self.order) - 1), stop)
        return _Training(self.stream, self.source, Places(self.source, *taken), piece)

    def describe(self, piece: Piece) -> str:
        """Return what is being read."""
        return f"samples {piece.start:,} to {piece.stop:,} of epoch {piece.epoch} from {', '.join(self.stream.paths)}"

    def looked_ahead(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Yield the pieces, with those that follow asked of the remote folder beforehand."""
        waiting: deque[Piece] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="paperscale-ahead")  # the indexes are fetched first
        try:
            for piece in pieces:
                pool.submit(self._ask_for, piece)
                waiting.append(piece)
                if len(waiting) > _LOOK_AHEAD:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask_for(self, piece: Piece) -> None:
        """Ask for a piece's samples; what goes wrong is said when they are read."""
        places = Places(self.source, *self.order.take(piece.epoch, piece.start, piece.stop))
        for number, shards in enumerate(self.source.sets):
            here = places.sets == number
            units = zip(places.shards[here].tolist(), places.rows[here].tolist(), strict=True)
            shards.prefetch(self.stream.place_of(shards, shard, unit) for shard, unit in units)


class _Training(_Filling):
    """A training batch in preparation."""

    def __init__(self, stream: ShardStream, source: Source, places: Places, piece: Piece):
        self.piece = piece
        super().__init__(stream, source, places, True)

    def finish(self) -> Batch:
        """Return the batch and where the stream stands after it."""
        batch, skipped = self.result()
        piece = self.piece
        weight = 0.0 if len(skipped) == len(self.places) else piece.weight
        return {**batch, "cursor": Cursor(piece.consumed, weight, piece.last, skipped)}


class _Ranges:
    """Makes evaluation batches of ranges of samples."""

    def __init__(self, stream: ShardStream, source: Source, order: SampleOrder):
        self.stream, self.source, self.order = stream, source, order

    def start(self, bounds: tuple[int, int]) -> _Evaluation:
        """Begin a batch."""
        return _Evaluation(self.stream, self.source, Places(self.source, *self.order.take(0, *bounds)))

    def describe(self, bounds: tuple[int, int]) -> str:
        """Return what is being read."""
        return f"samples {bounds[0]:,} to {bounds[1]:,} of {', '.join(self.stream.paths)}"


class _Evaluation(_Filling):
    """An evaluation batch in preparation."""

    def __init__(self, stream: ShardStream, source: Source, places: Places):
        self.stream = stream
        super().__init__(stream, source, places, False)

    def finish(self) -> Batch:
        """Return the batch; a score that leaves samples out says so.

        Raises:
            UserError: none of its samples could be read, or too many in all.
        """
        batch, skipped = self.result()
        for message in self.stream.eval_faults.record(skipped) if skipped else ():
            print(f"WARNING left out of the evaluation: {message}", file=sys.stderr, flush=True)
        if len(skipped) == len(self.places):
            raise UserError(f"no sample of an evaluation batch could be read: {skipped[0].message}")
        return batch
