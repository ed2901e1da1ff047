"""The repeated blocks of a network: the unit of sharding, of activation checkpointing and of compilation.

A block is a module

- that has parameters and modules of its own,
- whose class occurs at least twice among the children of one ``nn.ModuleList`` or ``nn.Sequential``,
- and that lies in no other block.

So the layers of a transformer are blocks and those of its feed-forward part are not; a plain ``nn.Sequential`` among
the children is looked into, as the stages of a convolutional network often are. A network for which the rule does not
find what its author means says so itself, by a class attribute::

    class Network(nn.Module):
        block_classes = (Layer,)    # every Layer in it that lies in no other one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from paperscale.errors import UserError

_CONTAINERS = (nn.ModuleList, nn.Sequential)


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the repeated blocks of a network.

    Args:
        module: a network, or a LightningModule that holds some.

    Returns:
        Name, as of ``named_modules()``, and module of each block, in that order; a block that is used in several places
        once, by its first name. Empty where nothing is repeated.

    Raises:
        UserError: a ``block_classes`` is not what it should be, or the network has no such modules.
    """
    return list({id(block): (name, block) for name, block in reversed(list(_blocks(module, "", ())))}.values())[::-1]


def _blocks(module: nn.Module, name: str, named: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks in a module; ``named`` are the classes that a module around it has named."""
    own = _named_classes(module)
    found = 0
    repeated = _repeated(module)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        inner = own or named
        if isinstance(child, inner) if inner else type(child) in repeated and _is_block(child):
            found += 1
            yield path, child
            continue
        for block in _blocks(child, path, inner):
            found += 1
            yield block
    if own and not found:
        kinds = ", ".join(kind.__name__ for kind in own)
        raise UserError(
            f"{type(module).__name__}.block_classes names {kinds}, of which it has none; name the classes of its blocks"
        )


def _named_classes(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return a module's ``block_classes``."""
    named = getattr(module, "block_classes", ())
    if isinstance(named, tuple) and all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in named):
        return named
    raise UserError(
        f"{type(module).__name__}.block_classes is {named!r}; give a tuple of module classes, such as (Layer,)"
    )


def _repeated(module: nn.Module) -> set[type[nn.Module]]:
    """Return the classes that occur more than once among a container's children."""
    if not isinstance(module, _CONTAINERS):
        return set()
    counts = Counter(type(child) for child in module)
    return {kind for kind, count in counts.items() if count > 1}


def _is_block(module: nn.Module) -> bool:
    has_modules = any(True for _ in module.children())
    has_parameters = any(True for _ in module.parameters())
    return has_modules and has_parameters and type(module) not in (*_CONTAINERS, nn.ModuleDict)


def separable_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks that can be sharded on their own: none of their parameters is used outside of the block.

    A parameter that two shards hold, such as a tied weight, would come apart; what is left out here is sharded with the
    rest of the network.

    Args:
        module: as of :func:`blocks`.

    Raises:
        UserError: as :func:`blocks` does.
    """
    places = _places(module)
    return [
        (name, block)
        for name, block in blocks(module)
        if all(count == places[parameter] for parameter, count in _places(block).items())
    ]


def _places(module: nn.Module) -> Counter[int]:
    """Return in how many places each parameter is, by its id."""
    return Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)


def tied_parameters(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has more than one, in the order of ``named_parameters()``.

    Args:
        module: a network.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
