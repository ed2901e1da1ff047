"""Signals only raise a flag (contract 4). Imports nothing heavy: it is installed before anything else.

The default action of SIGUSR1 and SIGTERM ends a process, whether it imports, trains or has just finished. From
:func:`install` to the process's end they do nothing but set :data:`received`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_PR_SET_PDEATHSIG = 1

received: signal.Signals | None = None
"""The first signal that came, if any."""


def _raise_flag(number: int, frame: FrameType | None) -> None:
    global received
    if number == signal.SIGINT:  # a person pressed Ctrl-C
        if received is not None:
            os._exit(128 + number)
        os.write(2, b"\nstopping after this step; Ctrl-C again abandons what is not in a checkpoint\n")
    received = received or signal.Signals(number)


def install() -> None:
    """Let the signals of schedulers and people raise the flag, and nothing else."""
    for number in SIGNALS:
        signal.signal(number, _raise_flag)


def end_with_parent(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when the process that has started it ends (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def ignore() -> None:
    """Ignore the signals: the outcome is decided, only the exit is left."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
