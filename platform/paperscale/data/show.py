"""``paperscale data show``: look at samples, as a contact sheet of pictures or as decoded text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paperscale.data.order import SampleOrder
from paperscale.data.shards import ShardSet
from paperscale.data.tiles import tiled
from paperscale.data.tokenizer import FILE as TOKENIZER
from paperscale.data.tokens import TokenSet
from paperscale.data.verify import IMAGES, decode_sample
from paperscale.errors import UserError

_CELL, _GAP = 128, 6  # pixels
_LINE = 400  # characters of a member that are shown


def show(path: str, split: str, count: int, start: int, seed: int | None, sheet: Path) -> Iterator[str]:
    """Yield lines about samples of a split; images go to a contact sheet.

    Args:
        path: the set.
        split: which of its splits.
        count: samples to show.
        start: the first of them, in the order of writing or of ``seed``.
        seed: shows samples of the first epoch of that seed instead.
        sheet: file for the contact sheet; its suffix decides the format.

    Raises:
        UserError: the set or split does not exist, or a sample is damaged.
    """
    shards = ShardSet(path, split)
    text = all("tokens" in shard.lengths for shard in shards.shards)
    tokens = TokenSet(shards) if text else None
    sizes = tokens.sizes("documents") if tokens else shards.sizes
    if start >= sum(sizes):
        raise UserError(f"{path}: split '{split}' has {sum(sizes):,} samples, numbered from 0; give a smaller --start")
    order = SampleOrder(sizes, seed=seed or 0, shuffle=seed is not None)
    samples = order.samples(0, start, min(len(order), start + count))
    where = zip(samples.tolist(), *(a.tolist() for a in order.locate(samples)), strict=True)
    if tokens:
        yield from _documents(tokens, shards, where)
        return
    pictures: list[tuple[NDArray[np.uint8], str]] = []
    for number, shard, row in where:
        sample = decode_sample(shards.read(shard, row))
        rest = {k: v for k, v in sample.items() if k.rpartition(".")[2].lower() not in IMAGES}
        label = _label(rest, shards.manifest.classes)
        for name in sample.keys() - rest.keys():
            pictures.append((np.asarray(sample[name]), f"{number}  {label}"))
        facts = "  ".join(f"{name}={_short(value)}" for name, value in rest.items())
        yield f"{number}  {shards.key(shard, row)}  {facts}" + (f"  ({label})" if label else "")
    if pictures:
        try:
            contact_sheet(pictures).save(sheet)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{sheet} cannot be written: {error}; name another file with --out, such as a.png"
            ) from error
        yield f"pictures: {sheet}"


def _documents(tokens: TokenSet, shards: ShardSet, where: Iterator[tuple[int, int, int]]) -> Iterator[str]:
    """Yield documents, decoded by the set's tokenizer if it has one."""
    decode: Any = None
    if TOKENIZER in shards.manifest.files:
        from tokenizers import Tokenizer

        decode = Tokenizer.from_str(bytes(shards.folder.read_file(TOKENIZER)).decode()).decode
    for number, shard, row in where:
        sentences, label = tokens.document(shard, row)
        name = "" if label is None else f"  ({_label({'cls': label}, shards.manifest.classes)})"
        yield f"{number}  {sum(map(len, sentences))} tokens{name}"
        for sentence in sentences[:20]:
            yield "    " + _short(decode(sentence.tolist()) if decode else bytes_or_numbers(sentence))


def bytes_or_numbers(sentence: NDArray[Any]) -> str:
    """Return tokens of a set without a tokenizer: text where they are bytes, numbers otherwise."""
    if len(sentence) and sentence.max() < 256:
        return bytes(sentence.astype(np.uint8)).decode("utf-8", "replace")
    return " ".join(map(str, sentence.tolist()))


def _label(members: dict[str, Any], classes: list[str]) -> str:
    label = members.get("cls")
    if isinstance(label, int) and 0 <= label < len(classes):
        return classes[label]
    return "" if label is None else str(label)


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    elif isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = " ".join(str(value).split())
    return text if len(text) <= _LINE else text[: _LINE - 1] + "…"


def contact_sheet(pictures: list[tuple[NDArray[np.uint8], str]]) -> Any:
    """Return a ``PIL.Image`` with all pictures in a grid, each with its caption."""
    from PIL import Image

    columns = min(len(pictures), max(1, math.ceil(math.sqrt(len(pictures) * 1.5))))
    cells = []
    for pixels, _ in pictures:
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels).convert("RGB")
        scale = _CELL / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
        cells.append(Image.new("RGB", (_CELL, _CELL), "white"))
        cells[-1].paste(picture, ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return tiled(cells, [caption[: _CELL // 6] for _, caption in pictures], columns, _GAP)
