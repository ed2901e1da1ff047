"""Whether the recipes, keys and metrics that a declaration names are there."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paperscale import recipes
from paperscale.errors import UserError, nearest
from paperscale.report.runs import Record, flatten, lookup
from paperscale.report.spec import Group, Section, Spec
from paperscale.report.tables import Block

_ABSENT = object()


def check(path: Path, declared: Spec, records: Sequence[Record]) -> None:
    """Check the recipes of a declaration's groups and, where there are runs, the keys of ``where``.

    Only runs hold resolved recipes, in which every key stands.

    Raises:
        UserError: neither a recipe nor a run is called so, or none of that name has such a key.
    """
    known = recipes.all_recipes()
    names = {*known, *(record.info.recipe for record in records)}
    for number, section in enumerate(declared.sections):
        for name, group in section.groups.items():
            at = f"{path}: sections[{number}].groups.{name}"
            chosen = set(fnmatch.filter(names, group.recipe))
            if not chosen:
                hint = nearest(group.recipe, names) or "; `paperscale recipes` lists them all"
                raise UserError(f"{at}.recipe: no recipe '{group.recipe}'{hint}")
            if runs := [record.recipe for record in records if record.info.recipe in chosen]:
                _check_keys(group, [*runs, *_contents(known[each] for each in chosen & known.keys())], at)


def _contents(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with contextlib.suppress(UserError):  # one that is not asked for here
            yield recipes.read(path)


def _check_keys(group: Group, having: Sequence[dict[str, Any]], at: str) -> None:
    for key in group.where:
        if all(lookup(recipe, key, _ABSENT) is _ABSENT for recipe in having):
            keys = dict.fromkeys(key for recipe in having for key in flatten(recipe))
            hint = nearest(key, keys) or "; write a key of a run's recipe.yaml, without init_args"
            raise UserError(f"{at}.where: no run of '{group.recipe}' has the key '{key}'{hint}")


def unlogged(section: Section, blocks: Sequence[Block]) -> list[str]:
    """Return a warning for each metric that a section shows and none of its runs has logged.

    A section without finished runs has none: what is logged at the end is still to come.
    """
    members = [each for block in blocks for each in block.members.values()]
    finished = [record for each in members for record in each.counted]
    if not finished:
        return []
    results = {key for record in finished for key in record.results}
    results |= {key for record in finished for found in record.evaluations for key in found["metrics"]}
    read = {key for each in members for record in each.all for key in record.curves}
    missing = {metric: results for metric in finals(section) if not metric.endswith("/") and metric not in results}
    for metric, _ in curves(section):
        if not any(key.startswith(metric) if metric.endswith("/") else key == metric for key in read):
            logged = finished[-1].logged()
            missing[metric] = {f"{key.partition('/')[0]}/" for key in logged} if metric.endswith("/") else logged
    return [f"'{section.title}': no run has logged {metric}{nearest(metric, of)}" for metric, of in missing.items()]


def finals(section: Section) -> Iterator[str]:
    """Yield the metrics that a section shows final values of; of layers, their prefix with ``/`` at its end."""
    yield from (column.metric for table in section.tables for column in table.columns)
    yield from (check.metric for check in section.checks)
    yield from (figure.metric for figure in section.figures if figure.kind == "dots")


def curves(section: Section) -> Iterator[tuple[str, list[str]]]:
    """Yield the metrics whose curves a section needs, of layers as :func:`finals` does, and the groups they are of."""
    for figure in section.figures:
        if figure.kind == "curves":
            yield figure.metric, figure.groups or list(section.groups)
        elif figure.kind == "layers":
            yield f"{figure.metric.rstrip('/')}/", figure.groups or list(section.groups)
    yield from ((metric, list(section.groups)) for metric in finals(section) if metric.endswith("/"))
