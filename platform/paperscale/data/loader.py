"""Delivering batches in order, prepared ahead on threads.

Reading, checksums and image decoders release the interpreter lock, so threads do the work of worker processes
without copying batches between processes. The batches do not depend on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Plan = TypeVar("Plan")
Batch = TypeVar("Batch")

_AHEAD = 2  # batches in preparation per thread


class OrderedLoader(Generic[Plan, Batch]):
    """An iterable of batches, one for each plan, in the plans' order.

    Args:
        plans: called at every ``iter()``: what to prepare, from wherever the stream stands by then.
        prepare: makes one batch; called on several threads at once.
        length: batches that a whole pass yields (a pass that begins in the middle yields fewer).
        num_threads: threads that prepare batches; 0 prepares each batch when it is asked for.
    """

    def __init__(
        self,
        plans: Callable[[], Iterable[Plan]],
        prepare: Callable[[Plan], Batch],
        length: int,
        num_threads: int = 1,
    ):
        self.plans, self.prepare, self.length, self.num_threads = plans, prepare, length, num_threads

    def __len__(self) -> int:
        """Return the number of batches of a whole pass."""
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        if self.num_threads == 0:
            yield from map(self.prepare, self.plans())
            return
        waiting: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="paperscale-data")
        try:
            for plan in self.plans():
                waiting.append(pool.submit(self.prepare, plan))
                if len(waiting) > _AHEAD * self.num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
