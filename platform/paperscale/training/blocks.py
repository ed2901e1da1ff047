"""The repeated blocks of a network: the unit of division, of activation checkpointing and of compilation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost repeated blocks, by name.

    A block has modules of its own, and its class occurs at least twice among the children of one ``ModuleList`` or
    ``Sequential``. A network that knows better names its classes in an attribute ``block_classes``.
    """
    named = tuple(kind for part in module.modules() for kind in getattr(part, "block_classes", ()))
    return list(_within(module, "", named))


def _within(module: nn.Module, prefix: str, named: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    counts = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential)) and counts[type(child)] > 1
        if isinstance(child, named) if named else repeated and any(True for _ in child.children()):
            yield path, child
        else:
            yield from _within(child, f"{path}.", named)
