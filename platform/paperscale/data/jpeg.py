"""Images from bytes: the part that a crop needs, resized, straight into the batch's memory.

Most of an image loader's time is JPEG. Three things make it short here: only the rows and columns that a crop needs
leave the decoder, its entropy decoder is faster than libjpeg's, and rows are resized as they come. The
picture is Pillow's: decoded to the bit, and resized by ``Image.resize(size, BILINEAR, box=box)``, to the bit where
Pillow resizes horizontally first (up to version 12 always, since 13 not on tall images; then to one level).

The work is done by a C library (``native/``) on top of the libjpeg-turbo that Pillow's wheel brings, with the
interpreter lock released. Where it cannot be had, Pillow does the same in about twice the time; :func:`backend` tells.
``PAPERSCALE_JPEG=pillow`` chooses Pillow.

As ImageNet's convention has it, EXIF orientation is ignored.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from paperscale.data import png
from paperscale.data.native import build
from paperscale.data.png import Content

Box = Sequence[float]


def size(content: Content) -> tuple[int, int]:
    """Return an image's height and width, from its header alone.

    Raises:
        ValueError: it is not an image.
    """
    return shape(content)[:2]


def shape(content: Content) -> tuple[int, int, int]:
    """Return an image's height, width and channels (1 for grey, 3 for colour), from its header alone.

    Raises:
        ValueError: it is not an image.
    """
    found = (ctypes.c_int32 * 3)()
    if _native("crops_shape", content, found):
        return found[0], found[1], found[2]
    image = _open(content)
    return image.height, image.width, _channels(image)


def decode(content: Content) -> NDArray[np.uint8]:
    """Decode a whole image, to the end of its data, to uint8 [height, width, channels]: 1 for grey, 3 for colour.

    Raises:
        ValueError: it does not decode.
    """
    out = np.empty(shape(content), np.uint8)
    if not _native("crops_whole", content, out.ctypes.data, out.shape[2]):
        _with_pillow(content, out, None, False)
    return out


def decode_into(
    content: Content, out: NDArray[np.uint8], box: Box | None = None, flip: bool = False, max_reduction: int = 1
) -> None:
    """Decode a box of an image and resize it to ``out``.

    The antialiasing filter looks at the image's own pixels around the box, as Pillow's does: a box of the image
    gives what resizing the image and cropping then would. Of a JPEG, what lies below the box is not looked at: damage
    there goes unnoticed, and costs nothing.

    Args:
        content: the image file.
        out: uint8 [height, width, channels], C-contiguous; 1 channel for grey, 3 for colour, whatever the file has.
        box: top, left, height and width in the image's pixels, fractions allowed; by default the whole image.
        flip: mirror the result.
        max_reduction: let the JPEG decoder itself first reduce the image, by at most 2, 4 or 8, while the box stays
            as large as ``out``: 1.4 times as fast on large photos, at a mean difference of a level (measured: 0.7
            with 2, 1.0 with 4).

    Raises:
        ValueError: the image does not decode, the box does not lie in it, or ``out`` is of another kind.
    """
    if out.dtype != np.uint8 or out.ndim != 3 or out.shape[2] not in (1, 3) or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous uint8 [height, width, 1 or 3], not {out.dtype} {out.shape}")
    corners = None if box is None else _Corners(box[1], box[0], box[1] + box[3], box[0] + box[2])
    if _native("crops_decode", content, out.ctypes.data, *out.shape, corners, flip, max_reduction):
        return
    if corners is None and (library := _load()[0]) and png.decode_into(content, out, flip, library):
        return
    _with_pillow(content, out, corners, flip)


def backend() -> str:
    """Return what decodes JPEGs here: ``"native"``, or ``"pillow"`` with the reason in parentheses."""
    return _load()[1]


# -- the C library -----------------------------------------------------------------------------------------------------

_MESSAGE_BYTES = 200
_UNSUPPORTED = -2
_Corners = ctypes.c_double * 4  # left, top, right, bottom
_SIGNATURES = {
    "crops_open": [ctypes.c_char_p, ctypes.c_char_p],
    "crops_shape": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p],
    "crops_whole": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p],
    "crops_decode": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    + 3 * [ctypes.c_int]
    + [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_char_p],
    "crops_unfilter": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p],
}


def _native(function: str, content: Content, *arguments: Any) -> bool:
    """Call the C library on an image; return whether this is for it: a JPEG of a kind that it knows.

    Raises:
        ValueError: it is, and does not decode.
    """
    if content[:2] != b"\xff\xd8" or (library := _load()[0]) is None:
        return False
    if not isinstance(content, bytes):
        view = np.frombuffer(content, np.uint8)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    address = content if isinstance(content, bytes) else view.ctypes.data
    code = getattr(library, function)(address, len(content), *arguments, message)
    if code not in (0, _UNSUPPORTED):
        raise ValueError(message.value.decode(errors="replace"))
    return bool(code == 0)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the C library with libjpeg-turbo opened, and what :func:`backend` says."""
    if os.environ.get("PAPERSCALE_JPEG") == "pillow":
        return None, "pillow (PAPERSCALE_JPEG says so)"
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    try:
        packaged = build.HERE / build.LIBRARY
        library = ctypes.CDLL(str(packaged if packaged.exists() else build.cached()))
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
    except OSError as error:
        return None, f"pillow ({error})"
    for path in _libjpegs():
        if library.crops_open(os.fsencode(path), message) == 0 and _agrees_with_pillow(library, message):
            return library, "native"
    return None, f"pillow (no usable libjpeg-turbo: {message.value.decode(errors='replace')})"


def _libjpegs() -> list[str]:
    """Return where libjpeg-turbo may be: in Pillow's wheel, else the system's."""
    site = Path(PIL.__file__).parent
    bundled = [*site.parent.glob("[pP]illow.libs/libjpeg*.so*"), *site.glob(".dylibs/libjpeg*.dylib")]
    return [*map(str, bundled), "libjpeg.so.62", "libjpeg.62.dylib"]


def _agrees_with_pillow(library: ctypes.CDLL, message: Any) -> bool:
    """Return whether a picture comes out as Pillow decodes it: the guard against a library of another make."""
    ramps = np.add.outer(np.arange(24) * 7, np.arange(40) * 5).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([ramps, ramps[::-1], ramps.T.reshape(ramps.shape)], 2)).save(file, "jpeg")
    expected = np.asarray(Image.open(file))
    out = np.empty_like(expected)
    content = file.getvalue()
    code = library.crops_whole(content, len(content), out.ctypes.data, 3, message)
    return code == 0 and np.array_equal(out, expected)


# -- Pillow ------------------------------------------------------------------------------------------------------------

_GREY = ("1", "L", "LA", "I", "I;16", "F")
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def _open(content: Content) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError("it is not an image of a known format") from error
    except _BROKEN as error:
        raise ValueError(str(error)) from error


def _channels(image: Image.Image) -> int:
    return 1 if image.mode in _GREY else 3


def _inside(image: Image.Image, corners: Any) -> tuple[float, float, float, float]:
    """Return the box as Pillow takes it; fractions computed from a resized picture may lie just outside."""
    if corners is None:
        return 0, 0, image.width, image.height
    left, top, right, bottom = corners
    if (
        min(left, top) < -1e-3
        or left >= right
        or top >= bottom
        or right > image.width + 1e-3
        or bottom > image.height + 1e-3
    ):
        raise ValueError(
            f"the box {left:g}, {top:g} to {right:g}, {bottom:g} does not lie in the image of {image.width} x "
            f"{image.height} pixels"
        )
    return max(0, left), max(0, top), min(right, image.width), min(bottom, image.height)


def _with_pillow(content: Content, out: NDArray[np.uint8], corners: Any, flip: bool) -> None:
    """Do what :func:`decode_into` does, with Pillow; ``corners`` are left, top, right and bottom."""
    image = _open(content)
    height, width, channels = out.shape
    try:
        if channels == 1:
            image.draft("L", None)  # a JPEG's luminance as it is stored, not mixed again from colours
        pixels = image.convert("L" if channels == 1 else "RGB")
        box = _inside(image, corners)
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR, box)
    except _BROKEN as error:
        raise ValueError(str(error)) from error
    if flip:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[...] = np.asarray(pixels).reshape(out.shape)
