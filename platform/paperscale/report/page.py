"""From a declaration and runs to one HTML page that needs nothing beside itself."""

from __future__ import annotations

import datetime
import fnmatch
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from paperscale import __version__
from paperscale.errors import UserError, nearest
from paperscale.report import default, spec
from paperscale.report.figures import draw
from paperscale.report.pictures import Album, Picture
from paperscale.report.runs import Members, Record, flatten, lookup, matches, read_records
from paperscale.report.spec import Group, Section, Spec
from paperscale.report.tables import Block, run_rows, table_rows
from paperscale.report.verdicts import FAILS, HOLDS, OPEN, Verdict, judge

_ASSETS = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """A page that is ready.

    Attributes:
        html: the page.
        runs: how many runs it shows.
        finished: how many of them are finished.
        verdicts: word of each check to their number.
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
        records = read_records(folders, lambda info: any(_may_be(group, info.recipe) for group in groups))
    else:
        records = [r for r in read_records(folders, lambda info: True) if default.module_of(r.recipe) == paper]
        known = default.papers()
        if not records and paper not in known:
            names = sorted({*files, *known})
            hint = nearest(paper, names) or f"; there are {', '.join(names)}"
            raise UserError(f"no paper '{paper}', neither recipes nor runs of it{hint}")
        declared = default.default_spec(paper, records)
    laid_out = [(section, _blocks(section, records)) for section in declared.sections]
    _read_curves(laid_out, reading)
    return _render(declared, laid_out, records, folders)


def _may_be(group: Group, recipe: str) -> bool:
    return fnmatch.fnmatchcase(recipe, group.recipe)


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


def _read_curves(
    laid_out: Sequence[tuple[Section, list[Block]]], reading: Callable[[list[Record]], Iterable[Record]]
) -> None:
    """Read each run's file once, for all figures that it is in."""
    needed: dict[Record, tuple[set[str], set[str]]] = {}
    for section, blocks in laid_out:
        for figure in section.figures:
            for block in blocks:
                for name in figure.groups or block.members:
                    for record in block.members[name].all if figure.kind != "dots" else []:
                        names, prefixes = needed.setdefault(record, (set(), set()))
                        if figure.kind == "layers":
                            prefixes.add(f"{figure.metric.rstrip('/')}/")
                        else:
                            names.add(figure.metric)
    for record in reading(list(needed)):
        record.read_curves(needed[record][0], sorted(needed[record][1]))


# -- the page ------------------------------------------------------------------------------------------------------


def _render(
    declared: Spec,
    laid_out: Sequence[tuple[Section, list[Block]]],
    records: Sequence[Record],
    folders: Sequence[Path],
) -> Report:
    album = Album()
    listed: set[Record] = set()
    sections = [_section(section, blocks, album, listed) for section, blocks in laid_out]
    shown = {r for _, blocks in laid_out for block in blocks for m in block.members.values() for r in m.all}
    verdicts = [
        (f"s{number}", verdict)
        for number, section in enumerate(sections, 1)
        for block in section["blocks"]
        for verdict in block["verdicts"]
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    finished = sum(record.finished for record in shown)
    page = environment.from_string((_ASSETS / "page.html.j2").read_text()).render(
        spec=declared,
        sections=sections,
        decided=[(place, verdict) for place, verdict in verdicts if verdict.word != OPEN],
        undecided=sum(verdict.word == OPEN for _, verdict in verdicts),
        style=Markup((_ASSETS / "page.css").read_text()),  # noqa: S704  ours
        script=Markup((_ASSETS / "hover.js").read_text()),  # noqa: S704
        words={HOLDS: "yes", FAILS: "no", OPEN: "open"},
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
        folders=", ".join(str(folder.absolute()) for folder in folders),
        runs=len(shown),
        finished=finished,
    )
    counts = {word: sum(verdict.word == word for _, verdict in verdicts) for word in (HOLDS, FAILS, OPEN)}
    return Report(page, len(shown), finished, counts, _warnings(laid_out, records))


def _section(section: Section, blocks: Sequence[Block], album: Album, listed: set[Record]) -> dict[str, Any]:
    return {
        "title": section.title,
        "paper": section.paper,
        "about": section.about,
        "blocks": [_block(section, block, album, listed) for block in blocks],
    }


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


def _warnings(laid_out: Sequence[tuple[Section, list[Block]]], records: Sequence[Record]) -> list[str]:
    """Return what is probably not meant: means of runs that differ in more than the seed, keys that no run has."""
    groups = [pair for _, blocks in laid_out for block in blocks for pair in block.members.items()]
    differing = ((name, members.differences()) for name, members in groups)
    found = [f"the runs of '{name}' differ in {', '.join(keys)}" for name, keys in differing if keys]
    for name, members in groups:
        recipes = [record.recipe for record in records if _may_be(members.group, record.info.recipe)]
        for key, value in members.group.where.items():
            if recipes and value is not None and all(lookup(recipe, key) is None for recipe in recipes):
                hint = nearest(key, flatten(recipes[-1]))
                found.append(f"group '{name}': no run of '{members.group.recipe}' has the key '{key}'{hint}")
    return list(dict.fromkeys(found))
