"""``paperscale data prepare``: from the published files of a data set to verified shards.

A module for each kind of source; :data:`DATASETS` is what there is. Every set is complete or not there, and what an
interrupted preparation has written is kept.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from paperscale import __version__
from paperscale.atomic import write_atomically
from paperscale.data.prepare import (
    choices,
    conll,
    glue,
    gluedev,
    imagenet,
    images,
    reading,
    squad,
    text,
    translation,
    wikipedia,
)
from paperscale.data.prepare.base import SCRATCH, Dataset, Job, Options, bar
from paperscale.data.prepare.images import parse_idx, to_idx
from paperscale.data.shards import MANIFEST, Manifest, read_manifest
from paperscale.data.tokenizer import FILE as TOKENIZER
from paperscale.data.verify import verify
from paperscale.data.writer import ShardWriter
from paperscale.errors import UserError, nearest

__all__ = ["DATASETS", "Dataset", "Options", "Row", "describe", "parse_idx", "prepare", "to_idx", "verified"]

DATASETS: dict[str, Dataset] = {
    **images.DATASETS,
    **imagenet.DATASETS,
    **text.DATASETS,
    **translation.DATASETS,
    **wikipedia.DATASETS,
    **glue.DATASETS,
    **gluedev.DATASETS,
    **choices.DATASETS,
    **reading.DATASETS,
    **squad.DATASETS,
    **conll.DATASETS,
}

UNFINISHED = "unfinished.json"
"""What is being prepared, while it is: another preparation into the same folder must not mix with it."""


class Row(NamedTuple):
    """A data set in a table.

    Attributes:
        name: what ``paperscale data prepare`` calls it.
        what: what it holds.
        size: how much there is to download.
        tokenizer: the kind it is written with by default; empty if it holds no text.
        source: what ``--source`` names; begins with "or" where the set can be fetched too, empty if it takes none.
        licence: terms of the data.
    """

    name: str
    what: str
    size: str
    tokenizer: str
    source: str
    licence: str


def describe() -> list[Row]:
    """Return a row for each data set."""
    return [
        Row(
            name,
            f"{dataset.title}: {dataset.what}",
            dataset.size,
            dataset.tokenizer,
            f"or {dataset.originals}" if dataset.fetched and dataset.originals else dataset.originals,
            dataset.licence,
        )
        for name, dataset in DATASETS.items()
    ]


def prepare(
    name: str,
    out: Path,
    console: Console,
    *,
    source: Sequence[Path] = (),
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    shard_mb: int = 128,
) -> Manifest:
    """Make the shards of a data set, or find them already there; verify them either way.

    Args:
        name: a key of :data:`DATASETS`.
        out: folder of the set; created where it is missing.
        console: where progress is shown.
        source: official files, archives or folders of them, for sets that take such.
        tokenizer: a kind of :data:`paperscale.data.tokenizer.KINDS`, or a ``tokenizer.json``; by default the set's.
        vocab_size: tokens of a tokenizer that is trained; by default the set's.
        shard_mb: size of a shard in megabytes.

    Raises:
        UserError: the name is unknown, an option does not fit it, no source can be had, a file is not as published,
            or ``out`` holds something else.
    """
    if name not in DATASETS:
        raise UserError(
            f"no data set '{name}', `paperscale data prepare --list` shows what there is{nearest(name, DATASETS)}"
        )
    options = Options(tuple(map(Path, source)), tokenizer, vocab_size, shard_mb)
    options.check(name, DATASETS[name])
    if (out / MANIFEST).exists():
        manifest = _ours(name, out, options)
        if not verified(out, console):
            return manifest
        console.print(f"{out} is damaged and is written again")
        (out / MANIFEST).unlink()
    _refuse_foreign(name, out, options)
    _write(name, out, options, console)
    if problems := verified(out, console):
        raise UserError(f"{out}: {problems[0]}; the disk may be failing: choose another --out")
    return read_manifest(out)


def _write(name: str, out: Path, options: Options, console: Console) -> None:
    """Write the set: the manifest, which completes it, comes last."""
    dataset = DATASETS[name]
    writer = ShardWriter(
        out,
        name,
        shard_bytes=options.shard_mb << 20,
        shard_samples=dataset.shard_samples,
        classes=dataset.classes,
        provenance={
            "title": dataset.title,
            "licence": dataset.licence,
            "options": options.facts(dataset),
            "versions": {"paperscale": __version__, "python": platform.python_version()},
            "sources": [],
        },
    )
    write_atomically(out / UNFINISHED, _asked(name, options))
    with bar(console) as progress, writer:
        job = Job(name, dataset, options, writer, progress)
        with contextlib.closing(job):
            dataset.write(job)
            job.finish()
    shutil.rmtree(out / SCRATCH, ignore_errors=True)
    (out / UNFINISHED).unlink()


def _asked(name: str, options: Options) -> bytes:
    return json.dumps({"name": name, **options.facts(DATASETS[name])}).encode()


def _ours(name: str, out: Path, options: Options) -> Manifest:
    """Return the manifest of a complete set.

    Raises:
        UserError: it is another set, or was made with other options.
    """
    manifest = read_manifest(out)
    if manifest.name != name:
        raise UserError(f"{out} holds {manifest.name}, not {name}; choose another --out")
    made = manifest.provenance.get("options", {})
    for option, value in options.facts(DATASETS[name]).items():
        if option in made and made[option] != value:
            raise UserError(f"{out} was made with {option} {made[option]}, not {value}; choose another --out")
    return manifest


def _refuse_foreign(name: str, out: Path, options: Options) -> None:
    """Refuse to write shards among files of another kind, or to go on with another preparation's.

    Raises:
        UserError: ``out`` holds such files.
    """
    if not out.is_dir():
        return
    ours = (".tar", ".tar.idx", ".partial", TOKENIZER, UNFINISHED, SCRATCH)
    foreign = [path.name for path in out.iterdir() if not path.name.endswith(ours)]
    if foreign:
        raise UserError(f"{out} holds other files ({', '.join(sorted(foreign)[:3])}); choose another --out")
    unfinished, begun = out / UNFINISHED, any(out.glob("*.tar")) or (out / SCRATCH).exists()
    if begun and unfinished.exists() and unfinished.read_bytes() != _asked(name, options):
        raise UserError(
            f"{out} holds an unfinished set of other options ({unfinished.read_text()}); "
            "delete it, or choose another --out"
        )


def verified(folder: Path, console: Console) -> list[str]:
    """Verify a set with a progress bar; print and return what is wrong."""
    manifest = read_manifest(folder)
    with bar(console) as progress:
        task = progress.add_task(f"verifying {folder}", total=sum(shard.bytes for _, shard in manifest.shards()))
        problems = verify(folder, lambda done: progress.advance(task, done)).problems
    for problem in problems:
        console.print(f"[red]damaged[/] {problem}", highlight=False)
    return problems
