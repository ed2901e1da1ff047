"""The runs that a report is made from, and what each of them has come to."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from paperscale.errors import UserError
from paperscale.jobs.run import Run, RunInfo, read_json
from paperscale.jobs.status import read_all, statuses
from paperscale.recipes import parse_yaml
from paperscale.report.spec import Group
from paperscale.tracking.metrics import parse_rows

Floats = NDArray[np.float64]
_MISSING = object()
_NOT_TRAINING = (  # keys of a recipe that change nothing about what is learned, or only at random
    "seed_everything",
    "checkpoint",
    "tracking",
    "speed",
    "trainer.callbacks",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.log_every_n_steps",
    "data.num_processes",
    "data.micro_batch_size",
)


_MOMENTS: dict[str, Callable[[Floats], Any]] = {
    "first": lambda values: values[0],
    "mean": np.mean,
    "geometric": lambda values: np.exp(np.log(values).mean()),
    "last": lambda values: values[-1],
}


@dataclass(frozen=True)
class Curve:
    """A metric over the steps; values that are not finite are left out.

    Attributes:
        steps: ascending, shape [N].
        values: shape [N].
        dropped: values that were not finite.
    """

    steps: Floats
    values: Floats
    dropped: int = 0


class Record:
    """A run's directory as a report reads it; each file once.

    Args:
        run: the run.
        info: what was fixed when it was created.
        state: ``finished`` or another of :data:`paperscale.jobs.status.STATES`.
        results: the content of ``results.json``.
    """

    def __init__(self, run: Run, info: RunInfo, state: str, results: dict[str, Any]):
        self.run, self.info, self.state, self.results = run, info, state, results
        self.curves: dict[str, Curve] = {}

    @property
    def finished(self) -> bool:
        """Return whether the run has come to its end."""
        return self.state == "finished"

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Return the resolved recipe, empty where it cannot be read."""
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            content = parse_yaml(self.run.recipe.read_text())
            return content if isinstance(content, dict) else {}
        return {}

    @cached_property
    def training(self) -> dict[str, Any]:
        """Return the keys of the recipe that tell what is trained, in short form, without the seed.

        The number of processes is among them: batch normalisation sees the samples of one process.
        """
        flat = flatten(self.recipe) | {"processes": self.info.nodes * self.info.procs_per_node}
        return {key: value for key, value in flat.items() if not _below(key, _NOT_TRAINING)}

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return what ``paperscale test`` has stored of this run alone, the plainest first, of those the newest."""
        found = [read_json(path) for path in sorted(self.run.evaluations.glob("*.json"))]
        found = [each for each in found if each.get("stage") == "test" and isinstance(each.get("metrics"), dict)]
        found = [each for each in found if not each.get("ensemble")]
        found.sort(key=lambda each: str(each.get("date", "")), reverse=True)
        return sorted(found, key=lambda each: len(each.get("overrides", [])) + len(each.get("overlays", [])))

    @cached_property
    def versions(self) -> dict[str, str]:
        """Return the packages' versions that the newest checkpoint names."""
        newest = max(self.run.checkpoints.glob("step-*/manifest.json"), default=None)
        return read_json(newest).get("versions", {}) if newest else {}

    @cached_property
    def code(self) -> str:
        """Return the beginning of the git commit that the run's code is of, with ``+`` where it was changed."""
        code = self.run.read_json("code.json")
        return f"{code['commit'][:7]}{'+' * bool(code.get('dirty'))}" if code.get("commit") else ""

    @cached_property
    def hardware(self) -> str:
        """Return what the last attempt computed on, as far as it is recorded."""
        attempts = self.run.attempts()
        facts = read_json(attempts[-1].path / "preflight.json") if attempts else {}
        if not facts.get("device"):
            return ""
        ranks, nodes = facts["ranks"], len(set(facts["hosts"]))
        shape = f", {ranks} processes" + (f" on {nodes} nodes" if nodes > 1 else "") if ranks > 1 else ""
        return f"{facts['device']}{shape}"

    @property
    def step(self) -> int | None:
        """Return the step that the run has come to."""
        return self.run.read_json("progress.json").get("step")

    def value(self, metric: str, protocol: str = "") -> Any:
        """Return the final value of a metric, ``None`` where there is none.

        Args:
            metric: its name; ending in ``/``, the mean over the layers, for which :meth:`read_curves` comes first.
            protocol: of ``data.eval_crop``: the run's own result if it was trained with it, else the one that
                ``paperscale test RUN data.eval_crop=PROTOCOL`` has stored; empty for the run's own.
        """
        if metric.endswith("/"):
            layers = self.layers(metric, "last")
            return float(np.mean(list(layers.values()))) if layers else None
        if not protocol or lookup(self.recipe, "data.eval_crop") == protocol:
            return self.results.get(metric)
        wanted = f"data.eval_crop={protocol}"
        for found in self.evaluations:
            if metric in found["metrics"] and wanted in map(_as_override, found.get("overrides", [])):
                return found["metrics"][metric]
        return None

    def layers(self, prefix: str, at: str) -> dict[tuple[int, str], float]:
        """Return numbers by layer: its number in the network and its name, from metrics ``PREFIX/NN_name``.

        Args:
            prefix: of the metrics, with or without ``/`` at its end.
            at: of :data:`paperscale.report.spec.MOMENTS`; a geometric mean is over the values greater than 0.
        """
        found = {}
        pattern = re.compile(rf"{re.escape(prefix.rstrip('/'))}/(\d+)_(.*)")
        for key, curve in self.curves.items():
            values = curve.values[curve.values > 0] if at == "geometric" else curve.values
            if len(values) and (match := pattern.fullmatch(key)):
                found[int(match[1]), match[2]] = float(_MOMENTS[at](values))
        return found

    def logged(self) -> set[str]:
        """Return the names of everything in ``metrics.jsonl``."""
        return {key for row in _rows(self.run.metrics) for key in row}

    def read_curves(self, names: Iterable[str], prefixes: Sequence[str]) -> None:
        """Read ``metrics.jsonl``; fills :attr:`curves`.

        Where a step was repeated, the last attempt's value counts, however late another attempt has written.

        Args:
            names: of metrics.
            prefixes: of the names of further metrics.
        """
        wanted, starts = frozenset(names), tuple(prefixes)
        found: dict[str, dict[int, tuple[int, float]]] = {}
        for row in _rows(self.run.metrics):
            step, attempt = row.get("step"), row.get("attempt", 0)
            if step is None:
                continue
            for key, value in row.items():
                if (key in wanted or key.startswith(starts)) and isinstance(value, (int, float)):
                    series = found.setdefault(key, {})
                    if step not in series or series[step][0] <= attempt:
                        series[step] = attempt, value
        self.curves = {key: _curve(series) for key, series in found.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl`` as they were written, none where it cannot be read."""
    try:
        return parse_rows(path.read_bytes().splitlines())
    except OSError:
        return []


def _curve(series: dict[int, tuple[int, float]]) -> Curve:
    steps = np.array(sorted(series), dtype=np.float64)
    values = np.array([series[int(step)][1] for step in steps], dtype=np.float64)
    finite = np.isfinite(values)
    return Curve(steps[finite], values[finite], int((~finite).sum()))


# -- which runs ----------------------------------------------------------------------------------------------------


def read_records(folders: Sequence[Path], wanted: Callable[[RunInfo], bool]) -> list[Record]:
    """Return the runs of the folders, oldest first.

    Args:
        folders: of runs, or runs.
        wanted: says by what is fixed about a run whether it is read.

    Raises:
        UserError: a folder does not exist.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--runs {folder}: no such folder; name one that holds runs, by default ./runs")
        own = [folder] if (folder / "run.json").exists() else [path.parent for path in folder.glob("*/run.json")]
        runs |= {path.resolve(): Run(path.absolute()) for path in own}
    facts = sorted((each for each in read_all(list(runs.values())) if wanted(each.info)), key=lambda f: f.info.created)
    states = statuses(facts)
    return [Record(of.run, of.info, now.state, of.results) for of, now in zip(facts, states, strict=True)]


def may_be(group: Group, recipe: str) -> bool:
    """Return whether runs of a recipe of this name may be of a group."""
    return fnmatch.fnmatchcase(recipe, group.recipe)


def mismatches(record: Record, group: Group) -> list[str]:
    """Return the keys in which a run is not as a group's ``where`` says."""
    return [key for key, value in group.where.items() if not _equal(lookup(record.recipe, key), value)]


def matches(record: Record, group: Group) -> bool:
    """Return whether a run is one of a group."""
    return may_be(group, record.info.recipe) and not mismatches(record, group)


def lookup(recipe: Any, key: str, default: Any = None) -> Any:
    """Return the value of a key in short form: ``model.network.n`` is ``model.init_args.network.init_args.n``."""
    for part in key.split("."):
        recipe = _child(recipe, part)
        if recipe is _MISSING:
            return default
    return recipe


def _child(value: Any, part: str) -> Any:
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    if not isinstance(value, dict):
        return _MISSING
    if part in value:
        return value[part]
    inner = value.get("init_args")
    return inner[part] if isinstance(inner, dict) and part in inner else _MISSING


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and not isinstance(value, list):  # any of them
        return any(_equal(value, each) for each in wanted)
    if isinstance(wanted, str) and isinstance(value, str):
        return fnmatch.fnmatchcase(value, wanted)
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping of dotted keys in short form."""
    if isinstance(value, dict):
        items = [(name, item) for name, item in value.items() if name != "init_args"]
        items += list((value.get("init_args") or {}).items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= flatten(item, f"{key}.{name}" if key else str(name))
    return flat


def _below(key: str, parents: Iterable[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _as_override(word: Any) -> str:
    """Return an override as ``key=value`` in short form."""
    text = "=".join(map(str, word)) if isinstance(word, (list, tuple)) else str(word)
    return text.lstrip("-").replace(".init_args.", ".")


# -- runs of a group -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Members:
    """The runs of a group.

    Attributes:
        group: the group.
        counted: finished runs, one of each seed and setting.
        repeats: finished runs that an identical, newer one stands for.
        unfinished: the others.
    """

    group: Group
    counted: list[Record]
    repeats: list[Record]
    unfinished: list[Record]

    @classmethod
    def of(cls, group: Group, records: Sequence[Record]) -> Members:
        """Choose from the runs, given oldest first."""
        mine = [record for record in records if matches(record, group)]
        newest: dict[str, Record] = {}
        for record in (each for each in mine if each.finished):
            setting = json.dumps([record.recipe.get("seed_everything"), record.training], sort_keys=True, default=str)
            newest[setting] = record
        counted = list(newest.values())
        repeats = [record for record in mine if record.finished and record not in counted]
        return cls(group, counted, repeats, [record for record in mine if not record.finished])

    @property
    def all(self) -> list[Record]:
        """Return every run of the group."""
        return [*self.counted, *self.repeats, *self.unfinished]

    def differences(self) -> list[str]:
        """Return the keys, beside the seed, in which the counted runs differ: their mean is one of unlike things.

        A key that a run lacks is null there, unless it ran another code, which may not have had the key.
        """
        keys = dict.fromkeys(key for record in self.counted for key in record.training)
        return [key for key in keys if self._differ_in(key)]

    def _differ_in(self, key: str) -> bool:
        having = [record for record in self.counted if key in record.training]
        codes = [record.code for record in having]
        values = {json.dumps(record.training[key], default=str) for record in having}
        null = any(record.code in codes for record in self.counted if key not in record.training)
        return len(values | ({"null"} if null else set())) > 1


def converted(value: Any, unit: str) -> Any:
    """Return a fraction, or an array of them, in a unit of :data:`paperscale.report.spec.UNITS`."""
    if unit == "%":
        return 100.0 * value
    return 100.0 * (1.0 - value) if unit == "error %" else value


def quantity(metric: str, unit: str) -> str:
    """Return what a metric in a unit is called: ``val/error, %`` of ``val/accuracy`` in ``error %``."""
    name = metric.replace("accuracy", "error") if unit == "error %" else metric
    return f"{name}, %" if unit else name


def finals(records: Iterable[Record], metric: str, unit: str, protocol: str = "") -> list[float]:
    """Return the runs' final values of a metric in a unit; those that have none are left out, NaN and Inf are not."""
    found = (record.value(metric, protocol) for record in records)
    return [float(converted(value, unit)) for value in found if isinstance(value, (int, float))]
