"""Where to crop, and what else is drawn for an image: pure functions of (seed, epoch, sample).

Nothing here touches pixels: the functions return boxes in the image's own pixels, which
:func:`paperscale.data.jpeg.decode_into` decodes, resizes and mirrors in one go.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_MASK = (1 << 64) - 1

CROP_Y, CROP_X, FLIP, SCALE = 0, 1, 2, 3
_COLOR = 8  # and the three that follow
_TRY = 16  # and the four of each of ten tries that follow
_ERASE = 56  # and four of each of ten tries that follow

MULTI_SCALE = (224, 256, 384, 480, 640)
"""Shorter sides of the fully-convolutional test of He et al. 2015, section 3.4."""

_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


class Box(NamedTuple):
    """A part of an image, in pixels; fractions are allowed."""

    top: float
    left: float
    height: float
    width: float


class Draws:
    """The random numbers of one sample in one epoch.

    ``Draws(seed, epoch, sample)(k)`` is ``uniform(seed, epoch, sample, k)`` of :mod:`paperscale.data.random`, to the
    bit; in plain integers because NumPy takes ten times as long over a single number.
    """

    def __init__(self, seed: int, epoch: int, sample: int):
        self._state = 0
        for key in (seed, epoch, sample):
            self._state = _mixed(self._state ^ (int(key) & _MASK))

    def __call__(self, number: int) -> float:
        """Return draw ``number``, in [0, 1)."""
        return (_mixed(self._state ^ number) >> 11) * 2.0**-53

    def integer(self, number: int, stop: int) -> int:
        """Return draw ``number`` as an integer in [0, stop)."""
        return int(self(number) * stop)


def _mixed(x: int) -> int:
    """Return SplitMix64's next output after state ``x`` (Steele et al. 2014, fig. 19)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def random_resized_crop(
    draws: Draws,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    first: int = _TRY,
) -> Box:
    """Return a box of random area and aspect ratio (Szegedy et al. 2014, section 6).

    Args:
        draws: of the sample.
        height: of the image.
        width: of the image.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width over height, drawn uniformly in its logarithm.
        first: of the forty draws that it may take.

    After ten tries that do not fit into the image, the largest central box of an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for number in range(first, first + 40, 4):
        area = height * width * (scale[0] + draws(number) * (scale[1] - scale[0]))
        aspect = math.exp(low + draws(number + 1) * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = draws.integer(number + 2, height - h + 1), draws.integer(number + 3, width - w + 1)
            return Box(top, left, h, w)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def erased(draws: Draws, height: int, width: int, probability: float) -> Box:
    """Return the box of an image that random erasing blanks; it is empty where the image stays whole.

    Its area is 0.02 to 0.4 of the image's, its ratio 0.3 to 1 / 0.3 (Zhong et al. 2017).
    """
    if draws(_ERASE) >= probability:
        return Box(0, 0, 0, 0)
    return random_resized_crop(draws, height, width, (0.02, 0.4), (0.3, 1 / 0.3), _ERASE + 1)


def shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Return height and width of the image resized, its aspect ratio kept, to a shorter side of ``side``."""
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def crop_of_resized(height: int, width: int, side: int, size: int, top: int, left: int) -> Box:
    """Return the box of an image that becomes a crop of ``size`` x ``size`` where the image is resized.

    Args:
        height: of the image as it is.
        width: of the image as it is.
        side: shorter side of the resized image.
        size: of the crop.
        top: of the crop, in pixels of the resized image.
        left: likewise.
    """
    tall, wide = shorter_side(height, width, side)
    return Box(top * height / tall, left * width / wide, size * height / tall, size * width / wide)


def center_crop(height: int, width: int, side: int, size: int) -> Box:
    """Return the central crop of ``size`` of the image resized to a shorter side of ``side``."""
    tall, wide = shorter_side(height, width, side)
    return crop_of_resized(height, width, side, size, *five_places(tall, wide, size)[4])


def five_places(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Return top and left of the crops at the corners and in the centre (Krizhevsky et al. 2012, section 4.1)."""
    bottom, right = height - size, width - size
    return [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]


def scale_jitter(draws: Draws, height: int, width: int, sides: tuple[int, int], size: int) -> Box:
    """Return a random crop of the image resized to a random shorter side.

    The side is uniform over the integers from ``sides[0]`` to ``sides[1]``, both included (Simonyan & Zisserman 2014,
    section 3.1; He et al. 2015, section 3.4: 256 to 480).
    """
    side = sides[0] + draws.integer(SCALE, sides[1] - sides[0] + 1)
    tall, wide = shorter_side(height, width, side)
    top, left = draws.integer(CROP_Y, tall - size + 1), draws.integer(CROP_X, wide - size + 1)
    return crop_of_resized(height, width, side, size, top, left)


def pca_shift(draws: Draws, deviation: float = 0.1) -> tuple[float, float, float]:
    """Return what is added to red, green and blue, in levels of 0 to 255 (Krizhevsky et al. 2012, section 4.1).

    Along each principal component of ImageNet's pixels the shift is normal with ``deviation`` times its eigenvalue.
    Eigenvalues and eigenvectors are those of pixels in [0, 1]: the paper's 0.1 makes sense in that unit alone.
    """
    normals = []
    for number in (_COLOR, _COLOR + 2):  # Box & Muller 1958; 1 - u is never 0
        radius = math.sqrt(-2 * math.log(1 - draws(number)))
        angle = 2 * math.pi * draws(number + 1)
        normals += [radius * math.cos(angle), radius * math.sin(angle)]
    along = [255 * deviation * z * value for z, value in zip(normals, _EIGENVALUES, strict=False)]
    red, green, blue = (sum(p * a for p, a in zip(row, along, strict=True)) for row in _EIGENVECTORS)
    return red, green, blue
