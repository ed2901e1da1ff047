"""``paperscale diff``: what two runs differ in: recipe, cluster, code, results."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from paperscale.errors import UserError
from paperscale.jobs.run import Run
from paperscale.jobs.status import Facts, statuses

_SHAPE = ("recipe", "cluster", "engine", "nodes", "procs_per_node", "gpus_per_node", "group", "after", "repeat")


def diff(first: Run, second: Run) -> dict[str, Any]:
    """Return what two runs differ in.

    Returns:
        ``runs`` (their names), and lists of differences ``recipe``, ``cluster``, ``code`` and ``results``; each
        difference has ``key``, and ``first`` and ``second`` where that run has the key. ``files`` names the files of
        the code that differ.

    Raises:
        UserError: a run's recipe cannot be read.
    """
    states = statuses([Facts.read(first), Facts.read(second)])
    return {
        "runs": [first.name, second.name],
        "recipe": _differences(_recipe(first), _recipe(second)),
        "cluster": _differences(_shape(first), _shape(second)),
        "code": _differences(*(_flat(run.read_json("code.json")) for run in (first, second))),
        "files": files(first, second),
        "results": _differences(*({"state": now.state, **now.results} for now in states)),
    }


def _recipe(run: Run) -> dict[str, Any]:
    try:
        return _flat(yaml.safe_load(run.recipe.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{run.recipe}: {' '.join(str(error).split())}; `paperscale runs` lists other runs") from error


def _shape(run: Run) -> dict[str, Any]:
    info = run.info
    return {name: getattr(info, name) for name in _SHAPE}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists of mappings, as one mapping of dotted keys."""
    items: list[tuple[Any, Any]]
    if isinstance(value, dict) and value:
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = list(enumerate(value))
    else:
        return {key: value} if key else {}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= _flat(item, f"{key}.{name}" if key else str(name))
    return flat


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key in {**first, **second}:
        if key not in first or key not in second or first[key] != second[key]:
            sides = (("first", first), ("second", second))
            found.append({"key": key, **{name: side[key] for name, side in sides if key in side}})
    return found


def files(first: Run, second: Run) -> list[str]:
    """Return the names of the files that the runs' copies of the code differ in."""
    trees = [_tree(run.path / "code") for run in (first, second)]
    return sorted(name for name in {**trees[0], **trees[1]} if not _same(trees[0].get(name), trees[1].get(name)))


def _tree(folder: Path) -> dict[str, Path]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path for path in found}


def _same(first: Path | None, second: Path | None) -> bool:
    if first is None or second is None:
        return False
    if first.samefile(second):
        return True
    return first.stat().st_size == second.stat().st_size and first.read_bytes() == second.read_bytes()


def unified(first: Run, second: Run) -> Iterator[str]:
    """Yield the differences of the runs' code in the unified format, as ``patch`` takes it."""
    for name in files(first, second):
        texts = [_text(run.path / "code" / name) for run in (first, second)]
        if None in texts:
            yield f"Binary files {first.name}/{name} and {second.name}/{name} differ\n"
            continue
        old, new = (text or [] for text in texts)
        for line in difflib.unified_diff(old, new, f"{first.name}/{name}", f"{second.name}/{name}"):
            yield line if line.endswith("\n") else f"{line}\n"


def _text(path: Path) -> list[str] | None:
    """Return a file's lines, none where there is no file; ``None`` for a file that is not text."""
    if not path.exists():
        return []
    try:
        return path.read_text().splitlines(keepends=True)
    except UnicodeDecodeError:
        return None
