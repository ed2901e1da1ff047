"""How a network's tensors lie in those of another library, where more than a name differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias


class Part(NamedTuple):
    """A part of one of the other library's tensors.

    Attributes:
        name: of the library's tensor.
        number: which of its parts, from 0.
        of: equal parts that its rows are divided into: 3 where query, key and value are one.
        transposed: whether it is kept transposed, outputs last; its rows are then counted after it is turned.
    """

    name: str
    number: int = 0
    of: int = 1
    transposed: bool = False

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the library's tensor, of which a part has ``shape``."""
        whole = (shape[0] * self.of, *shape[1:]) if shape else shape
        return whole[::-1] if self.transposed else whole


Names: TypeAlias = Mapping[str, str | Part]
"""What ``export_names`` of a module returns: its names to the other library's."""


def part_of(other: str | Part) -> Part:
    """Return a name as the part that is the whole."""
    return Part(other) if isinstance(other, str) else other
