"""Pictures side by side in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

LINE = 14
"""Pixels of a caption, below its picture."""


def tiled(pictures: Sequence[Image], captions: Sequence[str], columns: int, gap: int) -> Image:
    """Return pictures as a grid on white, row by row.

    Args:
        pictures: of any sizes; each cell is as large as the largest, and has its picture at its upper left corner.
        captions: one below each picture; empty for none.
        columns: of the grid.
        gap: pixels around each cell.
    """
    from PIL import Image, ImageDraw

    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    across, down = width + gap, height + gap + (LINE if captions else 0)
    grid = Image.new("RGB", (columns * across + gap, -(-len(pictures) // columns) * down + gap), "white")
    draw = ImageDraw.Draw(grid)
    for number, picture in enumerate(pictures):
        left, top = gap + number % columns * across, gap + number // columns * down
        grid.paste(picture, (left, top))
        if captions:
            draw.text((left, top + height), captions[number], fill="black")
    return grid
