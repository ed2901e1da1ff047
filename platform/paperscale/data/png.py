"""Whole PNGs of 8 bits, grey or RGB: what sets of small pictures are made of.

Pillow takes 60 microseconds to open and decode a picture of 28 x 28, nearly all of it in Python, where a loader's
thread keeps the training's from running. This takes 15. Whatever is not exactly as expected, damage too, is left to
Pillow, which then says what is wrong.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from ctypes import CDLL

import numpy as np
from numpy.typing import NDArray

Content = bytes | bytearray | memoryview

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">8sI4sIIBBBBB")  # signature; length and name of the chunk; width, height, depth, kind, ...
_FIRST = 33  # where the second chunk begins
_CHUNK, _CRC = struct.Struct(">I4s"), struct.Struct(">I")
_CHANNELS = {0: 1, 2: 3}
_MOST_BYTES = 1 << 26
_NOT_OURS = (b"tRNS", b"acTL")  # transparency, animation


def decode_into(content: Content, out: NDArray[np.uint8], flip: bool, library: CDLL) -> bool:
    """Decode a picture of the same height and width as ``out``; return whether it is one for this.

    Args:
        content: the file.
        out: uint8 [height, width, channels]: 1 channel for grey pictures, 3 for any.
        flip: mirror it.
        library: the C library.
    """
    if content[:8] != _SIGNATURE or len(content) < _FIRST:
        return False
    _, length, name, width, height, *options = _HEADER.unpack_from(content)
    channels = _CHANNELS.get(options[1], 0)
    if (
        (length, name) != (13, b"IHDR")
        or (height, width) != out.shape[:2]
        or not 0 < channels <= out.shape[2]
        or (options[0], *options[2:]) != (8, 0, 0, 0)
        or height * (width * channels + 1) > _MOST_BYTES
    ):
        return False
    try:
        filtered = _inflated(b"".join(_data(content)), height * (width * channels + 1))
    except (struct.error, zlib.error, ValueError):
        return False
    straight = not flip and channels == out.shape[2]
    pixels = out if straight else np.empty((height, width, channels), np.uint8)
    if library.crops_unfilter(filtered, height, width * channels, channels, pixels.ctypes.data):
        return False
    if not straight:
        out[...] = pixels[:, ::-1] if flip else pixels
    return True


def _data(content: Content) -> Iterator[Content]:
    """Yield the content of the chunks that hold the picture.

    Raises:
        ValueError: a chunk is damaged, or changes what the picture is.
        struct.error: the file is cut off.
    """
    at = _FIRST
    while True:
        length, name = _CHUNK.unpack_from(content, at)
        if name == b"IEND":
            return
        if name in _NOT_OURS:
            raise ValueError("not a plain picture")
        if name == b"IDAT":
            if zlib.crc32(content[at + 4 : at + 8 + length]) != _CRC.unpack_from(content, at + 8 + length)[0]:
                raise ValueError("a damaged chunk")
            yield content[at + 8 : at + 8 + length]
        at += length + 12


def _inflated(data: bytes, size: int) -> bytes:
    """Return the ``size`` bytes that are compressed in ``data``.

    Raises:
        ValueError: it is another number of bytes.
    """
    inflate = zlib.decompressobj()
    found = inflate.decompress(data, size + 1)
    if len(found) != size or not inflate.eof:
        raise ValueError("not as many bytes as the header says")
    return found
