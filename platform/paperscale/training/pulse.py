"""A rank's pulse: what it is doing, in memory that the node's agent sees. Standard library only.

Written at every event of the training loop without a system call (about a microsecond), and once a second by a
thread, whose beat tells a process that waits from one that does not run. The agent (:mod:`paperscale.jobs.agent`)
reads it to notice a rank that hangs, and writes requests of the user into it.
"""

from __future__ import annotations

import mmap
import os
import statistics
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass

ENVIRONMENT = "PAPERSCALE_PULSE"
"""``<file descriptor>:<slot>`` of this rank, set by the agent."""
LISTEN = "PAPERSCALE_LISTEN"
"""Descriptor of the listening socket that the agent has opened for rank 0's store."""

PHASES = ("starting", "data", "forward", "backward", "validation", "test", "checkpoint", "ending")
"""What a rank is doing; of a training step in the order of the step: the rank that is behind is the one waited for."""
SLOW_PHASES = ("starting", "checkpoint", "ending")
"""Phases that last as long as a file system or a compiler takes."""
WARM_UP = 3
"""Events of a phase that may take long: compilation, the first read, the first collective."""

_FORMAT = struct.Struct("<qqqdddddd")
_REQUEST = struct.Struct("<q")
_BEAT_AT, _LONGEST_AT, _MEDIANS_AT = 32, 40, 48
SLOT_BYTES = 128
_REQUEST_AT = 120
NO_REQUEST, SAVE, STOP = 0, 1, 2


@dataclass(frozen=True)
class Reading:
    """A slot's content. Times are of the node's monotonic clock.

    Attributes:
        step: optimizer steps.
        phase: one of :data:`PHASES`.
        warm: whether the phase has had its slow first events.
        since: time of the last event.
        beat: time of the last beat; 0 before the first.
        longest_s: longest time between two events of warm phases.
        step_s: median seconds of a micro-step.
        local_s: median seconds of a micro-step before its first wait for other ranks: its data and forward pass.
        data_s: median seconds of a micro-step that were spent waiting for data.
    """

    step: int
    phase: str
    warm: bool
    since: float
    beat: float
    longest_s: float
    step_s: float
    local_s: float
    data_s: float


class Slots:
    """The pulses of a node's ranks.

    Args:
        file: descriptor of a file of ``count`` slots.
        count: ranks.
    """

    def __init__(self, file: int, count: int):
        self.memory = mmap.mmap(file, count * SLOT_BYTES)

    def read(self, slot: int) -> Reading:
        """Return what a rank has written."""
        step, phase, warm, *times = _FORMAT.unpack_from(self.memory, slot * SLOT_BYTES)
        return Reading(step, PHASES[phase], bool(warm), *times)

    def request(self, slot: int, what: int) -> None:
        """Ask a rank to save or to stop at the next step boundary."""
        _REQUEST.pack_into(self.memory, slot * SLOT_BYTES + _REQUEST_AT, what)


class Pulse:
    """The writing side of a slot.

    Args:
        memory: of the slots; ``None`` keeps the pulse to this process, where no agent watches.
        slot: this rank's.
    """

    def __init__(self, memory: mmap.mmap | None = None, slot: int = 0):
        self._memory = memory or mmap.mmap(-1, SLOT_BYTES)
        self._at = slot * SLOT_BYTES if memory else 0
        self._counts = [0] * len(PHASES)
        self._step = self._phase = 0
        self._since = time.monotonic()
        self._longest = 0.0
        self._micro_steps: deque[tuple[float, float, float]] = deque(maxlen=64)
        self._stopped = threading.Event()
        self._write()

    @classmethod
    def from_environment(cls) -> Pulse:
        """Return this rank's pulse, and begin to beat where an agent watches."""
        given = os.environ.get(ENVIRONMENT)
        if not given:
            return cls()
        file, slot = map(int, given.split(":"))
        pulse = cls(mmap.mmap(file, (slot + 1) * SLOT_BYTES), slot)
        threading.Thread(target=pulse._beat, name="pulse", daemon=True).start()
        return pulse

    def mark(self, phase: str, step: int | None = None) -> None:
        """Note an event: the rank now enters ``phase``, after ``step`` optimizer steps."""
        now, index = time.monotonic(), PHASES.index(phase)
        gap = now - self._since
        if gap > self._longest and self._is_warm():
            self._longest = gap
        self._counts[index] += 1
        self._since, self._phase = now, index
        if step is not None:
            self._step = step
        self._write()

    def measured(self, step_s: float, local_s: float, data_s: float) -> None:
        """Note how long a micro-step took, see :class:`Reading`."""
        self._micro_steps.append((step_s, local_s, data_s))

    @property
    def requested(self) -> int:
        """Return what the agent asks for."""
        return int(_REQUEST.unpack_from(self._memory, self._at + _REQUEST_AT)[0])

    def fulfilled(self) -> None:
        """Take the request back."""
        _REQUEST.pack_into(self._memory, self._at + _REQUEST_AT, NO_REQUEST)

    def _is_warm(self) -> bool:
        return self._counts[self._phase] > WARM_UP and PHASES[self._phase] not in SLOW_PHASES

    def _write(self) -> None:
        values = (self._step, self._phase, self._is_warm(), self._since)
        struct.pack_into("<qqqd", self._memory, self._at, *values)
        struct.pack_into("<d", self._memory, self._at + _LONGEST_AT, self._longest)

    def _beat(self) -> None:
        """Beat once a second; the medians are worked out here, off the step's path."""
        while not self._stopped.wait(1.0):
            struct.pack_into("<d", self._memory, self._at + _BEAT_AT, time.monotonic())
            if recent := list(self._micro_steps):
                medians = (statistics.median(values) for values in zip(*recent, strict=True))
                struct.pack_into("<ddd", self._memory, self._at + _MEDIANS_AT, *medians)
