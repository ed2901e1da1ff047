"""RandAugment: each operation does what its name says, and what is drawn is fixed by (seed, epoch, sample)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from paperscale.data import randaugment
from paperscale.data.augment import Draws
from paperscale.data.randaugment import OPERATIONS, rand_augment

LEVELS = ("identity", "autocontrast", "equalize", "posterize", "solarize")
FACTORS = ("color", "contrast", "brightness", "sharpness")
NAMES = (*LEVELS, *FACTORS, "rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def photo(channels: int = 3, height: int = 30, width: int = 40) -> np.ndarray:
    small = np.random.default_rng(3).integers(40, 220, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.BICUBIC)
    return np.array(image if channels == 3 else image.convert("L")).reshape(height, width, channels)


def operated(name: str, image: Image.Image, strength: float) -> np.ndarray:
    return np.asarray(OPERATIONS[NAMES.index(name)](image, strength)).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_operations_are_those_of_pillow_at_the_papers_magnitudes(mode):
    image = Image.fromarray(photo()).convert(mode)
    expected = {
        "identity": image,
        "autocontrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "posterize": ImageOps.posterize(image, 6),
        "solarize": ImageOps.solarize(image, 128),
        "color": ImageEnhance.Color(image).enhance(1.45),
        "contrast": ImageEnhance.Contrast(image).enhance(1.45),
        "brightness": ImageEnhance.Brightness(image).enhance(1.45),
        "sharpness": ImageEnhance.Sharpness(image).enhance(1.45),
        "rotate": image.rotate(15, fillcolor=(128,) * len(image.getbands())),
    }
    for name, picture in expected.items():
        assert np.abs(operated(name, image, 0.5) - np.asarray(picture)).max() <= 1, name


def test_moved_images_leave_grey_behind():
    image = Image.fromarray(photo())
    pixels = np.asarray(image)
    moved = operated("translate_x", image, 1.0)  # by 150/331 of 40: 18 pixels
    assert np.array_equal(moved[:, :22], pixels[:, 18:])
    assert (moved[:, 22:] == 128).all()
    moved = operated("translate_y", image, -0.5)  # by 7 of 30
    assert np.array_equal(moved[7:], pixels[:23])
    assert (moved[:7] == 128).all()
    sheared = operated("shear_x", image, 1.0)  # row y by 0.3 (y + 1/2) pixels
    assert np.array_equal(sheared[20, :34], pixels[20, 6:])
    sheared = operated("shear_y", image, -1.0)
    assert np.array_equal(sheared[6:, 20], pixels[:24, 20])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("autocontrast", "equalize")])
def test_at_magnitude_0_an_operation_changes_nothing(name):
    image = Image.fromarray(photo())
    assert np.array_equal(operated(name, image, 0.0), np.asarray(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_and_directions_are_drawn_evenly_and_applied_in_turn(channels):
    image = photo(channels)
    pillow = Image.fromarray(image.squeeze())
    counts = np.zeros((14, 14, 2, 2), int)
    for sample in range(400):
        draws = Draws(7, 2, sample)
        first, second = draws.integer(128, 14), draws.integer(130, 14)
        signs = [1 if draws(number) < 0.5 else -1 for number in (129, 131)]
        counts[first, second, int(signs[0] > 0), int(signs[1] > 0)] += 1
        expected = OPERATIONS[second](OPERATIONS[first](pillow, 0.3 * signs[0]), 0.3 * signs[1])
        out = image.copy()
        rand_augment(out, draws)
        assert np.array_equal(out, np.asarray(expected).reshape(image.shape))
    for axis in range(4):
        shares = counts.sum(tuple(other for other in range(4) if other != axis)) / 400
        assert shares.min() > 0.4 / len(shares)
        assert shares.max() < 1.8 / len(shares)


def test_the_number_and_the_magnitude_of_operations_are_those_asked_for():
    image, strongest = photo(), []
    for magnitude in (0, 3, randaugment.MOST):
        pictures = [image.copy() for _ in range(60)]
        for sample, picture in enumerate(pictures):
            rand_augment(picture, Draws(0, 0, sample), 1, magnitude)
        strongest.append(np.mean([np.abs(picture.astype(int) - image).mean() for picture in pictures]))
    assert strongest[0] < strongest[1] < strongest[2]
