"""The report of a paper that declares none: every recipe of its module, with the results and the curves there are."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from paperscale import assets, recipes
from paperscale.errors import UserError
from paperscale.report.runs import Record, lookup, quantity
from paperscale.report.spec import Column, Figure, Group, Pictures, Section, Spec, Table

_LOSS = "train/loss"
_MOST_COLUMNS = 6


def module_of(recipe: object) -> str:
    """Return the last part of the name of the module that a recipe's model lies in, empty where there is none."""
    name = lookup(recipe, "model.class_path", "")
    parts = name.split(".") if isinstance(name, str) else []
    return parts[-2] if len(parts) > 1 else ""


def papers() -> dict[str, list[str]]:
    """Return the names of the recipes of each module that a recipe names a model of."""
    found: dict[str, list[str]] = {}
    for name, path in recipes.all_recipes().items():
        if module := module_of(recipes.read(path)):
            found.setdefault(module, []).append(name)
    return found


def default_spec(paper: str, records: Sequence[Record]) -> Spec:
    """Return what a paper's report shows where nobody has said it.

    Args:
        paper: last part of a module's name.
        records: the runs of its recipes.
    """
    names = dict.fromkeys([*papers().get(paper, []), *(record.info.recipe for record in records)])
    groups = {name: Group(name, note=_paper_number(name)) for name in names}
    metrics = _metrics(records, "test/") or _metrics(records, "val/") or ["test/accuracy"]
    columns = [Column(quantity(metric, _unit(metric)), metric, _unit(metric)) for metric in metrics[:_MOST_COLUMNS]]
    rows: dict[str, list[None]] = {name: [None] * len(columns) for name in names}
    curves = [_LOSS, *_metrics(records, "val/")]
    figures = [Figure("curves", metric, unit=_unit(metric)) for metric in curves[:_MOST_COLUMNS]]
    section = Section("Results", groups, "", "", ["data.path"], [Table(columns, rows)], [], figures, Pictures())
    title, citation, link = _heading(paper)
    return Spec(title, [section], citation, link)


def _unit(metric: str) -> str:
    return "%" if "accuracy" in metric else ""


def _metrics(records: Sequence[Record], prefix: str) -> list[str]:
    """Return the names of the results that begin so."""
    return list(dict.fromkeys(key for record in records for key in record.results if key.startswith(prefix)))


def _paper_number(name: str) -> str:
    """Return what a recipe's header says of the paper's number."""
    known = recipes.all_recipes()
    try:
        return f"paper: {recipes.header(known[name]).fields['paper']}" if name in known else ""
    except UserError:  # a recipe of the user's without a header
        return ""


def _heading(paper: str) -> tuple[str, str, str]:
    """Return title, citation and link, from the first line of a paper's module where it is one of ours."""
    path = assets.PACKAGE / "papers" / f"{paper}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) if path.is_file() else ""
    first = (text or paper).splitlines()[0]
    link = re.search(r"https?://\S+", first)
    title, _, citation = first.replace(link[0] if link else "", "").strip().partition(". ")
    return title.rstrip("."), citation, link[0] if link else ""
