"""Learning-rate schedules, as factors of the optimizer's learning rate at each step.

A schedule is a function of the step alone: what a checkpoint keeps of it is the number of steps, and a training that is
made longer goes on with the longer one's factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Factor = Callable[[int], float]


def steps_down(milestones: Sequence[int], gamma: float = 0.1) -> Factor:
    """Return the schedule that multiplies by ``gamma`` at each of ``milestones``, in steps."""
    return lambda step: gamma ** sum(step >= milestone for milestone in milestones)


def cosine(total_steps: int, warmup_steps: int = 0, least: float = 0.0) -> Factor:
    """Return half a period of a cosine, from 1 after the warm-up to ``least`` (Loshchilov & Hutter 2017, eqn. 5)."""

    def factor(step: int) -> float:
        done = min(max(step - warmup_steps, 0) / max(total_steps - warmup_steps, 1), 1.0)
        return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2

    return factor


def polynomial(total_steps: int, power: float = 1.0) -> Factor:
    """Return a polynomial decay from 1 at step 0 to 0 at the end (Devlin et al. 2019, A.2: power 1; LAMB: 0.5)."""
    return lambda step: max(0.0, 1 - step / max(total_steps, 1)) ** power


def warmed_up(after: Factor, warmup_steps: int, start: float | None = None) -> Factor:
    """Return a schedule that begins with a warm-up.

    Args:
        after: the factors from ``warmup_steps`` on.
        warmup_steps: its length; 0 for none.
        start: the factor during the warm-up (He et al. 2015, section 4.2, n = 18); by default it rises linearly to 1
            (Goyal et al. 2017, section 2.2).
    """

    def factor(step: int) -> float:
        if step >= warmup_steps:
            return after(step)
        return (step + 1) / warmup_steps if start is None else start

    return factor


def scheduled(optimizer: Optimizer, factor: Factor) -> dict[str, object]:
    """Return what ``configure_optimizers`` returns for a schedule that goes on at each optimizer step."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
