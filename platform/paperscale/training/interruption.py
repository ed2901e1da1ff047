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

import torch
from lightning.pytorch import Trainer
from torch.distributed import Store

from paperscale.training import signals

RUN_AHEAD = 2
_KEY = "paperscale/stop_at"


class StopAgreement:
    """The step at which the run is interrupted, the same on every rank.

    Args:
        store: shared by the ranks; ``None`` for a single process.
        on_gpu: whether the host may run ahead of the device.
    """

    def __init__(self, store: Store | None, on_gpu: bool = False):
        self.store = store
        self.run_ahead = RUN_AHEAD if on_gpu else 0
        self.stop_at: int | None = None
        self.reason = ""
        self._boundaries: deque[torch.cuda.Event] = deque()

    def reached(self, step: int) -> bool:
        """Return whether to stop at the boundary after ``step`` optimizer steps. Call at every boundary."""
        if self.run_ahead:
            self._bound_run_ahead()
        if self.stop_at is None and (proposal := self._proposal(step)):
            at, _, self.reason = proposal.partition(" ")
            self.stop_at = int(at)
        return self.stop_at is not None and step >= self.stop_at

    def _proposal(self, step: int) -> str | None:
        """Return ``"<step> <reason>"`` of the first rank that was told to stop, if one was."""
        if signals.received:
            if self.store is None:
                return f"{step} {signals.received.name}"
            mine = f"{step + 1 + self.run_ahead} {signals.received.name} to rank {torch.distributed.get_rank()}"
            return self.store.compare_set(_KEY, "", mine).decode()
        if self.store is not None and self.store.check([_KEY]):
            return self.store.get(_KEY).decode()
        return None

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
