"""Agreeing on the step at which all ranks stop, without a collective or a device sync on the step path.

A scheduler's signal reaches ranks at different times, or one rank only. The rank that has it writes the step at
which to stop into the process group's key-value store; every rank looks there at each step boundary (tens of
microseconds). That the look comes in time follows from the steps' own collectives: a rank that has finished the
gradient reduction of step ``m + 1`` knows that every other rank has begun that step, hence has passed boundary ``m``
and written whatever it had to write there. On a GPU the host runs ahead of the device; it is held to at most
``RUN_AHEAD`` steps, and the stop is set that much later.
"""

from __future__ import annotations

from collections import deque
from typing import Literal, cast

import torch
from lightning.pytorch import Trainer
from torch.distributed import Store

from paperscale.training import pulse as pulses
from paperscale.training import signals
from paperscale.training.pulse import Pulse

RUN_AHEAD = 2
_KEY = "paperscale/agreed"

Decision = Literal["", "save", "stop"]


class StopAgreement:
    """The step at which the run is saved or stopped, the same on every rank.

    Args:
        store: shared by the ranks; ``None`` for a single process.
        on_gpu: whether the host may run ahead of the device.
        pulse: where the node's agent leaves the user's requests.
    """

    def __init__(self, store: Store | None, on_gpu: bool = False, pulse: Pulse | None = None):
        self.store, self.pulse = store, pulse
        self.run_ahead = RUN_AHEAD if on_gpu else 0
        self.reason = ""
        self._agreed: tuple[int, Decision] | None = None
        self._key = f"{_KEY}/0"
        self._boundaries: deque[torch.cuda.Event] = deque()

    def reached(self, step: int) -> Decision:
        """Return what all ranks do at the boundary after ``step`` optimizer steps. Call at every boundary."""
        if self.run_ahead:
            self._bound_run_ahead()
        if self._agreed is None and (proposal := self._proposal(step)):
            at, what, self.reason = proposal.split(" ", 2)
            self._agreed = int(at), cast(Decision, what)
        if self._agreed is None or step < self._agreed[0]:
            return ""
        decision = self._agreed[1]
        if decision == "save":  # the next agreement is under a key of its own
            self._agreed = None
            self._key = f"{_KEY}/{step}"
        return decision

    def _proposal(self, step: int) -> str | None:
        """Return ``"<step> save|stop <reason>"`` of the first rank that was told to, if one was."""
        wish = self._wish()
        if self.store is None:
            return f"{step} {wish}" if wish else None
        if wish:
            mine = f"{step + 1 + self.run_ahead} {wish}"
            if signals.received:
                mine += f" to rank {torch.distributed.get_rank()}"
            return self.store.compare_set(self._key, "", mine).decode()
        return self.store.get(self._key).decode() if self.store.check([self._key]) else None

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
