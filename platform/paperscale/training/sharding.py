"""What a strategy divides over the processes, told from its configuration: without torch, before anything is built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paperscale.training.strategies import ZERO

_OF_STAGE = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "parameters")}
_CLASSES = {"ZeroStrategy": "zero", "FSDP2Strategy": "fsdp", "SingleDeviceStrategy": "single"}


@dataclass(frozen=True)
class Sharding:
    """What becomes of a model's state.

    Attributes:
        name: of the strategy, as it is shown: ``ddp``, ``fsdp``, ``deepspeed_zero2`` ... or the name of a class.
        kind: ``single``, ``ddp``, ``fsdp`` or ``zero``.
        divided: parts of which each process holds its share alone: ``optimizer``, ``gradients``, ``parameters``.
        offloaded: parts that are not in the GPU's memory between their uses.
    """

    name: str
    kind: str
    divided: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()


def sharding(strategy: Any, world_size: int = 2) -> Sharding:
    """Return what a strategy divides.

    Args:
        strategy: ``trainer.strategy`` of a recipe's configuration: a name, or ``class_path`` and ``init_args``.
        world_size: processes; one alone needs no DDP.
    """
    if not isinstance(strategy, str):
        return _of_class(strategy)
    if strategy in ("auto", "ddp", "single_device"):
        alone = strategy == "single_device" or world_size == 1
        return Sharding("single", "single") if alone else Sharding("ddp", "ddp")
    if strategy == "fsdp":
        return Sharding(strategy, "fsdp", _OF_STAGE[3])
    if strategy in ZERO:
        return _zero(strategy, ZERO[strategy])
    return Sharding(strategy, "ddp")


def class_of(strategy: Any) -> type:
    """Return the class that a recipe's configuration names with ``class_path``."""
    module, _, name = strategy.class_path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _of_class(strategy: Any) -> Sharding:
    name, bases = strategy.class_path.rpartition(".")[2], (base.__name__ for base in class_of(strategy).__mro__)
    kind = next((_CLASSES[base] for base in bases if base in _CLASSES), "ddp")
    given = strategy.get("init_args") or {}
    options: Mapping[str, Any] = given if isinstance(given, Mapping) else vars(given)
    if kind == "fsdp":
        return Sharding(name, kind, _OF_STAGE[3], _OF_STAGE[3] if options.get("offload") else ())
    if kind == "zero":
        return _zero(name, options)
    return Sharding("single" if kind == "single" else name, kind)


def _zero(name: str, options: Mapping[str, Any]) -> Sharding:
    """Return what ZeRO divides; where the optimizer is on the CPU, gradients go there as they are made."""
    stage = int(options.get("stage", 2))
    offloaded = (("optimizer", "gradients") if options.get("offload_optimizer") else ()) + (
        ("parameters",) if options.get("offload_parameters") and stage == 3 else ()
    )
    return Sharding(name, "zero", _OF_STAGE[stage], offloaded)
