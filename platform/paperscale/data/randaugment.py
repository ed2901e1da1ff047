"""RandAugment (Cubuk et al. 2019): a few operations drawn for each image, all at one magnitude.

The fourteen operations are those of the paper's section 3. Magnitudes go from 0 to 30; at 30 an operation reaches the
end of its range, which is AutoAugment's (Cubuk et al. 2018, table 6):

=============================================  ======================================================
identity, auto-contrast, equalize              have no magnitude
posterize                                      from 8 bits that are kept down to 4
solarize                                       levels from 255 upwards are inverted, down to all
color, contrast, brightness, sharpness         times 1, to 1.9 or to 0.1
rotate                                         up to 30 degrees either way, around the centre
shear x, shear y                               up to 0.3 either way, from the upper left corner
translate x, translate y                       up to 150/331 of the side either way
=============================================  ======================================================

What comes in from outside the image is grey (128), and pixels are moved without interpolation: as in AutoAugment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from paperscale.data.augment import Draws

MOST = 30
"""The greatest magnitude."""

_FIRST = 128  # the first of its draws
_GREY = 128
_LEVELS = np.arange(256)


def rand_augment(image: NDArray[np.uint8], draws: Draws, operations: int = 2, magnitude: int = 9) -> None:
    """Change an image in place.

    Args:
        image: uint8 [height, width, channels], 1 channel for grey or 3 for colour.
        draws: of the sample.
        operations: N of the paper: how many are drawn, all fourteen equally likely, and applied in turn.
        magnitude: M of the paper, from 0 to ``MOST``.
    """
    changed = pixels = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    for number in range(_FIRST, _FIRST + 2 * operations, 2):
        strength = magnitude / MOST if draws(number + 1) < 0.5 else -magnitude / MOST
        changed = OPERATIONS[draws.integer(number, len(OPERATIONS))](changed, strength)
    if changed is not pixels:
        image[...] = np.asarray(changed).reshape(image.shape)


def _translated(dx: float, dy: float, image: Image.Image, strength: float) -> Image.Image:
    most = 150 / 331 * strength
    return _moved(image, (1, 0, round(dx * most * image.width), 0, 1, round(dy * most * image.height)))


def _sheared(dx: float, dy: float, image: Image.Image, strength: float) -> Image.Image:
    return _moved(image, (1, 0.3 * dx * strength, 0, 0.3 * dy * strength, 1, 0))


def _rotated(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(30 * strength, Image.Resampling.NEAREST, fillcolor=_grey(image))


def _moved(image: Image.Image, affine: tuple[float, ...]) -> Image.Image:
    """Return the image whose pixel (x, y) is that at (a x + b y + c, d x + e y + f)."""
    nearest = Image.Resampling.NEAREST
    return image.transform(image.size, Image.Transform.AFFINE, affine, nearest, fillcolor=_grey(image))


def _grey(image: Image.Image) -> tuple[int, ...]:
    return (_GREY,) * len(image.getbands())


def _posterized(image: Image.Image, strength: float) -> Image.Image:
    return _mapped(image, _LEVELS & ~((1 << round(4 * abs(strength))) - 1))


def _solarized(image: Image.Image, strength: float) -> Image.Image:
    return _mapped(image, np.where(256 * (1 - abs(strength)) <= _LEVELS, 255 - _LEVELS, _LEVELS))


def _brightened(image: Image.Image, strength: float) -> Image.Image:
    return _mapped(image, (1 + 0.9 * strength) * _LEVELS)


def _contrasted(image: Image.Image, strength: float) -> Image.Image:
    """Return the image with its levels moved away from, or towards, the mean of its luminance."""
    counts = np.array(image.convert("L").histogram())
    mean = round(float(counts @ _LEVELS / counts.sum()))
    return _mapped(image, mean + (1 + 0.9 * strength) * (_LEVELS - mean))


def _mapped(image: Image.Image, levels: NDArray[Any]) -> Image.Image:
    """Return the image with level i of each channel replaced by ``levels[i]``."""
    return image.point(np.clip(levels, 0, 255).astype(np.uint8).tolist() * len(image.getbands()))


OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, strength: image,
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    _posterized,
    _solarized,
    lambda image, strength: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    _contrasted,
    _brightened,
    lambda image, strength: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
    _rotated,
    partial(_sheared, 1, 0),
    partial(_sheared, 0, 1),
    partial(_translated, 1, 0),
    partial(_translated, 0, 1),
)
"""What each does with an image, at a strength from -1 to 1, in the order of the table above."""
