"""Pictures of a run: ``media/<key>-<step>.png``, and beside each a ``.json`` that says what it shows."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperscale.atomic import write_atomically
from paperscale.data.tiles import tiled

if TYPE_CHECKING:
    from PIL.Image import Image

MEDIA = "media"
"""Folder of a run with its pictures."""
_LEAST_SIDE = 96  # pixels of an image in a grid: smaller ones are enlarged, so that captions can be read
_GAP = 4


def write_picture(folder: Path, key: str, images: Any, step: int | None, captions: Sequence[str]) -> None:
    """Write images as one picture, with ``{key, step, captions}`` beside it; one of the same name is replaced.

    Args:
        folder: ``media`` of the run.
        key: such as ``test/mistakes``.
        images: one or several, see :func:`as_images`.
        step: optimizer steps taken.
        captions: of the images; empty for none.

    Raises:
        OSError: it cannot be written; names the file.
        ValueError: what is given is no image, or not each image has a caption.
    """
    name = "-".join([re.sub(r"[^\w.=+]+", "-", key), *([] if step is None else [str(step)])])
    png = io.BytesIO()
    drawn(as_images(images), captions).save(png, "png")
    facts = {"key": key, "step": step, "captions": list(captions)}
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.png", png.getvalue())
    write_atomically(folder / f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())


def as_captions(caption: str | Sequence[str] | None) -> list[str]:
    """Return captions as a list."""
    return [] if caption is None else [caption] if isinstance(caption, str) else [str(text) for text in caption]


def as_images(images: Any) -> list[Image]:
    """Return images as PIL's, in colour.

    Args:
        images: one image, a list of them, or a tensor [B, C, H, W]. An image is a tensor [C, H, W] or [H, W], a NumPy
            array [H, W, C], [C, H, W] or [H, W], of uint8 or of floats from 0 to 1, with 1, 3 or 4 channels; or PIL's.

    Raises:
        ValueError: it is none of these, or there is none.
    """
    is_batch = getattr(images, "ndim", 0) == 4
    several = list(images) if is_batch or isinstance(images, (list, tuple)) else [images]
    if not several:
        raise ValueError("no images to log; give one or more")
    return [_as_image(image) for image in several]


def _as_image(image: Any) -> Image:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    is_tensor = isinstance(image, Tensor)
    if is_tensor:
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    pixels = np.asarray(image)
    if pixels.ndim == 3 and (is_tensor or pixels.shape[2] not in (1, 3, 4)):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(f"shape {list(np.shape(image))} is no image; give 1, 3 or 4 channels, [C, H, W]")
    if pixels.dtype == bool or np.issubdtype(pixels.dtype, np.floating):
        pixels = np.rint(255 * np.nan_to_num(pixels.astype(np.float64)).clip(0, 1))
    return Image.fromarray(np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))).convert("RGB")


def drawn(images: Sequence[Image], captions: Sequence[str] = ()) -> Image:
    """Return one picture: an image alone as it is, several, or such with captions, as a grid.

    Args:
        images: of any sizes; small ones are enlarged by a whole factor.
        captions: one below each image; what does not fit is cut off.

    Raises:
        ValueError: their numbers differ.
    """
    from PIL import Image, ImageFont

    if captions and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions of {len(images)} images; give one each")
    if len(images) == 1 and not captions:
        return images[0]
    factor = max(1, math.ceil(_LEAST_SIDE / max(max(image.size) for image in images)))
    cells = [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]
    width, font = max(cell.width for cell in cells), ImageFont.load_default()
    return tiled(cells, [_fitting(text, width, font) for text in captions], math.ceil(math.sqrt(len(cells))), _GAP)


def _fitting(text: str, width: int, font: Any) -> str:
    """Return the beginning of a text that is no wider than ``width`` pixels, in letters that every font has."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
