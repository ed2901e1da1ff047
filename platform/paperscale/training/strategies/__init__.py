"""Strategies: how a run divides its work and its state over processes.

Lightning's own strategy classes with the least of ours on top: each of them tells what it holds as pieces (see
:mod:`paperscale.training.pieces`), so that a checkpoint that one has written is read by any other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from paperscale.errors import UserError, nearest

if TYPE_CHECKING:
    from paperscale.training.strategies.portable import PortableStrategy

ZERO: dict[str, dict[str, Any]] = {
    "deepspeed_zero1": {"stage": 1},
    "deepspeed_zero2": {"stage": 2},
    "deepspeed_zero3": {"stage": 3},
    "deepspeed_zero2_offload": {"stage": 2, "offload_optimizer": "cpu"},
    "deepspeed_zero3_offload": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "deepspeed_zero3_nvme": {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
}
"""The options of ``ZeroStrategy`` that names stand for."""
NAMES = {
    "ddp": "every process holds the whole model and optimizer; gradients are averaged",
    "fsdp": "FSDP2: weights, gradients and optimizer state are divided by rows",
    "deepspeed_zero1": "the optimizer state is divided",
    "deepspeed_zero2": "optimizer state and gradients are divided",
    "deepspeed_zero3": "optimizer state, gradients and weights are divided",
    "deepspeed_zero2_offload": "as deepspeed_zero2, with the optimizer in the memory of the CPU",
    "deepspeed_zero3_offload": "as deepspeed_zero3, with optimizer and weights in the memory of the CPU",
    "deepspeed_zero3_nvme": "as deepspeed_zero3, with optimizer and weights on a local NVMe disk",
}
"""What ``trainer.strategy`` and ``--strategy`` take, and what each divides."""

_CLASSES = {
    "ExactDDPStrategy": "ddp",
    "SingleStrategy": "single",
    "FSDP2Strategy": "fsdp",
    "ZeroStrategy": "zero",
}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)


def make(strategy: Any, world_size: int, device: str = "cpu", by_hand: bool = False) -> PortableStrategy:
    """Return the strategy that a recipe asks for.

    Args:
        strategy: the recipe's ``trainer.strategy``: a name, or an object of one of these classes.
        world_size: processes.
        device: ``cpu``, ``cuda`` or ``mps``.
        by_hand: whether the model steps its optimizers itself: a backward pass may then leave some parameters out.

    Raises:
        UserError: there is no such strategy.
    """
    from paperscale.training.strategies.ddp import ExactDDPStrategy
    from paperscale.training.strategies.portable import PortableStrategy

    if isinstance(strategy, PortableStrategy):
        return strategy
    if not isinstance(strategy, str):
        classes = ", ".join(f"{__name__}.{name}" for name in _CLASSES)
        raise UserError(f"trainer.strategy: {type(strategy).__name__} cannot be checkpointed; use one of {classes}")
    if strategy in ("auto", "single_device") or (strategy == "ddp" and world_size == 1):
        if world_size > 1:
            return ExactDDPStrategy(find_unused_parameters=by_hand)
        from paperscale.training.strategies.single import SingleStrategy

        return SingleStrategy(device="cuda:0" if device == "cuda" else device)
    if strategy.startswith("ddp"):
        return ExactDDPStrategy(find_unused_parameters=by_hand or "find_unused_parameters_true" in strategy)
    if strategy == "fsdp":
        from paperscale.training.strategies.fsdp import FSDP2Strategy

        return FSDP2Strategy()
    if strategy in ZERO:
        from paperscale.training.strategies.zero import ZeroStrategy

        return ZeroStrategy(on_gpu=device == "cuda", **ZERO[strategy])
    raise UserError(f"trainer.strategy={strategy}: there is no such strategy{nearest(strategy, NAMES)}")
