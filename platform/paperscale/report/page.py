"""From a declaration and runs to one HTML page that needs nothing beside itself."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from paperscale import __version__
from paperscale.errors import UserError, nearest
from paperscale.report import default, names, spec
from paperscale.report.figures import draw
from paperscale.report.pictures import Album, Picture
from paperscale.report.runs import Members, Record, lookup, matches, may_be, mismatches, read_records
from paperscale.report.spec import Section, Spec
from paperscale.report.tables import Block, run_rows, table_rows
from paperscale.report.verdicts import FAILS, HOLDS, OPEN, WAITS, Verdict, judge

_ASSETS = Path(__file__).parent
_CLASSES = {HOLDS: "yes", FAILS: "no", OPEN: "open", WAITS: "open"}  # of the stylesheet
_PLURAL = {HOLDS: "hold", FAILS: "do not hold", OPEN: "are not decided", WAITS: "have no result"}
_SINGULAR = {HOLDS: HOLDS, FAILS: FAILS, OPEN: "is not decided", WAITS: "has no result"}


@dataclass(frozen=True)
class Report:
    """A page that is ready.

    Attributes:
        html: the page.
        runs: how many runs it shows.
        finished: how many of them are finished.
        verdicts: what is said of checks, such as ``hold``, to their number.
        warnings: what the user should know.
    """

    html: str
    runs: int
    finished: int
    verdicts: dict[str, int]
    warnings: list[str]


def make(paper: str, folders: Sequence[Path], reading: Callable[[list[Record]], Iterable[Record]]) -> Report:
    """Return a paper's report.

    Args:
        paper: its name: of the folder of its recipes, or the last part of its module's name.
        folders: of runs.
        reading: gives back the records whose curves are read, one after another, and may show how far it is.

    Raises:
        UserError: there is no such paper, its declaration is wrong, or a folder does not exist.
    """
    files = spec.spec_files()
    if paper in files:
        declared = spec.read(files[paper])
        groups = [group for section in declared.sections for group in section.groups.values()]
        records = read_records(folders, lambda info: any(may_be(group, info.recipe) for group in groups))
        names.check(files[paper], declared, records)
    else:
        records = [r for r in read_records(folders, lambda info: True) if default.module_of(r.recipe) == paper]
        known = default.papers()
        if not records and paper not in known:
            papers = sorted({*files, *known})
            hint = nearest(paper, papers) or f"; there are {', '.join(papers)}"
            raise UserError(f"no paper '{paper}', neither recipes nor runs of it{hint}")
        declared = default.default_spec(paper, records)
    laid_out = [(section, _blocks(section, records)) for section in declared.sections]
    _read_curves(laid_out, reading)
    return _render(declared, laid_out, records, folders)


# -- which runs stand where ----------------------------------------------------------------------------------------


def _blocks(section: Section, records: Sequence[Record]) -> list[Block]:
    """Return a section's blocks: one where it is not split, or has no runs."""
    mine = [record for record in records if any(matches(record, group) for group in section.groups.values())]
    parts: dict[str, list[Record]] = {}
    for record in mine:
        parts.setdefault(json.dumps([lookup(record.recipe, key) for key in section.split], default=str), []).append(
            record
        )
    parts = parts or {json.dumps([None] * len(section.split)): []}
    settings = [dict(zip(section.split, json.loads(values), strict=True)) for values in parts]
    telling = [key for key in section.split if len({str(setting[key]) for setting in settings}) > 1]
    blocks = []
    for setting, chosen in zip(settings, parts.values(), strict=True):
        shown = [key for key in section.split if key in telling or (chosen and key == section.split[0])]
        heading = ", ".join(f"{key} {setting[key]}" for key in shown)
        members = {name: Members.of(group, chosen) for name, group in section.groups.items()}
        blocks.append(Block(heading, setting, members))
    return sorted(blocks, key=lambda block: block.heading)


def _left_out(section: Section, records: Sequence[Record]) -> list[str]:
    """Return the runs of a section's recipes that are in no row of it, each with the keys that keep it out."""
    found = []
    for record in records:
        groups = [group for group in section.groups.values() if may_be(group, record.info.recipe)]
        differing = [mismatches(record, group) for group in groups]
        if differing and all(differing):
            keys = (f"{key} {lookup(record.recipe, key)}" for key in min(differing, key=len))
            found.append(f"{record.run.name} ({', '.join(keys)})")
    return found


def _read_curves(
    laid_out: Sequence[tuple[Section, list[Block]]], reading: Callable[[list[Record]], Iterable[Record]]
) -> None:
    """Read each run's file once, for all figures and checks that it is in."""
    needed: dict[Record, set[str]] = {}
    for section, blocks in laid_out:
        for metric, groups in names.curves(section):
            for record in (each for block in blocks for name in groups for each in block.members[name].all):
                needed.setdefault(record, set()).add(metric)
    for record in reading(list(needed)):
        prefixes = sorted(metric for metric in needed[record] if metric.endswith("/"))
        record.read_curves(needed[record].difference(prefixes), prefixes)


# -- the page ------------------------------------------------------------------------------------------------------


def _render(
    declared: Spec,
    laid_out: Sequence[tuple[Section, list[Block]]],
    records: Sequence[Record],
    folders: Sequence[Path],
) -> Report:
    album = Album()
    listed: set[Record] = set()
    sections: list[dict[str, Any]] = [
        {
            "title": section.title,
            "paper": section.paper,
            "about": section.about,
            "blocks": [_block(section, block, album, listed) for block in blocks],
            "left_out": _left_out(section, records),
        }
        for section, blocks in laid_out
    ]
    shown = {r for _, blocks in laid_out for block in blocks for m in block.members.values() for r in m.all}
    verdicts = [
        (f"s{number}", block["heading"], verdict)
        for number, section in enumerate(sections, 1)
        for block in section["blocks"]
        for verdict in block["verdicts"]
    ]
    said = [verdict.word for _, _, verdict in verdicts]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    finished = sum(record.finished for record in shown)
    page = environment.from_string((_ASSETS / "page.html.j2").read_text()).render(
        spec=declared,
        sections=sections,
        decided=[each for each in verdicts if each[-1].word != WAITS],
        waiting=said.count(WAITS),
        style=Markup((_ASSETS / "page.css").read_text()),  # noqa: S704  ours
        script=Markup((_ASSETS / "hover.js").read_text()),  # noqa: S704
        classes=_CLASSES,
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
        folders=", ".join(str(folder.absolute()) for folder in folders),
        runs=len(shown),
        finished=finished,
    )
    return Report(page, len(shown), finished, _told(said), _warnings(laid_out))


def _block(section: Section, block: Block, album: Album, listed: set[Record]) -> dict[str, Any]:
    """Return a block as the template takes it; a block without tables does not list runs that are in ``listed``."""
    pictures: list[Picture] = []
    notes: list[str] = []
    if section.pictures:
        pictures, notes = album.of_section(section.pictures, block.members)
    verdicts: list[Verdict] = [judge(check, block.members) for check in section.checks]
    drawn = [draw(figure, block.members) for figure in section.figures]
    columns, runs = run_rows(section, block)
    mine = {record for members in block.members.values() for record in members.all}
    if not section.tables and mine <= listed:
        runs = []
    listed |= mine
    return {
        "heading": block.heading,
        "tables": [table_rows(table, block) for table in section.tables],
        "verdicts": verdicts,
        "figures": [
            {"title": each.title, "svg": Markup(each.svg), "notes": each.notes}  # noqa: S704  escaped where drawn
            for each in drawn
        ],
        "pictures": pictures,
        "picture_notes": notes,
        "columns": columns,
        "runs": runs,
    }


def _told(said: Sequence[str]) -> dict[str, int]:
    """Return how often each word is said, the word as it goes with the number: ``1 holds``, ``2 hold``."""
    counts = {word: said.count(word) for word in _PLURAL if word in said}
    return {(_SINGULAR if number == 1 else _PLURAL)[word]: number for word, number in counts.items()}


def _warnings(laid_out: Sequence[tuple[Section, list[Block]]]) -> list[str]:
    """Return what is probably not meant: means of runs that differ in more than the seed, metrics that no run has."""
    groups = [pair for _, blocks in laid_out for block in blocks for pair in block.members.items()]
    differing = ((name, members.differences()) for name, members in groups)
    found = [f"the runs of '{name}' differ in {', '.join(keys)}" for name, keys in differing if keys]
    found += [warning for section, blocks in laid_out for warning in names.unlogged(section, blocks)]
    return list(dict.fromkeys(found))
