"""Agreeing on the step at which all ranks save or stop, without a collective or a device sync on the step path.

A scheduler's signal reaches ranks at different times, or one rank only. The rank that has it writes the step
boundary at which to stop into the process group's key-value store, and every rank looks there now and then. That the
look comes in time follows from the steps' own collectives: a rank that has finished the gradient reduction before
boundary ``m + 1`` knows that every other rank has passed boundary ``m`` and written whatever it had to write there. On
a GPU the host runs ahead of the device; it is held to at most ``RUN_AHEAD`` steps, and the stop is set that much later.

A look is a question to rank 0's store, tens of microseconds. So that it is nothing beside the step, the ranks look at
every ``k``-th boundary only, with ``k`` such that half a second lies between two looks: rank 0 times the first steps
and publishes ``k``, and all ranks take it up at the same boundary. A stop is set to a boundary at which all look.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Literal, cast

import torch
from lightning.pytorch import Trainer
from torch.distributed import Store

from paperscale.training import pulse as pulses
from paperscale.training import signals
from paperscale.training.pulse import Pulse

RUN_AHEAD = 2
LOOK_S = 0.5
"""Seconds between two looks, at most; a step that takes longer is followed by a look of its own."""
MOST_STEPS = 64
_PUBLISH_AT, _TAKE_UP_AT, _IN_FORCE_AFTER = 16, 32, 40
"""Boundaries at which rank 0 publishes the steps between looks, at which all read them, and up to which all look."""
_KEY = "paperscale/agreed"
_EVERY = "paperscale/look_every"

Decision = Literal["", "save", "stop"]


class StopAgreement:
    """The step boundary at which the run is saved or stopped, the same on every rank.

    Args:
        store: shared by the ranks; ``None`` for a single process.
        on_gpu: whether the host may run ahead of the device.
        pulse: where the node's agent leaves the user's requests.
    """

    def __init__(self, store: Store | None, on_gpu: bool = False, pulse: Pulse | None = None):
        self.store, self.pulse = store, pulse
        self.run_ahead = RUN_AHEAD if on_gpu else 0
        self.reason = ""
        self.look_every = 1
        self._boundary = 0
        self._started = 0.0
        self._agreed: tuple[int, Decision] | None = None
        self._key = f"{_KEY}/0"
        self._boundaries: deque[torch.cuda.Event] = deque()

    def reached(self) -> Decision:
        """Return what all ranks do at this boundary. Call at every boundary between optimizer steps."""
        self._boundary += 1
        if self.run_ahead:
            self._bound_run_ahead()
        if self.store is not None and self._boundary <= _TAKE_UP_AT:
            self._choose_pace(self.store)
        if self._agreed is None and (proposal := self._proposal()):
            at, what, self.reason = proposal.split(" ", 2)
            self._agreed = int(at), cast(Decision, what)
        if self._agreed is None or self._boundary < self._agreed[0]:
            return ""
        decision = self._agreed[1]
        if decision == "save":  # the next agreement is under a key of its own
            self._agreed = None
            self._key = f"{_KEY}/{self._boundary}"
        return decision

    def _choose_pace(self, store: Store) -> None:
        """Time the first steps on rank 0; all ranks take up its choice at the same later boundary."""
        if self._boundary == 1:
            self._started = time.monotonic()
        elif self._boundary == _PUBLISH_AT and torch.distributed.get_rank() == 0:
            step_s = (time.monotonic() - self._started) / (_PUBLISH_AT - 1)
            store.set(_EVERY, str(max(1, min(MOST_STEPS, int(LOOK_S / max(step_s, 1e-9))))))
        elif self._boundary == _TAKE_UP_AT:
            self.look_every = int(store.get(_EVERY))

    def _proposal(self) -> str | None:
        """Return ``"<boundary> save|stop <reason>"`` of the first rank that was told to, if one was."""
        wish = self._wish()
        if self.store is None:
            return f"{self._boundary} {wish}" if wish else None
        if wish:
            mine = f"{self._earliest()} {wish}"
            if signals.received:
                mine += f" to rank {torch.distributed.get_rank()}"
            return self.store.compare_set(self._key, "", mine).decode()
        looks = self._boundary <= _IN_FORCE_AFTER or self._boundary % self.look_every == 0
        if looks and self.store.check([self._key]):
            return self.store.get(self._key).decode()
        return None

    def _earliest(self) -> int:
        """Return the first boundary at which every rank looks and will see what is written now."""
        soonest = self._boundary + 1 + self.run_ahead
        if soonest <= _IN_FORCE_AFTER:
            return soonest
        return -(-soonest // self.look_every) * self.look_every

    def _wish(self) -> str:
        """Return what this rank was told to do, and by whom."""
        if signals.received:
            return f"stop {signals.received.name}"
        requested = self.pulse.requested if self.pulse else pulses.NO_REQUEST
        if requested == pulses.SAVE and self.pulse:
            self.pulse.fulfilled()
            return "save request"
        return "stop request" if requested == pulses.STOP else ""

    def _bound_run_ahead(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self._boundaries.append(event)
        if len(self._boundaries) > self.run_ahead:
            self._boundaries.popleft().synchronize()


def take_over_signals(trainer: Trainer) -> None:
    """Keep Lightning's signal handlers and its per-step SIGTERM broadcast out of a run.

    Lightning enters a collective inside its SIGTERM handler, which deadlocks when the signal reaches ranks at
    different times, and since 2.5.2 broadcasts and reads back a flag on every step. Neither can be switched off by
    a public setting. Fails loudly should a new Lightning release have moved them.
    """
    connector, epoch_loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    for owner, name in ((connector, "register_signal_handlers"), (epoch_loop, "_broadcast_sigterm_tensor")):
        if not callable(getattr(owner, name, None)):
            raise RuntimeError(f"this release of Lightning has no {type(owner).__name__}.{name}; use lightning<2.7")
        setattr(owner, name, lambda: None)
