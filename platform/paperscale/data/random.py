"""Random numbers that are a pure function of their keys.

The order of samples and every augmentation draw from here, so that a sample looks the same on whatever rank,
worker or attempt it is read. A stateful generator cannot promise that, and NumPy's generators may change their
streams between releases (NEP 19); a run that is resumed a year later must not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of SplitMix64 (Steele et al. 2014, fig. 19), elementwise."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def hash64(*keys: ArrayLike) -> NDArray[np.uint64]:
    """Return 64 uniform bits for each combination of ``keys`` (integers or integer arrays, broadcast)."""
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN)
        return state


def uniform(*keys: ArrayLike) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each combination of ``keys``, with 53 random bits."""
    return (hash64(*keys) >> np.uint64(11)) * (1.0 / (1 << 53))


def permutation(n: int, *keys: ArrayLike) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)`` fixed by ``keys``."""
    return np.argsort(hash64(*keys, np.arange(n)), kind="stable")
