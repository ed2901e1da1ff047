"""How a process keeps its memory. Standard library only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
_MOST = 1 << 25  # that M_MMAP_THRESHOLD takes, and grows to by itself
_SMALL = 1 << 20


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees, for the next one.

    By default glibc gives freed memory back at once, and the kernel clears each page of it at the next step's first
    touch: about a tenth of the time of ResNet-20's step on a CPU. What is set in the environment stays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt is not None and not {"MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        mallopt(_MMAP_THRESHOLD, _MOST)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Give blocks of a megabyte and more back to the system when they are freed.

    Else, where small tensors that stay are made between large ones that go, as when a model is divided, the process
    grows to the size of the undivided model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _MOST)
