"""Signals only raise a flag (contract 4). Imports nothing heavy: it is installed before anything else.

The default action of SIGUSR1 and SIGTERM ends a process, whether it imports, trains or has just finished. From
:func:`install` to the process's end they do nothing but set :data:`received`.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

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


def ignore() -> None:
    """Ignore the signals: the outcome is decided, only the exit is left."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
