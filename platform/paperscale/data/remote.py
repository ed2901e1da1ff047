"""``RemoteFolder``: shards on a server, read by ranges through a cache on the node's own disk.

Only what is read is fetched, in blocks; what is in the cache is read as fast as a local file: a view of the page
cache, without a lock or a request. The processes of a node share the cache (:mod:`~paperscale.data.blockcache`).
"""

from __future__ import annotations

import logging
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from paperscale.data.blockcache import ABSENT, CLAIMED, BlockCache, CachedShard, default_folder
from paperscale.data.faults import RemoteError
from paperscale.data.transport import Replaced, Transient, Version, connect, shown
from paperscale.errors import UserError

T = TypeVar("T")
_REQUEST_BYTES = 4 << 20
_THREADS = 8
_OPEN_SHARDS = 128
_LOOK_S, _LOOKS_PER_USE = 0.1, 5
_LONGEST_PAUSE_S = 30.0
_log = logging.getLogger(__name__)


class _Run(NamedTuple):
    """Adjacent blocks of a shard that one request fetches."""

    first: int
    stop: int
    done: Future[None]


class RemoteFile(NamedTuple):
    """A shard in a :class:`RemoteFolder`."""

    folder: RemoteFolder
    name: str

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Return bytes of the shard, see :meth:`RemoteFolder.read`."""
        return self.folder.read(self.name, offset, size)


class RemoteFolder:
    """A folder of files behind a URL. Any thread may call any method; pickled, it is opened anew.

    Every wait has an end: a request is given up after ``timeout_s``, and an operation after ``retries`` more of them
    with growing pauses in between (0.1 s, then four times as long each, 30 s at the most).

    Args:
        url: ``https://host/set``, ``s3://bucket/set``, or what else fsspec knows.
        cache: folder of the cache; by default ``$PAPERSCALE_CACHE``, else one on the node's disk for the job.
        cache_bytes: bytes that the cache folder may hold, for all sets and processes together; 256 blocks at least.
            Shards that make room while a process is reading from them give it back when it moves on: where all that
            is read at one time does not fit, the disk may hold more than this for moments.
        block_bytes: bytes that are fetched and kept together.
        timeout_s: the longest that one request, of at most 4 MiB, may take.
        retries: further attempts of a request that failed for a reason that may pass.

    Raises:
        UserError: the URL or an argument is wrong. Methods raise :class:`~paperscale.data.faults.RemoteError`, a
            UserError, where the server fails for longer than the attempts last, refuses, cannot give ranges, or has
            replaced a file since this folder first looked at it; it is a FileNotFoundError where there is none.
    """

    def __init__(
        self,
        url: str,
        cache: str | Path | None = None,
        cache_bytes: int = 32 << 30,
        block_bytes: int = 256 << 10,
        timeout_s: float = 60,
        retries: int = 5,
    ):
        self._arguments = (url, cache, cache_bytes, block_bytes, timeout_s, retries)
        if cache_bytes < 256 * block_bytes:
            raise UserError(f"cache_bytes={cache_bytes} holds too few blocks; make it {256 * block_bytes} at least")
        self._shown = shown(url)
        self._request_bytes = min(_REQUEST_BYTES, cache_bytes // 256)  # what is under way must not break the bound
        self._block_bytes, self._retries = block_bytes, retries
        self._patience_s = (retries + 1) * (2 * timeout_s + _LONGEST_PAUSE_S)
        self._transport = connect(url, timeout_s)
        self._cache = BlockCache(Path(cache or default_folder()), url, cache_bytes, block_bytes)
        self._workers = _Workers(_THREADS, cache_bytes // 16 // block_bytes)
        self._versions: dict[str, Version] = {}
        self._shards: dict[str, CachedShard] = {}
        self._asking: dict[str, Future[None]] = {}
        self._fetching: dict[tuple[str, int], Future[None]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None
        weakref.finalize(self, self._workers.close)
        weakref.finalize(self, self._closed.set)

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[object, ...]]:
        return RemoteFolder, self._arguments

    def __str__(self) -> str:
        return self._shown

    def close(self) -> None:
        """Stop fetching ahead, and let go of the cache's files; what was read from it stays valid."""
        self._closed.set()
        self._workers.close()
        with self._lock:
            self._shards.clear()

    # -- what a set is read by -----------------------------------------------------------------------------

    def read_file(self, name: str) -> bytes:
        """Return a small file; the server is asked whether the one in the cache is still the same."""
        tag, content = self._cache.load(name)
        found, new = self._persist(name, lambda: self._transport.whole(name, tag))
        if new is None:
            return content
        if found:
            self._cache.save(name, found, new)
        return new

    def size(self, name: str) -> int:
        """Return a file's size in bytes; asks the server once."""
        return self._version(name).size

    def open(self, name: str) -> RemoteFile:
        """Return a shard, once the server has said that it is there and can be read in parts."""
        self._version(name)
        return RemoteFile(self, name)

    def read(self, name: str, offset: int, size: int) -> bytes | memoryview:
        """Return bytes of a file, fewer where it ends before; a view where the cache has them."""
        shard = self._shards.get(name) or self._open_shard(name)
        if shard is None:
            return self._read_past_cache(name, offset, size)
        size = max(0, min(size, shard.size - offset))
        shard.used = True
        first, stop = shard.blocks(offset, size)
        if shard.present(first, stop):
            return shard.view(offset, size)
        if not self._cache.paused:
            self._fetch_missing(name, shard, first, stop)
            if shard.present(first, stop):
                return shard.view(offset, size)
        return self._read_past_cache(name, offset, size)

    def prefetch(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Fetch what will be read next into the cache, in the background; returns at once.

        What is queued is bounded by 1/16 of the cache; what goes beyond is fetched when it is read.

        Args:
            ranges: name, offset and size of each part, in the order of reading.
        """
        for _, name, first, stop in sorted(self._runs(ranges)):
            shard = self._shards.get(name)
            if shard is None or not shard.present(first, stop):
                self._workers.submit(partial(self._fetch_ahead, name, first, stop), stop - first)

    def forget(self, name: str, offset: int, size: int) -> None:
        """Drop a range from the cache, because its content is wrong, and ask whether the file is still the same."""
        known = self._version(name)
        if self._persist(name, lambda: self._transport.stat(name)) != known:
            raise Replaced(self._transport.url(name))
        if (shard := self._shards.get(name) or self._open_shard(name)) is not None:
            shard.mark(*shard.blocks(offset, max(0, min(size, shard.size - offset))), ABSENT)

    # -- requests ------------------------------------------------------------------------------------------

    def _version(self, name: str) -> Version:
        """Return which version of a file this folder reads; one thread asks, the others wait for it."""
        if name in self._versions:
            return self._versions[name]
        with self._lock:
            future = self._asking.get(name)
            if asks := future is None:
                future = self._asking[name] = Future()
        if asks:
            try:
                self._versions[name] = self._persist(name, lambda: self._transport.stat(name))
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)
            with self._lock:
                del self._asking[name]
        self._wait(name, [future])
        return self._versions[name]

    def _wait(self, name: str, futures: Iterable[Future[None]]) -> None:
        try:
            for future in futures:
                future.result(self._patience_s)
        except FutureTimeout as error:
            fix = "check the network between this node and the server, then run it again"
            raise RemoteError(f"{self._transport.url(name)}: nothing came in {self._patience_s:g} s; {fix}") from error

    def _fetch(self, name: str, offset: int, size: int) -> bytearray:
        """Return a range from the server; a further attempt goes on where the one before broke off."""
        version, content = self._version(name), bytearray()

        def attempt() -> None:
            if len(content) < size:
                for piece in self._transport.stream(name, version, offset + len(content), size - len(content)):
                    content.extend(piece)
            if (came := len(content)) != size:
                del content[0 if came > size else came :]
                raise Transient(f"{came} of {size} bytes came", "check the server's log")

        self._persist(name, attempt)
        return content

    def _persist(self, name: str, attempt: Callable[[], T]) -> T:
        """Attempt a request until it succeeds, or fails for good."""
        url, number = self._transport.url(name), 0
        while not self._closed.is_set():
            try:
                return attempt()
            except Transient as failure:
                number += 1
                if number > self._retries:
                    raise RemoteError(
                        f"{url}: {failure}, in {number} attempts; {failure.fix}, then run it again"
                    ) from failure
                if number > 1:
                    _log.warning("%s: %s; attempt %d of %d failed", url, failure, number, self._retries + 1)
                # Half of the pause is drawn, so that the ranks that failed together do not come back together.
                pause = 0.1 * 4 ** (number - 1) * (0.5 + 0.5 * random.SystemRandom().random())
                self._closed.wait(min(max(pause, failure.wait_s), _LONGEST_PAUSE_S))
        raise RemoteError(f"{self._shown} was closed; open it again to read from it")

    def _read_past_cache(self, name: str, offset: int, size: int) -> bytes:
        size = max(0, min(size, self._version(name).size - offset))
        parts = range(offset, offset + size, self._request_bytes)
        return b"".join(self._fetch(name, part, min(self._request_bytes, offset + size - part)) for part in parts)

    # -- the cache -----------------------------------------------------------------------------------------

    def _open_shard(self, name: str) -> CachedShard | None:
        """Open a shard's file in the cache; ``None`` where the disk is full."""
        version = self._version(name)
        if self._cache.paused or (shard := self._cache.open(name, version)) is None:
            return None
        with self._lock:
            if len(self._shards) >= _OPEN_SHARDS:  # who still reads from one keeps it open
                idle = [other for other, open_ in self._shards.items() if not open_.used]
                del self._shards[next(iter(idle or self._shards))]
            if self._keeper is None:
                self._keeper = threading.Thread(target=_keep, args=(weakref.ref(self), self._closed), daemon=True)
                self._keeper.start()
            return self._shards.setdefault(name, shard)

    def _look(self) -> None:
        """Close the files that were evicted, whose room only then comes back, and note which ones are in use."""
        with self._lock:
            for name, shard in list(self._shards.items()):
                if not shard.keep():
                    del self._shards[name]

    def _fetch_missing(self, name: str, shard: CachedShard, first: int, stop: int) -> None:
        """Fetch the missing ones of these blocks, or wait for the threads that are at it."""
        with self._lock:
            missing = list(shard.missing(first, stop, claimed=True))
            others = {self._fetching[name, block] for block in missing if (name, block) in self._fetching}
            runs = self._start(name, [block for block in missing if (name, block) not in self._fetching])
        todo = deque(runs)
        for _ in runs[1:]:  # this thread takes part: it depends on no other, however many are at work elsewhere
            self._workers.submit(partial(self._fetch_runs, name, shard, todo))
        self._fetch_runs(name, shard, todo)
        self._wait(name, [*(run.done for run in runs), *others])

    def _fetch_ahead(self, name: str, first: int, stop: int) -> None:
        shard = self._shards.get(name) or self._open_shard(name)
        if shard is None or self._cache.paused:
            return
        with self._lock:
            free = [b for b in shard.missing(first, stop, claimed=False) if (name, b) not in self._fetching]
            runs = self._start(name, free)
        for run in runs:
            shard.mark(run.first, run.stop, CLAIMED)
        self._fetch_runs(name, shard, deque(runs))

    def _start(self, name: str, blocks: Sequence[int]) -> list[_Run]:
        """Note that the caller fetches these blocks, grouped into requests; the lock is held."""
        runs = [_Run(*bounds, Future()) for bounds in self._group(blocks)]
        for run in runs:
            self._fetching.update(((name, block), run.done) for block in range(run.first, run.stop))
        return runs

    def _fetch_runs(self, name: str, shard: CachedShard, todo: deque[_Run]) -> None:
        while True:
            try:
                run = todo.popleft()
            except IndexError:  # other threads have taken the rest
                return
            self._fetch_run(name, shard, run)

    def _fetch_run(self, name: str, shard: CachedShard, run: _Run) -> None:
        """Fetch blocks into the cache and tell who waits for them; they get the error, if any."""
        offset = run.first * self._block_bytes
        try:
            content = self._fetch(name, offset, min(run.stop * self._block_bytes, shard.size) - offset)
            self._cache.store(shard, run.first, content)
            if self._cache.evicted():
                self._look()
            run.done.set_result(None)
        except BaseException as error:
            run.done.set_exception(error)
            if not isinstance(error, Exception):
                raise
        finally:
            if not shard.present(run.first, run.stop):
                shard.unclaim(run.first, run.stop)
            with self._lock:
                for block in range(run.first, run.stop):
                    self._fetching.pop((name, block), None)

    def _runs(self, ranges: Iterable[tuple[str, int, int]]) -> Iterable[tuple[int, str, int, int]]:
        """Yield the place in ``ranges`` where a request is first needed, the name, the first block and the stop."""
        wanted: dict[str, dict[int, int]] = {}
        for place, (name, offset, size) in enumerate(ranges):
            places = wanted.setdefault(name, {})
            for block in range(offset // self._block_bytes, -(-(offset + size) // self._block_bytes)):
                places.setdefault(block, place)
        for name, places in wanted.items():
            for first, stop in self._group(sorted(places)):
                yield min(places[block] for block in range(first, stop)), name, first, stop

    def _group(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Return the runs of adjacent blocks, as first and stop, each what one request fetches at the most."""
        runs: list[tuple[int, int]] = []
        for block in blocks:
            if runs and runs[-1][1] == block and (block - runs[-1][0] + 1) * self._block_bytes <= self._request_bytes:
                runs[-1] = (runs[-1][0], block + 1)
            else:
                runs.append((block, block + 1))
        return runs


def _keep(folder: weakref.ref[RemoteFolder], closed: threading.Event) -> None:
    """Look after the open files, also while nothing is read: an idle process must not hold on to evicted ones."""
    rounds = 0
    while not closed.wait(_LOOK_S):
        if (remote := folder()) is None:
            return
        rounds += 1
        if remote._cache.evicted() or rounds % _LOOKS_PER_USE == 0:
            remote._look()
        del remote


class _Workers:
    """Threads that fetch; they never keep a process from ending.

    Args:
        count: threads; started when there is work.
        room: the weight that may be queued.
    """

    def __init__(self, count: int, room: int):
        self._count, self._room = count, max(1, room)
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._threads: list[threading.Thread] = []
        self._queued = self._idle = 0
        self._changed = threading.Condition()
        self._open = True

    def submit(self, job: Callable[[], None], weight: int = 0) -> None:
        """Queue a job, unless there is no room for its weight; one without weight goes to the front."""
        with self._changed:
            if not self._open or (weight and self._queued + weight > self._room):
                return
            if weight:
                self._jobs.append((job, weight))
            else:
                self._jobs.appendleft((job, 0))
            self._queued += weight
            if len(self._jobs) > self._idle and len(self._threads) < self._count:
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
            self._changed.notify()

    def close(self) -> None:
        """Drop what is queued and end the threads after the jobs they are at."""
        with self._changed:
            self._open = False
            self._jobs.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and self._open:
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                if not self._open:
                    return
                job, weight = self._jobs.popleft()
                self._queued -= weight
            try:
                job()
            except (UserError, OSError) as error:  # whoever reads this part gets the error itself
                _log.debug("fetching ahead: %s", error)
            del job  # an idle thread must not keep a folder alive
