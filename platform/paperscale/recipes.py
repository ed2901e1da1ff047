"""Finding recipes, reading what their headers say, and turning a command line into a recipe plus overrides.

Imports neither torch nor Lightning: listing recipes must be instant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paperscale import assets
from paperscale.errors import UserError, nearest

HEADER_FIELDS = ("run", "needs", "paper", "measured")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OVERRIDE = re.compile(r"^-{0,2}([A-Za-z_][\w.]*\+?)=(.*)$", re.DOTALL)  # key=value, key+=value


@dataclass(frozen=True)
class RecipeHeader:
    """The comment that opens a recipe.

    Attributes:
        path: the recipe.
        title: model and data set.
        source: paper and section.
        fields: ``run``, ``needs``, ``paper`` (the paper's number), ``measured`` (ours).
        dataset: the folder of shards the recipe trains on.
    """

    path: Path
    title: str
    source: str
    fields: dict[str, str]
    dataset: str

    @property
    def name(self) -> str:
        """Return what the recipe is called on the command line."""
        return self.path.stem


def all_recipes() -> dict[str, Path]:
    """Return every recipe by name: those that ship with Paperscale, then ``./recipes`` of the user's project.

    A file whose name begins with ``_`` is no recipe by itself: see :func:`all_overlays`.
    """
    return {name: path for name, path in _all_files().items() if not name.startswith("_")}


def all_overlays() -> dict[str, Path]:
    """Return every overlay by name, such as ``_bert-no-nsp``: what is merged over a recipe to change a part of it."""
    return {name: path for name, path in _all_files().items() if name.startswith("_") and name != "_report"}


def _all_files() -> dict[str, Path]:
    folders = [assets.recipes_dir(), Path("recipes").resolve()]
    return {path.stem: path for folder in folders for path in sorted(folder.rglob("*.yaml"), key=_by_size)}


def _by_size(path: Path) -> list[tuple[int, str]]:
    """Return what recipes are sorted by: numbers in their names count as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))]


def find(name: str) -> Path:
    """Return the recipe or the overlay called ``name``, or the file of that path.

    Raises:
        UserError: there is none; suggests the nearest name.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no recipe file {name}; `paperscale recipes` lists those that can be named")
        return path
    known = all_overlays() if name.startswith("_") else all_recipes()
    if name not in known:
        if name.startswith("_"):
            raise UserError(f"no overlay '{name}'{nearest(name, known)}; there are {', '.join(known)}")
        raise UserError(f"no recipe '{name}'{nearest(name, known)}; `paperscale recipes` lists them all")
    return known[name]


def header(path: Path) -> RecipeHeader:
    """Parse the comment that opens a recipe.

    Raises:
        UserError: the first line or a field is missing.
    """
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    if not comment:
        raise UserError(f"{path}: opens without a header; begin with '# TITLE    PAPER' as CONTRIBUTING.md shows")
    title, _, source = re.sub(r" {2,}", "\t", comment[0]).partition("\t")
    fields: dict[str, str] = {}
    for line in comment[1:]:
        name, _, text = line.partition(" ")
        if name in HEADER_FIELDS:
            fields[name] = text.strip()
    missing = [name for name in HEADER_FIELDS if name not in fields]
    if missing:
        raise UserError(f"{path}: the header lacks {', '.join(missing)}; CONTRIBUTING.md shows all fields")
    data = read(path).get("data", {}).get("init_args", {})
    return RecipeHeader(path, title, source, fields, data.get("path", ""))


def read(path: Path) -> dict[str, Any]:
    """Return a recipe's content.

    Raises:
        UserError: it is not valid YAML.
    """
    try:
        content = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML: {what_is_wrong(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping with model, data and trainer")
    return content


def split_override(word: str) -> tuple[str, str] | None:
    """Return key and value of ``key=value``, ``None`` for anything else."""
    match = _OVERRIDE.match(word)
    return (match[1], match[2]) if match else None


def _path_of_data(key: str, value: str) -> tuple[str, str]:
    """Let ``data=PATH`` say which set a recipe trains on; ``data=CLASS`` and ``data={...}`` are the parser's."""
    is_path = key == "data" and not value.startswith("{") and ("/" in value or Path(value).is_dir())
    return ("data.path", value) if is_path else (key, value)


def parse_yaml(text: str) -> Any:
    """Return what YAML says, read in C where that was built: seven times as fast.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    try:
        return yaml.load(text, Loader=_LOADER)  # noqa: S506  a safe one
    except yaml.YAMLError:
        return yaml.safe_load(text)  # says better what is wrong


def what_is_wrong(error: Exception) -> str:
    """Return what is wrong with a YAML file, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        context = f"{error.context}, " if error.context else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {context}{error.problem}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


@dataclass(frozen=True)
class RecipeArguments:
    """A recipe, the overlays merged over it, and the values set on the command line, in order."""

    recipe: Path
    overlays: tuple[Path, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, words: list[str]) -> RecipeArguments:
        """Read ``RECIPE [OVERLAY ...] [key=value ...]``.

        Raises:
            UserError: there is no recipe, or a name or file does not exist.
        """
        paths, overrides = [], []
        for word in words:
            if override := split_override(word):
                overrides.append(_path_of_data(*override))
            else:
                paths.append(find(word))
                read(paths[-1])
        if paths and paths[0].name.startswith("_"):
            raise UserError(f"{paths[0].stem} changes a part of a recipe: name the recipe before it")
        if not paths:
            raise UserError("name a recipe, for example `resnet20-mnist`; `paperscale recipes` lists them")
        return cls(paths[0], tuple(paths[1:]), tuple(overrides))

    def to_cli(self) -> list[str]:
        """Return the arguments for Lightning's command line."""
        configs = [f"--config={path}" for path in (self.recipe, *self.overlays)]
        return configs + [f"--{key}={value}" for key, value in self.overrides]
