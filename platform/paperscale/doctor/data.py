"""What the data need: the JPEG decoder, and a set of shards that is complete."""

from __future__ import annotations

from collections.abc import Iterator

from paperscale.doctor.findings import Asked
from paperscale.errors import UserError
from paperscale.findings import Finding


def images(asked: Asked) -> Iterator[Finding]:
    """Are JPEGs decoded by the C library?"""
    from paperscale.data.jpeg import backend

    found = backend()
    if found == "native":
        yield Finding("OK", "images", "JPEGs are decoded by the C library, only what a crop needs")
    else:
        fix = "install a C compiler (gcc or clang)"
        yield Finding("WARN", "images", f"decoded by {found}, at half the speed", fix)


def shards(asked: Asked) -> Iterator[Finding]:
    """Is every byte of the set what was written?  A quick look compares the sizes only."""
    where = asked.data or ""
    try:
        problems = _sizes(where) if asked.quick else _content(where)
    except UserError as error:
        yield Finding("FAIL", "shards", str(error), f"prepare the set, or check the path {where}")
        return
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        yield Finding(
            "FAIL", "shards", problems[0] + more, f"`paperscale data verify {where}` names all; prepare it again"
        )
    else:
        yield Finding("OK", "shards", f"{where}: complete" + ("" if asked.quick else " and verified"))


def _content(where: str) -> list[str]:
    from paperscale.data.verify import verify

    return verify(where).problems


def _sizes(where: str) -> list[str]:
    from paperscale.data.shards import ShardSet, read_manifest

    return [problem for split in read_manifest(where).splits for problem in ShardSet(where, split).check()]
