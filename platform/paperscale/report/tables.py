"""A section's tables: the paper's numbers, ours, and the single runs."""

from __future__ import annotations

import contextlib
import datetime
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paperscale import recipes
from paperscale.errors import UserError
from paperscale.report.runs import Members, Record, finals, lookup
from paperscale.report.spec import Column, Group, Section, Table
from paperscale.report.verdicts import Sample, decimals


@dataclass(frozen=True)
class Ours:
    """A cell of a table.

    Attributes:
        number: mean and spread, or what is there in its place.
        remark: how many seeds, or what is missing.
        command: what supplies it, empty where it is there.
    """

    number: str
    remark: str = ""
    command: str = ""


@dataclass(frozen=True)
class Block:
    """A section's content for one value of what it is split by.

    Attributes:
        heading: what these runs have in common, empty where the section is not split.
        setting: key to value.
        members: the runs by group.
    """

    heading: str
    setting: dict[str, Any]
    members: dict[str, Members]


def _commands(group: Group, setting: dict[str, Any], columns: Sequence[Column]) -> list[str]:
    """Return what makes a run of a group, and then what tests it by the protocols of a table."""
    own: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # a recipe that only the runs know
        own = recipes.read(recipes.find(group.recipe))
    keys = {key: value for key, value in {**group.where, **setting}.items() if not isinstance(value, (list, dict))}
    keys = {key: value for key, value in keys.items() if value is not None and not _is_pattern(value)}
    keys = {key: value for key, value in keys.items() if lookup(own, key) != value}
    words = [_setting(key, value) for key, value in keys.items()]
    protocols = dict.fromkeys(column.evaluation for column in columns)
    wanted = [protocol for protocol in protocols if protocol not in ("", lookup(own, "data.eval_crop"))]
    tests = [f"paperscale test RUN data.eval_crop={protocol}" for protocol in wanted]
    return [group.command or shlex.join(["paperscale", "fit", group.recipe, *words]), *tests]


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and any(character in value for character in "*?[")


def _ours(members: Members, column: Column) -> Ours:
    """Return what the runs of a group have come to."""
    counted = members.counted
    if not counted:
        states = ", ".join(f"{record.run.name} {record.state}" for record in members.unfinished)
        return Ours("not finished", states) if states else Ours("not run")
    sample = Sample.of(finals(counted, column.metric, column.unit, column.evaluation))
    total = len(sample.values) + sample.broken
    remarks = []
    if total < len(counted):
        remarks.append(f"{len(counted) - total} of {len(counted)} without it")
    if sample.broken:
        remarks.append(f"{sample.broken} of {total} not finite")
    if not sample.values:
        if column.evaluation:
            test = f"paperscale test {shlex.quote(counted[-1].run.name)} data.eval_crop={column.evaluation}"
            return Ours("not evaluated", ", ".join(remarks[1:]), test)
        return Ours("none", ", ".join(remarks) or f"no {column.metric}")
    with_value = [r for r in counted if Sample.of(finals([r], column.metric, column.unit, column.evaluation)).values]
    seeds = len({str(record.recipe.get("seed_everything")) for record in with_value})
    said = f"{seeds} seed{'s' * (seeds > 1)}"
    said = f"{len(with_value)} runs, {said}" if len(with_value) != seeds else said
    return Ours(str(sample), ", ".join([said, *remarks]))


def table_rows(table: Table, block: Block) -> dict[str, Any]:
    """Return a table as the template takes it."""
    with_paper = [any(row[at] is not None for row in table.rows.values()) for at in range(len(table.columns))]
    rows = []
    for name, numbers in table.rows.items():
        members = block.members[name]
        cells = [_ours(members, column) for column in table.columns]
        rows.append(
            {
                "label": members.group.label or name,
                "note": members.group.note,
                "commands": [] if members.counted else _commands(members.group, block.setting, table.columns),
                "cells": [
                    {"paper": _paper_text(number) if shown else None, "ours": cell}
                    for number, shown, cell in zip(numbers, with_paper, cells, strict=True)
                ],
                "warning": ", ".join(members.differences()),
            }
        )
    columns = [{"title": f"{c.title}", "paper": shown} for c, shown in zip(table.columns, with_paper, strict=True)]
    return {"title": table.title, "note": table.note, "columns": columns, "rows": rows}


def _paper_text(number: Any) -> str:
    if isinstance(number, float):
        return f"{number:.{max(2, min(6, len(repr(number).partition('.')[2])))}f}"
    return "" if number is None else str(number)


# -- single runs ---------------------------------------------------------------------------------------------------


def run_rows(section: Section, block: Block) -> tuple[list[Column], list[dict[str, Any]]]:
    """Return the columns of the list of runs, and what it says of each: by row, then by seed."""
    columns = list(dict.fromkeys(column for table in section.tables for column in table.columns))
    rows = []
    for name, members in block.members.items():
        for record in sorted(members.all, key=_seed):
            values = [finals([record], c.metric, c.unit, c.evaluation) for c in columns]
            state = "repeated by a newer run" if record in members.repeats else record.state
            rows.append(
                {
                    "name": record.run.name,
                    "path": str(record.run.path),
                    "link": _wandb_link(record),
                    "group": members.group.label or name,
                    "state": state,
                    "seed": record.recipe.get("seed_everything", ""),
                    "values": [f"{v[0]:.{decimals(v[0], None)}f}" if v else "" for v in values],
                    "step": "" if record.step is None else f"{record.step:,}",
                    "date": f"{datetime.datetime.fromtimestamp(record.info.created):%Y-%m-%d}",
                    "versions": _versions(record),
                    "hardware": record.hardware,
                    "command": _command(record),
                }
            )
    return columns, rows


def _seed(record: Record) -> tuple[bool, int, float]:
    seed = record.recipe.get("seed_everything")
    return (True, seed, record.info.created) if isinstance(seed, int) else (False, 0, record.info.created)


_OF_A_SWEEP = ("--sweep", "--max-parallel", "--name")


def _command(record: Record) -> str:
    """Return what makes a run: of one of a sweep, the sweep's command with the values that this run was given."""
    if not record.info.group:
        return record.info.command
    kept, given = [], []
    words = iter(shlex.split(record.info.command))
    for word in words:
        option, joined, value = word.partition("=")
        if option not in _OF_A_SWEEP:
            kept.append(word)
            continue
        value = value if joined else next(words, "")
        if option == "--sweep":
            key = value.partition("=")[0]
            given.append(_setting(key, lookup(record.recipe, "data.path" if key == "data" else key)))
    return shlex.join([*kept, *given])


def _setting(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _versions(record: Record) -> str:
    packages = [f"{name} {record.versions[name]}" for name in ("torch", "paperscale") if name in record.versions]
    return ", ".join([*packages, *([record.code] if record.code else [])])


def _wandb_link(record: Record) -> str:
    """Return the address of the W&B run, where it is known to have been sent."""
    tracking = record.recipe.get("tracking") or {}
    entity, project = tracking.get("entity"), tracking.get("project")
    sent = any((record.run.path / "wandb").glob("run-*"))
    return f"https://wandb.ai/{entity}/{project}/runs/{record.info.wandb_id}" if entity and project and sent else ""
