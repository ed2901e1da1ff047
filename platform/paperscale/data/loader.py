"""Delivering batches in order, prepared ahead on threads or by worker processes.

Reading, checksums and image decoders release the interpreter lock, so threads do the work of worker processes
without copying batches between processes, and several threads fill one batch. The batches do not depend on either.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from paperscale.errors import UserError

Plan = TypeVar("Plan")
Batch = TypeVar("Batch")
Plan_ = TypeVar("Plan_", contravariant=True)
Batch_ = TypeVar("Batch_", covariant=True)


class Job(Protocol[Batch_]):
    """One batch in preparation."""

    @property
    def parts(self) -> Sequence[Callable[[], None]]:
        """What fills the batch, each its own rows; they run in any order, on several threads at once."""

    def finish(self) -> Batch_:
        """Return the batch, once all parts have run."""


class Reader(Protocol[Plan_, Batch_]):
    """Makes batches of plans."""

    def start(self, plan: Plan_) -> Job[Batch_]:
        """Begin a batch: allocate it and divide the work."""

    def describe(self, plan: Plan_) -> str:
        """Return what is being read, for an error."""


@dataclass(frozen=True)
class Workers:
    """Who prepares batches.

    Attributes:
        threads: threads of this process; 0 prepares each batch when it is asked for.
        processes: worker processes instead, for transforms that hold the interpreter lock.
        ahead: batches in preparation beside the one in use; for each worker process, if there are any.
        timeout_s: seconds after which a batch that does not come is an error.
    """

    threads: int = 1
    processes: int = 0
    ahead: int = 2
    timeout_s: float = 600.0


class OrderedLoader(Generic[Plan, Batch]):
    """An iterable of batches, one for each plan, in the plans' order.

    Args:
        plans: called at every ``iter()``: what to prepare, from wherever the stream stands by then.
        reader: makes the batches; with worker processes it is pickled.
        length: batches that a whole pass yields (a pass that begins in the middle yields fewer); ``None`` where that
            is not known beforehand.
        workers: who prepares them.
    """

    def __init__(
        self,
        plans: Callable[[], Iterable[Plan]],
        reader: Reader[Plan, Batch],
        length: int | None,
        workers: Workers | None = None,
    ):
        self.plans, self.reader, self.length = plans, reader, length
        self.workers = workers or Workers()

    def __len__(self) -> int:
        """Return the number of batches of a whole pass.

        Raises:
            TypeError: it is not known beforehand.
        """
        if self.length is None:
            raise TypeError("batches are cut by tokens: their number differs between epochs")
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        if self.workers.processes:
            return self._by_processes()
        return self._by_threads() if self.workers.threads else self._here()

    def _here(self) -> Iterator[Batch]:
        for plan in self.plans():
            yield prepare(self.reader, plan)

    def _by_threads(self) -> Iterator[Batch]:
        waiting: deque[tuple[Plan, Job[Batch], list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.workers.threads, thread_name_prefix="paperscale-data")
        try:
            for plan in self.plans():
                job = self.reader.start(plan)
                waiting.append((plan, job, [pool.submit(part) for part in job.parts]))
                if len(waiting) > self.workers.ahead:
                    yield self._finished(*waiting.popleft())
            while waiting:
                yield self._finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _finished(self, plan: Plan, job: Job[Batch], parts: list[Future[None]]) -> Batch:
        for part in parts:
            try:
                part.result(self.workers.timeout_s)
            except FutureTimeout as error:
                raise UserError(
                    f"no batch for {self.workers.timeout_s:g} s, while reading {self.reader.describe(plan)}: the file "
                    "system or server does not answer; check it, then resume the run"
                ) from error
        return job.finish()

    def _by_processes(self) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        loader: DataLoader[Any] = DataLoader(
            _Prepared(self.reader),  # type: ignore[arg-type]
            sampler=_Plans(self.plans),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers.processes,
            prefetch_factor=self.workers.ahead,
            timeout=self.workers.timeout_s,
            multiprocessing_context=multiprocessing.get_context("forkserver"),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(reader: Reader[Plan, Batch], plan: Plan) -> Batch:
    """Return the batch of a plan, prepared here and now."""
    job = reader.start(plan)
    for part in job.parts:
        part()
    return job.finish()


def _as_it_is(batch: Any) -> Any:
    return batch


class _Prepared:
    """A data set, to torch's loader, whose items are the batches of plans."""

    def __init__(self, reader: Reader[Any, Any]):
        self.reader = reader

    def __getitem__(self, plan: Any) -> Any:
        try:
            return prepare(self.reader, plan)
        except UserError as error:  # torch would wrap it into a traceback
            return error


class _Plans:
    """A sampler, to torch's loader, that draws plans."""

    def __init__(self, plans: Callable[[], Iterable[Any]]):
        self.plans = plans

    def __iter__(self) -> Iterator[Any]:
        return iter(self.plans())
