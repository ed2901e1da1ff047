"""What Lightning does at every step for nobody, and how a run does without it.

Lightning calls each hook of a step on each callback and on the module, whether or not they have anything to do there,
profiles each call, though nothing is to be profiled, and asks Python for the signature of ``training_step`` each time.
That is some 300 microseconds of a step with a few callbacks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.profilers import PassThroughProfiler

_NOTHING = contextlib.nullcontext()
_HOOKS_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class NoProfiler(PassThroughProfiler):
    """Profiles nothing, and makes nothing for each call that it does not profile."""

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Return a context that does nothing."""
        return _NOTHING


def make_lean(callbacks: Iterable[Callback], module: LightningModule) -> None:
    """Leave out of a step the hooks that do nothing: Lightning passes over those that cannot be called.

    Args:
        callbacks: of the run.
        module: of the run.
    """
    for callback in callbacks:
        _leave_out(callback, Callback)
    _leave_out(module, LightningModule)
    step: Any = type(module).training_step
    if inspect.isfunction(step):
        vars(step)["__signature__"] = inspect.signature(step)  # where Python looks first


def _leave_out(owner: object, base: type) -> None:
    for hook in _HOOKS_OF_A_STEP:
        if getattr(type(owner), hook) is getattr(base, hook) and hook not in vars(owner):
            vars(owner)[hook] = None
