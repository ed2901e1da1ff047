"""Sweeps: one submission that trains a recipe once for each combination of values.

Each combination is a run of its own, called ``NAME-lr0.1-seed2`` after its values where they are short and plain, and
``NAME-01``, ``NAME-02`` ... otherwise. ``NAME`` is the runs' group, in W&B too. Its folder beside theirs holds
``sweep.json``, which says what each run was given, and on SLURM the script of the array that starts them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from paperscale.errors import UserError
from paperscale.jobs import snapshot
from paperscale.jobs.checkpoints import keep_initial
from paperscale.jobs.engines import ENGINES, sbatch, scancel
from paperscale.jobs.facts import Cluster
from paperscale.jobs.profile import Profile
from paperscale.jobs.render import log_pattern, render
from paperscale.jobs.run import LONGEST_NAME, Run, RunInfo, create, free_name, refuse_taken, runs_dir
from paperscale.jobs.submit import Options, Shape, Turn, new_info, say
from paperscale.jobs.turns import start_queue
from paperscale.jobs.validation import SEED, Place, Validated, Validator, Values, validate_all
from paperscale.recipes import RecipeArguments
from paperscale.tracking.identity import new_id

_KEY = re.compile(r"-{0,2}([A-Za-z_][\w.]*)=(.+)", re.DOTALL)
_RANGE = re.compile(r"range\(\s*(-?\d+)\s*(?:,\s*(-?\d+)\s*)?(?:,\s*(-?\d+)\s*)?\)")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,15}")
_SHORT = {SEED: "seed"}
_MOST_RUNS = 10_000
_USUAL_ARRAY = 1001  # SLURM's own default
_WORTH_SHOWING = 50  # runs


@dataclass(frozen=True)
class Sweep:
    """What was submitted.

    Attributes:
        name: of the group.
        runs: one for each combination.
        jobs: ids of SLURM's arrays; none on this machine.
        at_most: runs at once, ``None`` for as many as there is room for.
    """

    name: str
    runs: tuple[Run, ...]
    jobs: tuple[str, ...]
    at_most: int | None


# -- values and names --------------------------------------------------------------------------------------


def combinations(sweeps: Sequence[str]) -> list[Values]:
    """Return every combination of values, the last key changing fastest.

    Args:
        sweeps: ``key=[a, b]``, ``key=a,b`` or ``key=range(5)`` each; values are kept as they are written.

    Raises:
        UserError: one is not of that form, a key or a value comes twice, or there are too many.
    """
    keys: dict[str, list[str]] = {}
    for text in sweeps:
        match = _KEY.fullmatch(text)
        if not match:
            raise UserError(f"--sweep {text}: not a key with values; write for example --sweep 'model.lr=[1e-3,1e-4]'")
        if match[1] in keys:
            raise UserError(f"--sweep {match[1]} is given twice; write all of its values into one list")
        keys[match[1]] = _values(match[1], match[2].strip())
    _refuse_many(math.prod(map(len, keys.values())))
    return [tuple(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]


def _refuse_many(count: int) -> None:
    if count > _MOST_RUNS:
        raise UserError(f"--sweep: {count:,} runs, at most {_MOST_RUNS:,} go into one; give fewer values")


def _values(key: str, text: str) -> list[str]:
    """Return the values of one key."""
    if numbers := _RANGE.fullmatch(text):
        bounds = [int(number) for number in numbers.groups() if number is not None]
        listed_numbers = range(*bounds) if bounds[2:] != [0] else range(0)
        if listed_numbers:  # len() of a range ends at 2**63
            _refuse_many((listed_numbers[-1] - listed_numbers[0]) // listed_numbers.step + 1)
        values = [str(number) for number in listed_numbers]
    else:
        listed = text if text.startswith("[") else f"[{text}]"
        try:
            node = yaml.compose(listed, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise UserError(f"--sweep {key}: {text!r} is not a list; write --sweep '{key}=[1, 2]'") from error
        if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(listed):
            raise UserError(f"--sweep {key}: {text!r} is not a list; write --sweep '{key}=[1, 2]'")
        values = [listed[part.start_mark.index : part.end_mark.index].strip() for part in node.value]
    if not values:
        raise UserError(f"--sweep {key}: there is no value in {text!r}; write --sweep '{key}=[1, 2]'")
    _refuse_many(len(values))
    if twice := next((value for value, count in Counter(values).items() if count > 1), None):
        raise UserError(f"--sweep {key}: the value {twice} comes twice; leave one out")
    return values


def names(base: str, chosen: Sequence[Values]) -> list[str]:
    """Return a name for each combination: its values, or its number where they make no good name."""
    found = [base + "".join(f"-{_label(key)}{value}" for key, value in values) for values in chosen]
    plain = all(_PLAIN.fullmatch(value) for values in chosen for _, value in values)
    if plain and len(set(found)) == len(found) and max(map(len, found)) <= LONGEST_NAME:
        return found
    digits = len(str(len(chosen)))
    return [f"{base}-{number:0{digits}d}" for number in range(1, len(chosen) + 1)]


def _label(key: str) -> str:
    return _SHORT.get(key, key.rpartition(".")[2])


# -- submission --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is to be submitted.

    Attributes:
        group: name of the sweep.
        profile: of the cluster.
        infos: the runs.
        chosen: the values of each.
        at_most: runs at once, ``None`` for as many as there is room for.
        turn: the run that all of them come after.
    """

    group: str
    profile: Profile
    infos: list[RunInfo]
    chosen: list[Values]
    at_most: int | None
    turn: Turn

    @property
    def folder(self) -> Path:
        """Return the group's folder."""
        return runs_dir() / self.group

    def script(self, start: int, stop: int, options: Options) -> str:
        """Return the script of an array with a task for each of the runs from ``start`` to ``stop``."""
        infos, chosen, first = self.infos[start:stop], self.chosen[start:stop], self.infos[0]
        extra: Options = {
            **options,
            "job-name": self.group,
            "array": f"0-{len(infos) - 1}" + (f"%{self.at_most}" if self.at_most else ""),
            "output": log_pattern(self.folder / "array.log"),
        }
        header = [line for line in render(first, self.profile, extra).splitlines() if line.startswith("#SBATCH ")]
        width = max(len(info.name) for info in infos)
        lines = [
            "#!/bin/bash",
            *header,
            "#",
            f"# {self.group}: runs {start + 1} to {start + len(infos)} of {len(self.infos)} of {first.recipe}, each on "
            f"{first.nodes} x {first.procs_per_node} processes.",
            "# Each task of the array is one of them and runs that run's own script.",
            "",
            "runs=(",
            *(f"    {info.name:{width}}  # {_text(of)}" for info, of in zip(infos, chosen, strict=True)),
            ")",
            f"run={shlex.quote(str(runs_dir()))}/${{runs[SLURM_ARRAY_TASK_ID]}}",
            'exec bash "$run/job.sh" >>"$run/job.log" 2>&1',
        ]
        return "\n".join(lines) + "\n"

    def dry_run(self) -> str:
        """Return what would be submitted: the array's script, or on this machine the runs and the first's script."""
        if self.profile.engine == "slurm":
            return self.script(0, len(self.infos), self.turn.options(self.profile))
        runs = (f"# {info.name}  {_text(of)}\n" for info, of in zip(self.infos, self.chosen, strict=True))
        return f"# {len(self.infos)} runs, {self.at_most} at once\n{''.join(runs)}{render(self.infos[0], self.profile)}"


def submit_sweep(
    arguments: RecipeArguments,
    shape: Shape,
    name: str | None,
    dry_run: bool,
    command: str,
    sweeps: Sequence[str],
    at_most: int | None = None,
    turn: Turn | None = None,
) -> Sweep | str:
    """Create a run for each combination and hand them to the cluster; a dry run returns the script instead.

    Args:
        arguments: the recipe.
        shape: of each run's job.
        name: of the group, by default the recipe's with ``-sweep``.
        dry_run: check the keys and return the script.
        command: what the user typed.
        sweeps: keys with their values, see :func:`combinations`.
        at_most: runs at once; by default all on SLURM, and one on this machine.
        turn: the run that all of them come after.

    Raises:
        UserError: anything is wrong with any combination; nothing has been queued and no directory is left.
    """
    chosen = combinations(sweeps)
    _refuse_twice(arguments, chosen[0])
    plan = _plan(arguments, shape, name, command, chosen, at_most, turn or Turn())
    profile = plan.profile
    if not dry_run:
        ENGINES[profile.engine].check(profile, plan.infos[0])
    validated = _check_all(plan, arguments, with_data=not dry_run)
    warnings = dict.fromkeys(warning for checked in validated for warning in checked.warnings)
    if dry_run:
        say(warnings)
        return plan.dry_run()
    with _new_runs(plan, validated) as runs:
        for run, info, checked in zip(runs, plan.infos, validated, strict=True):
            run.script.write_text(render(info, profile, mounts=checked.data))
        if profile.engine == "slurm":
            jobs = _submit_arrays(plan, runs)
        else:
            start_queue(runs, plan.at_most or 1, plan.turn.waits_for(profile))
            jobs = []
    say(warnings)
    return Sweep(plan.group, tuple(runs), tuple(jobs), plan.at_most)


def _check_all(plan: Plan, arguments: RecipeArguments, with_data: bool) -> list[Validated]:
    """Check the recipe with each combination of values."""
    earlier = plan.turn.waits_for(plan.profile)
    validator = Validator(Place.of(plan.profile), with_data=with_data, earlier=earlier)

    def check(values: Values) -> Validated:
        with _naming(values):
            return validator(replace(arguments, overrides=(*arguments.overrides, *values)))

    return list(validate_all(check, _showing("checking", plan.chosen)))


def _refuse_twice(arguments: RecipeArguments, values: Values) -> None:
    """Refuse a key that is swept and set, or swept under both of its names."""
    set_here = {_key(key): f"{key}={value}" for key, value in arguments.overrides}
    seen = dict[str, str]()
    for key, _ in values:
        if other := set_here.get(_key(key)) or seen.get(_key(key)):
            raise UserError(f"--sweep {key} and {other} set the same key; leave one of the two out")
        seen[_key(key)] = f"--sweep {key}"


def _key(key: str) -> str:
    return key.rstrip("+").replace(".init_args.", ".")


def _showing(what: str, chosen: Sequence[Values]) -> Iterable[Values]:
    """Return the combinations; a terminal shows how far they are gone through, where they are many."""
    if len(chosen) < _WORTH_SHOWING or not sys.stderr.isatty():
        return chosen
    from rich.console import Console
    from rich.progress import track

    return track(chosen, f"{what} {len(chosen):,} runs", console=Console(stderr=True), transient=True)


def _plan(
    arguments: RecipeArguments,
    shape: Shape,
    name: str | None,
    command: str,
    chosen: list[Values],
    at_most: int | None,
    turn: Turn,
) -> Plan:
    """Give every run its identity.

    Raises:
        UserError: a name is taken, the group's included, or cannot be one; or the options contradict each other.
    """
    if turn.repeat > 1:
        raise UserError("--repeat and --sweep: a train of jobs carries a single run; leave one of the two out")
    profile, recipe = shape.profile(), arguments.recipe.stem
    turn.options(profile)  # a run to come after that is not there is the first thing to say
    group = name or free_name(f"{recipe}-sweep")
    if (runs_dir() / group / "sweep.json").exists():
        raise UserError(f"sweep '{group}' exists: `paperscale runs --group {group}` lists it; choose another --name")
    refuse_taken(group)
    first, *others = found = names(group, chosen)
    if (longest := max(map(len, found))) > LONGEST_NAME:
        raise UserError(f"--name {group}: its runs' names have {longest} letters, at most {LONGEST_NAME}; shorten it")
    info = new_info(recipe, first, profile, command, turn, group)
    for other in others:
        refuse_taken(other)
    infos = [info, *(replace(info, name=other, wandb_id=new_id()) for other in others)]
    return Plan(group, profile, infos, chosen, at_most or (1 if profile.engine == "local" else None), turn)


@contextlib.contextmanager
def _naming(values: Values) -> Iterator[None]:
    """Put the combination before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"with {_text(values)}: {error}") from error


def _text(values: Values) -> str:
    return " ".join(f"{key}={' '.join(value.split())}" for key, value in values)


@contextlib.contextmanager
def _new_runs(plan: Plan, validated: list[Validated]) -> Iterator[list[Run]]:
    """Create the runs with one copy of the code, and the group's folder; leave nothing if no jobs come of it."""
    runs, warning = list[Run](), ""
    try:
        for info, checked, _ in zip(plan.infos, validated, _showing("writing", plan.chosen), strict=True):
            runs.append(create(info, checked.recipe))
            keep_initial(runs[-1], checked.recipe)
            code = runs[-1].path / "code"
            if len(runs) > 1:
                snapshot.share(runs[0].path / "code", code)
            else:
                warning = snapshot.take(code, Path.cwd())
        plan.folder.mkdir()
        values = {info.name: dict(of) for info, of in zip(plan.infos, plan.chosen, strict=True)}
        (plan.folder / "sweep.json").write_text(json.dumps(values, indent=1))
        yield runs
    except BaseException:
        for path in (plan.folder, *(run.path for run in runs)):
            shutil.rmtree(path, ignore_errors=True)
        raise
    say([warning] if warning else [])


def _submit_arrays(plan: Plan, runs: list[Run]) -> list[str]:
    """Queue as many arrays as the cluster's largest size asks for, and note each run's task; all of them or none."""
    size = int(Cluster().config.get("MaxArraySize", _USUAL_ARRAY))
    jobs: list[str] = []
    try:
        for start in range(0, len(runs), size):
            options = plan.turn.options(plan.profile)
            if plan.at_most and jobs:  # the bound holds for all arrays together
                options = {"dependency": f"afterany:{jobs[-1]}"}
            script = plan.folder / ("array.sh" if len(runs) <= size else f"array-{len(jobs) + 1}.sh")
            script.write_text(plan.script(start, start + size, options))
            jobs.append(sbatch(script))
            for task, run in enumerate(runs[start : start + size]):
                run.set_job(f"{jobs[-1]}_{task}")
    except BaseException:
        for job in jobs:
            scancel(job)
        raise
    return jobs
