"""Pictures that runs have logged, small enough to lie inside a page."""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from paperscale.jobs.run import read_json
from paperscale.report.runs import Members, Record
from paperscale.report.spec import Pictures
from paperscale.tracking.pictures import MEDIA

_LONGEST_SIDE = 900
_MOST_BYTES = 120_000
PAGE_BYTES = 2_400_000
"""Of all pictures of a page."""


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        source: its content as a ``data:`` address.
        caption: what it shows.
    """

    source: str
    caption: str


class Album:
    """Takes pictures into a page until they are too large together.

    Attributes:
        left: bytes that further pictures may have.
    """

    def __init__(self) -> None:
        self.left = PAGE_BYTES

    def of_section(self, wanted: Pictures, members: Mapping[str, Members]) -> tuple[list[Picture], list[str]]:
        """Return the newest finished runs' pictures, and what was left out."""
        found, left_out = [], 0
        for name in wanted.groups or members:
            of = members[name]
            paths = [
                (record, key, path)
                for record in reversed([*of.unfinished, *of.counted])
                for key, path in logged(record)
                if any(fnmatch.fnmatchcase(key, pattern) for pattern in wanted.keys)
            ]
            for record, key, path in paths[: wanted.most]:
                source = embedded(path)
                if not source or len(source) > self.left:
                    left_out += 1
                    continue
                self.left -= len(source)
                found.append(Picture(source, f"{of.group.label or name}: {key}, run {record.run.name}"))
            left_out += len(paths[wanted.most :])
        return found, [f"{left_out} more in the runs' media folders"] if left_out else []


def logged(record: Record) -> list[tuple[str, Path]]:
    """Return the key and the newest file of each picture that a run has logged (``KEY-STEP.png`` in ``media/``)."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((record.run.path / MEDIA).glob("*.png")):
        facts = read_json(path.with_suffix(".json"))
        key, _, last = path.stem.rpartition("-")
        step = facts.get("step", int(last) if last.isdecimal() else 0)
        key = str(facts.get("key") or (key if last.isdecimal() else path.stem))
        if key not in newest or newest[key][0] <= (step or 0):
            newest[key] = step or 0, path
    return [(key, path) for key, (_, path) in newest.items()]


def embedded(path: Path) -> str:
    """Return a picture as a ``data:`` address: as it is, or smaller; empty where it cannot be read."""
    with contextlib.suppress(OSError, UnidentifiedImageError, Image.DecompressionBombError):
        content, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) > _MOST_BYTES or max(image.size) > 2 * _LONGEST_SIDE:
                content, kind = _reduced(image), "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return ""


def _reduced(image: Image.Image) -> bytes:
    """Return a picture as a JPEG within the limits."""
    plain = Image.new("RGB", image.size, "white")
    with_alpha = image.convert("RGBA")
    plain.paste(with_alpha, mask=with_alpha.getchannel("A"))
    content, side, quality = b"", _LONGEST_SIDE, 85
    while not content or len(content) > _MOST_BYTES:
        small = plain.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        small.save(written, "jpeg", quality=quality, optimize=True)
        content, side, quality = written.getvalue(), side * 4 // 5, max(quality - 5, 60)
    return content
