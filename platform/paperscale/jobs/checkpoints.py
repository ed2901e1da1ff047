"""Checkpoints by name: a run's ``best``, ``last`` or a step; what there is of them, and whether it is whole."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from paperscale.errors import UserError
from paperscale.jobs.run import Run, find_run, runs_dir
from paperscale.training.checkpoint import (
    MANIFEST,
    RECIPE,
    all_checkpoints,
    first_verified,
    ranked,
    read_manifest,
    step_of,
    verify,
)

INITIAL = "init"
"""Folder of a run with the weights that it begins with."""
FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Endings of the files that weights come in."""


def place(where: str) -> Path:
    """Return a folder of checkpoints, or one checkpoint.

    Args:
        where: name or path of a run, a folder of checkpoints, or a checkpoint.

    Raises:
        UserError: there is nothing of the kind; suggests the nearest name of a run.
    """
    path = Path(where).absolute()
    if "/" not in where and (runs_dir() / where / "run.json").exists():
        return find_run(where).checkpoints
    if (path / "run.json").exists():
        return path / "checkpoints"
    if (path / MANIFEST).exists() or all_checkpoints(path):
        return path
    if path.is_dir():
        raise UserError(f"{path} holds no checkpoint; name a run (`paperscale runs`), or a checkpoint's folder")
    return find_run(where).checkpoints


def find(where: str, which: str | None = None, hashes: bool = True) -> Path:
    """Return one checkpoint that verifies.

    Args:
        where: as of :func:`place`.
        which: ``last`` (the default), ``best`` or a step.
        hashes: read the files; without it only their sizes are looked at.

    Raises:
        UserError: there is none, or it does not verify.
    """
    folder = place(where)
    if (folder / MANIFEST).exists():
        if which:
            raise UserError(f"{folder} is one checkpoint: leave '{which}' out, or name the run")
        verify(folder, hashes)
        return folder
    if which in (None, "", "last", "best"):
        return _by_name(folder, which or "last", hashes)
    checkpoint = _of_step(folder, str(which))
    verify(checkpoint, hashes)
    return checkpoint


def _by_name(folder: Path, name: str, hashes: bool) -> Path:
    """Return the best or the last that verifies; say which were passed over."""
    found, passed_over = first_verified(best_first(folder) if name == "best" else all_checkpoints(folder), hashes)
    for reason in passed_over:
        print(f"WARNING passed over {reason}", file=sys.stderr)
    if found:
        return found
    raise UserError(f"no checkpoint in {folder} verifies; `paperscale checkpoint list` shows what there is")


def _of_step(folder: Path, which: str) -> Path:
    """Return the checkpoint of a step."""
    digits = which.removeprefix("step-")
    there = {step_of(checkpoint): checkpoint for checkpoint in all_checkpoints(folder)}
    if not digits.isdigit() or int(digits) not in there:
        steps = ", ".join(map(str, sorted(there)))
        raise UserError(f"{folder} has no checkpoint '{which}'; name best, last or a step: {steps or 'there is none'}")
    return there[int(digits)]


def monitored(folder: Path) -> tuple[str, bool] | None:
    """Return the metric that says which checkpoint is best, and whether less of it is better; ``None`` for none."""
    for checkpoint in all_checkpoints(folder)[:1]:
        with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
            section = yaml.safe_load((checkpoint / RECIPE).read_text()).get("checkpoint") or {}
            if metric := section.get("monitor"):
                return str(metric), section.get("mode") == "min"
    return None


def best_first(folder: Path) -> list[Path]:
    """Return the checkpoints that were validated, best first.

    Raises:
        UserError: the recipe does not say what is best, or none was validated.
    """
    if not (by := monitored(folder)):
        raise UserError(
            f"{folder}: which is best is not known, as its recipe has no checkpoint.monitor; name last or a step, and "
            "set checkpoint.monitor, for example to val/accuracy, in the next run"
        )
    found = ranked(all_checkpoints(folder), *by)
    if not found:
        raise UserError(f"{folder}: no checkpoint was validated with {by[0]}; name last or a step")
    return found


def listing(folder: Path, hashes: bool = False) -> list[dict[str, Any]]:
    """Return what is known of each checkpoint, oldest first.

    Args:
        folder: of checkpoints, or one checkpoint.
        hashes: read every file, not only its size.
    """
    alone = (folder / MANIFEST).exists()
    rows = [_row(checkpoint, hashes) for checkpoint in ([folder] if alone else reversed(all_checkpoints(folder)))]
    whole = [row["path"] for row in rows if not row["problem"]]
    by = None if alone else monitored(folder)
    order = ranked(all_checkpoints(folder), *by) if by else []
    best = next((str(path) for path in order if str(path) in whole), None)
    for row in rows:
        row |= {"last": not alone and row["path"] in whole[-1:], "best": row["path"] == best}
    return rows


def _row(checkpoint: Path, hashes: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"checkpoint": checkpoint.name, "path": str(checkpoint), "step": step_of(checkpoint)}
    row |= dict.fromkeys(("epoch", "samples", "bytes", "world_size", "strategy", "created", "verified"))
    row |= {"metrics": {}, "problem": ""}
    try:
        manifest = read_manifest(checkpoint)
        row |= {
            key: getattr(manifest, key) for key in ("step", "epoch", "world_size", "strategy", "metrics", "created")
        }
        row |= {"samples": manifest.consumed, "bytes": sum(file["bytes"] for file in manifest.files.values())}
        verify(checkpoint, hashes)
        row["verified"] = "hashes" if hashes else "sizes"
    except UserError as error:
        row["problem"] = str(error)
    return row


# -- the weights that a run begins with ----------------------------------------------------------------------


def resolve_initial(text: str) -> Path:
    """Return the checkpoint, the file or the folder of files that ``init_from`` names.

    Args:
        text: a run or a folder of checkpoints, also with ``@best``, ``@last`` or ``@STEP``; or a path.

    Raises:
        UserError: there is nothing of the kind, or it does not verify.
    """
    path = Path(text).absolute()
    if path.is_file():
        return path
    where, which = (text, "") if path.exists() or "@" not in text else text.rsplit("@", 1)
    if path.suffix in FILES and not path.exists():
        raise UserError(f"init_from={text}: there is no such file; check the path")
    if not (path / MANIFEST).exists() and any(path.glob("*.safetensors")):
        return path
    return find(where, which)


def promised(text: str, run: Run) -> str | None:
    """Return how a recipe names weights that a run is still to make; ``None`` where ``text`` names others.

    Args:
        text: of ``init_from``: the run, also with ``@best`` or ``@last``.
        run: that has not finished.

    Raises:
        UserError: a step is named, which may not be there when it has.
    """
    where, _, which = text.partition("@")
    if where not in (run.name, str(run.path)) and Path(where).absolute() != run.path:
        return None
    if which not in ("", "best", "last"):
        raise UserError(f"init_from={text}: {run.name} has not finished; name {run.name}@last or {run.name}@best")
    return f"{run.path}@{which or 'last'}"


def keep_initial(run: Run, recipe: str) -> None:
    """Give a new run names of its own for the files that it begins with: another run may prune its checkpoints.

    Where the file system does not allow that, the run relies on them where they are.
    """
    found = re.search(r"^init_from: (.+)$", recipe, re.MULTILINE)
    if not found or not (source := yaml.safe_load(found[1])):
        return
    path, folder = Path(source), run.path / INITIAL
    kept = folder / path.name
    try:
        (folder if path.is_file() else kept).mkdir(parents=True)
        for file in [path] if path.is_file() else filter(Path.is_file, path.iterdir()):
            os.link(file, kept if path.is_file() else kept / file.name)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


def initial(run: Run, source: str) -> Path:
    """Return where a run finds the weights that it begins with.

    Raises:
        UserError: they are gone.
    """
    where, at, which = source.rpartition("@")
    if at and Path(where, "run.json").exists():  # a run that had to finish before this one could begin
        return find(where, which)
    kept = run.path / INITIAL / Path(source).name
    path = kept if kept.exists() else Path(source)
    if not path.exists():
        raise UserError(
            f"init_from={source} is gone, and the run has no checkpoint yet; put it back, or submit the recipe anew "
            "with another --init-from"
        )
    return path
