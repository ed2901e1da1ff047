"""What a paper's report shows: ``recipes/<paper>/_report.yaml``, which declares and holds no code."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from paperscale import assets
from paperscale.errors import UserError, nearest
from paperscale.recipes import parse_yaml, what_is_wrong

NAME = "_report.yaml"
KINDS = ("curves", "layers", "dots")
UNITS = ("", "%", "error %")
SCALES = ("linear", "log")
MOMENTS = {
    "first": "as first logged",
    "mean": "mean over the training",
    "geometric": "geometric mean over the training",
    "last": "at the end of training",
}
"""Which of a layer's logged values a figure shows, in words."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed: a row of tables, a line of figures.

    Attributes:
        recipe: name of their recipe; may hold wildcards.
        where: values of keys of the resolved recipe, in short form (``model.network.n``); texts may hold wildcards.
        label: what the group is called, by default its name.
        note: a remark beside its label.
        command: what makes such a run, by default put together from ``recipe`` and ``where``.
    """

    recipe: str
    where: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    note: str = ""
    command: str = ""


@dataclass(frozen=True)
class Column:
    """A number of each run.

    Attributes:
        title: of the column.
        metric: its name in ``results.json``; ending in ``/``, the mean over layers of the last values logged under
            ``PREFIX/NN_name``.
        unit: ``%`` and ``error %`` show a fraction x as 100 x and 100 (1 - x); empty shows it as it is.
        evaluation: protocol of ``data.eval_crop`` that the number belongs to; empty for the run's own result.
    """

    title: str
    metric: str
    unit: str = ""
    evaluation: str = ""


@dataclass(frozen=True)
class Table:
    """The paper's numbers and ours.

    Attributes:
        columns: what is compared.
        rows: group to the paper's numbers in the order of the columns; texts are shown as they are.
        title: of the table.
        note: what a reader must know of its numbers.
    """

    columns: list[Column]
    rows: dict[str, list[Any]]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A statement that the runs bear out or not.

    Attributes:
        claim: the statement in words.
        metric: as in :class:`Column`.
        unit: as in :class:`Column`.
        evaluation: as in :class:`Column`.
        order: groups whose means must ascend, by two standard errors; or else
        group: the group whose mean must be
        near: this number, within
        tolerance: this much;
        at_most: no more than this;
        at_least: no less than this.
    """

    claim: str
    metric: str
    unit: str = ""
    evaluation: str = ""
    order: list[str] = field(default_factory=list)
    group: str = ""
    near: float | None = None
    tolerance: float | None = None
    at_most: float | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class Figure:
    """A picture drawn from numbers.

    Attributes:
        kind: ``curves`` (a metric over the steps), ``layers`` (metrics ``PREFIX/NN_name`` over NN), ``dots`` (a number
            of each run, see :class:`Column`).
        metric: its name, of ``layers`` the prefix.
        groups: which, by default all of the section.
        title: of the figure.
        unit: as in :class:`Column`.
        evaluation: of ``dots``, as in :class:`Column`.
        x: ``linear`` or ``log``.
        y: ``linear`` or ``log``.
        smooth: share of a run's steps over which a curve is averaged.
        at: of ``layers``, which of the logged values: ``first``, ``last``, or over all of them ``mean``, ``geometric``.
        sort: of ``layers``, whether they are ordered by their values, largest first.
    """

    kind: str
    metric: str
    groups: list[str] = field(default_factory=list)
    title: str = ""
    unit: str = ""
    evaluation: str = ""
    x: str = "linear"
    y: str = "linear"
    smooth: float = 0.0
    at: str = "last"
    sort: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures that the runs have logged.

    Attributes:
        keys: names they were logged under; may hold wildcards.
        groups: which, by default all of the section.
        most: pictures of a group.
    """

    keys: list[str] = field(default_factory=lambda: ["*"])
    groups: list[str] = field(default_factory=list)
    most: int = 4


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        groups: the runs it is about, by name.
        about: what the paper shows there.
        paper: where in the paper.
        split: keys of the recipe: runs that differ in them stand in blocks of their own.
        tables: tables.
        checks: statements.
        figures: figures.
        pictures: pictures of the runs.
    """

    title: str
    groups: dict[str, Group]
    about: str = ""
    paper: str = ""
    split: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    pictures: Pictures | None = None


@dataclass(frozen=True)
class Spec:
    """A report.

    Attributes:
        title: of the paper.
        sections: its parts.
        citation: authors, year, venue.
        link: to the paper.
        about: what opens the page.
    """

    title: str
    sections: list[Section]
    citation: str = ""
    link: str = ""
    about: str = ""


def spec_files() -> dict[str, Path]:
    """Return the declared reports by paper: those that ship, then ``./recipes`` of the user's project, which wins."""
    folders = [assets.recipes_dir(), Path("recipes").resolve()]
    return {path.parent.name: path for folder in folders for path in sorted(folder.glob(f"*/{NAME}"))}


def read(path: Path) -> Spec:
    """Read a report's declaration.

    Raises:
        UserError: a field is unknown, missing or of another kind, or names a group that is not there.
    """
    try:
        content = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {what_is_wrong(error)}; mend the YAML") from error
    spec = _Reader(path).value(Spec, content, "")
    for number, section in enumerate(spec.sections):
        _check_section(section, f"{path}: sections[{number}]")
    return spec


class _Reader:
    """Makes dataclasses of YAML, and says where it cannot."""

    def __init__(self, path: Path):
        self.path = path

    def value(self, kind: Any, content: Any, at: str) -> Any:
        """Return ``content`` as a ``kind``."""
        if kind is Any:
            return content
        if is_dataclass(kind):
            return self._object(kind, content, at)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):  # X | None
            return None if content is None else self.value(arguments[0], content, at)
        if origin is list and isinstance(content, list):
            return [self.value(arguments[0], item, f"{at}[{number}]") for number, item in enumerate(content)]
        if origin is dict and isinstance(content, dict):
            return {str(key): self.value(arguments[1], item, f"{at}.{key}") for key, item in content.items()}
        if kind is float and isinstance(content, int) and not isinstance(content, bool):
            return float(content)
        if not isinstance(content, origin or kind):
            words = {list: "a list", dict: "a mapping", str: "a text", float: "a number", int: "a whole number"}
            wanted = words.get(origin or kind, "true or false")
            raise UserError(f"{self.path}: {at} is {content!r}; write {wanted}")
        return content

    def _object(self, kind: Any, content: Any, at: str) -> Any:
        of = f"{at}: " if at else ""
        names = {each.name: each for each in fields(kind)}
        if not isinstance(content, dict):
            raise UserError(f"{self.path}: {of}a mapping is needed; give it {', '.join(names)}")
        for name in content:
            if name not in names:
                hint = nearest(str(name), names) or f"; use {', '.join(names)}"
                raise UserError(f"{self.path}: {of}unknown field '{name}'{hint}")
        for name, each in names.items():
            if name not in content and each.default is MISSING and each.default_factory is MISSING:
                raise UserError(f"{self.path}: {of}field '{name}' is missing; add it")
        hints = typing.get_type_hints(kind)
        found = {n: self.value(hints[n], item, f"{at}.{n}".lstrip(".")) for n, item in content.items()}
        return kind(**found)


def _check_section(section: Section, at: str) -> None:
    """Check what the kinds of the fields do not tell.

    Raises:
        UserError: a name is not one of those there are, or a check cannot be decided.
    """

    def one_of(value: str, known: typing.Iterable[str], where: str) -> None:
        known = list(known)
        if value not in known:
            hint = nearest(value, known) or f"; use {', '.join(map(repr, known))}"
            raise UserError(f"{at}.{where}: no '{value}'{hint}")

    for number, table in enumerate(section.tables):
        where = f"tables[{number}]"
        for column in table.columns:
            one_of(column.unit, UNITS, f"{where}: unit of '{column.title}'")
        for name, row in table.rows.items():
            one_of(name, section.groups, f"{where}.rows")
            if len(row) != len(table.columns):
                raise UserError(
                    f"{at}.{where}.rows.{name}: {len(row)} numbers for {len(table.columns)} columns; write one for "
                    "each, null where the paper has none"
                )
    for number, figure in enumerate(section.figures):
        where = f"figures[{number}]"
        for value, known, name in (
            (figure.kind, KINDS, "kind"),
            (figure.unit, UNITS, "unit"),
            (figure.x, SCALES, "x"),
            (figure.y, SCALES, "y"),
            (figure.at, MOMENTS, "at"),
        ):
            one_of(value, known, f"{where}.{name}")
        for name in figure.groups:
            one_of(name, section.groups, f"{where}.groups")
    for name in section.pictures.groups if section.pictures else []:
        one_of(name, section.groups, "pictures.groups")
    for number, check in enumerate(section.checks):
        where = f"checks[{number}]"
        one_of(check.unit, UNITS, f"{where}.unit")
        for name in check.order or [check.group]:
            one_of(name, section.groups, f"{where}.{'order' if check.order else 'group'}")
        bounds = [check.near is not None and check.tolerance is not None, check.at_most is not None]
        bounds.append(check.at_least is not None)
        if bool(check.order) == any(bounds):
            raise UserError(
                f"{at}.{where}: a check needs one thing to decide by; give either `order`, or `group` with `near` and "
                "`tolerance`, `at_most` or `at_least`"
            )
