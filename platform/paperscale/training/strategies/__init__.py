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
_OFFLOAD = {
    "": {},
    "_offload": {"offload_optimizer": "cpu"},
    "_nvme": {"offload_optimizer": "nvme", "offload_parameters": "nvme"},
}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)


def is_sharded(strategy: Any) -> bool:
    """Return whether a strategy, by name or as an object, divides state over processes (and needs their group)."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    return name.startswith(("fsdp", "deepspeed", "FSDP2Strategy", "ZeroStrategy"))


def make(strategy: Any, world_size: int, device: str = "cpu", by_hand: bool = False) -> PortableStrategy:
    """Return the strategy that a recipe asks for.

    Args:
        strategy: the recipe's ``trainer.strategy``: a name, or an object of one of these classes.
        world_size: processes.
        device: ``cpu``, ``cuda`` or ``mps``.
        by_hand: whether the model steps several optimizers itself: a backward pass then leaves some parameters out.

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
    if strategy in NAMES:
        from paperscale.training.strategies.zero import ZeroStrategy

        stage: Any = int(strategy[len("deepspeed_zero")])
        options: dict[str, Any] = dict(_OFFLOAD[strategy[len("deepspeed_zero") + 1 :]])
        if stage == 3 and options.get("offload_optimizer") == "cpu":
            options["offload_parameters"] = "cpu"
        return ZeroStrategy(stage, on_gpu=device == "cuda", **options)
    raise UserError(f"trainer.strategy={strategy}: there is no such strategy{nearest(strategy, NAMES)}")
