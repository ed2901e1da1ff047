"""Arrays that take a while to compute from a set, and are kept beside it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paperscale.atomic import write_atomically


def kept_array(path: Path, write: bool, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Return the array that a file holds; where there is none, compute it, and keep it there if that is possible.

    Args:
        path: the file; its name says what the array was computed from.
        write: whether to keep it.
        compute: returns it.
    """
    with contextlib.suppress(OSError, ValueError, EOFError):  # what is no whole file is made again
        found: NDArray[Any] = np.load(path)
        return found
    found = compute()
    content = io.BytesIO()
    np.save(content, found)
    if write:
        with contextlib.suppress(OSError):  # a folder that is only read
            write_atomically(path, content.getvalue())
    return found
