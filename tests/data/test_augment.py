"""Augmentation: the papers' geometry and distributions, fixed by (seed, epoch, sample)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperscale.data import augment
from paperscale.data.augment import Draws
from paperscale.data.random import uniform

SIDES = st.integers(1, 3000)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 200))
def test_a_samples_draws_are_those_of_the_arrays(seed, epoch, sample, number):
    assert Draws(seed, epoch, sample)(number) == uniform(seed, epoch, sample, number)
    assert Draws(np.int64(seed), epoch, np.int64(sample))(number) == uniform(seed, epoch, sample, number)


@given(st.integers(0, 2**32), SIDES, SIDES)
def test_a_random_resized_crop_lies_in_the_image(seed, height, width):
    box = augment.random_resized_crop(Draws(seed, 0, 0), height, width)
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width
    assert box.height > 0
    assert box.width > 0


def test_random_resized_crops_have_the_areas_and_ratios_of_the_paper():
    """Szegedy et al. 2014: 8 to 100 % of the area, uniform; ratio 3/4 to 4/3, uniform in the logarithm."""
    boxes = [augment.random_resized_crop(Draws(7, 3, sample), 2000, 2000, (0.08, 0.5)) for sample in range(4000)]
    areas = np.array([box.height * box.width / 4e6 for box in boxes])
    ratios = np.array([math.log(box.width / box.height) for box in boxes])
    assert abs(areas.mean() - 0.29) < 0.006
    assert abs(areas.std() - 0.42 / math.sqrt(12)) < 0.004
    assert abs(ratios.mean()) < 0.01
    assert abs(ratios.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.005
    assert areas.min() >= 0.0799
    assert abs(ratios).max() <= math.log(4 / 3) + 0.01
    places = np.array([box.top / (2000 - box.height) for box in boxes])
    assert abs(places.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100)), (10, 10, (0, 0, 10, 10))],
)
def test_where_no_try_fits_the_largest_central_box_is_taken(height, width, expected):
    scale = (4.0, 4.0) if height == width else (0.9, 1.0)  # never fits
    assert augment.random_resized_crop(Draws(0, 0, 0), height, width, scale) == expected


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [(375, 500, 256, (256, 341)), (500, 375, 256, (341, 256)), (300, 300, 224, (224, 224)), (90, 91, 480, (480, 485))],
)
def test_the_shorter_side_is_resized_and_the_ratio_kept(height, width, side, expected):
    assert augment.shorter_side(height, width, side) == expected


def test_the_central_crop_of_the_resized_image_in_the_images_own_pixels():
    top, left, height, width = augment.center_crop(375, 500, 256, 224)
    assert (top, left) == pytest.approx((16 * 375 / 256, 58 * 500 / 341))  # rows 16 to 240, columns 58 to 282
    assert (height, width) == pytest.approx((224 * 375 / 256, 224 * 500 / 341))


@given(st.integers(0, 2**32), st.integers(20, 3000), st.integers(20, 3000))
def test_scale_jitter_stays_in_the_image_and_in_its_range(seed, height, width):
    box = augment.scale_jitter(Draws(seed, 1, 2), height, width, (256, 480), 224)
    assert box.top >= 0
    assert box.left >= 0
    assert box.top + box.height <= height * (1 + 1e-9)
    assert box.left + box.width <= width * (1 + 1e-9)
    side = 224 * min(height, width) / (box.height if height <= width else box.width)
    assert 256 - 1e-6 <= side <= 480 + 1e-6


def test_scale_jitter_reaches_both_ends():
    sides = {
        round(224 * 500 / augment.scale_jitter(Draws(0, 0, n), 500, 600, (256, 260), 224).height) for n in range(99)
    }
    assert sides == {256, 257, 258, 259, 260}


def test_colours_shift_along_the_principal_components():
    """Krizhevsky et al. 2012: normal, 0.1 times each eigenvalue along its eigenvector; in levels of 255."""
    shifts = np.array([augment.pca_shift(Draws(1, 0, sample)) for sample in range(6000)]) / 255
    vectors = np.array(augment._EIGENVECTORS)
    covariance = vectors @ np.diag((0.1 * np.array(augment._EIGENVALUES)) ** 2) @ vectors.T
    assert np.abs(shifts.mean(0)).max() < 5e-4
    assert np.abs(np.cov(shifts.T) - covariance).max() < 0.05 * covariance.max()
    along = (shifts @ vectors)[:, 0] / (0.1 * augment._EIGENVALUES[0])
    assert abs((along**4).mean() - 3) < 0.25, "normal, not uniform"
