"""Where the recipes and the cluster files are, in a source checkout and in an installed wheel alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


@cache
def root() -> Path:
    """Return the folder that holds ``recipes/`` and ``cluster/``.

    A wheel carries them inside the package; a source checkout has them at its top.
    """
    packed = PACKAGE / "_assets"
    return packed if packed.is_dir() else PACKAGE.parents[1]


def recipes_dir() -> Path:
    """Return the folder of the recipes that ship with the package."""
    return root() / "recipes"


def cluster_dir() -> Path:
    """Return the folder of job templates and cluster profiles."""
    return root() / "cluster"
