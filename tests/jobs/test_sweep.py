"""Sweeps: what the values give, what the runs are called, one copy of the code, and nothing left of a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import wait_for
from jobs.conftest import callback
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.run import Run
from paperscale.jobs.status import LIVE, cancel, status
from paperscale.jobs.submit import Shape, Turn
from paperscale.jobs.sweep import Sweep, combinations, names, submit_sweep
from paperscale.jobs.validation import Place, Validator, validate_all
from paperscale.recipes import RecipeArguments


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model.lr=[1e-3,1e-4]", ["1e-3", "1e-4"]),
        ("model.lr=0.10, 0.5", ["0.10", "0.5"]),
        ("seed_everything=range(3)", ["0", "1", "2"]),
        ("seed_everything=range(2, 7, 2)", ["2", "4", "6"]),
        ("n=[20]", ["20"]),
        ("model.milestones=[[0.5, 0.75], [0.3]]", ["[0.5, 0.75]", "[0.3]"]),
        ("model.network={class_path: A, init_args: {n: 1}}, {class_path: B}", None),
        ("a='x, y', z", ["'x, y'", "z"]),
        ("--model.flag=[off, on]", ["off", "on"]),
    ],
)
def test_values_are_kept_as_they_are_written(text, values):
    found = combinations([text])
    if values is None:
        values = ["{class_path: A, init_args: {n: 1}}", "{class_path: B}"]
    key = text.removeprefix("--").partition("=")[0]
    assert found == [((key, value),) for value in values]


def test_several_keys_give_their_product():
    assert combinations(["a=[1,2]", "b=x,y"]) == [
        (("a", "1"), ("b", "x")),
        (("a", "1"), ("b", "y")),
        (("a", "2"), ("b", "x")),
        (("a", "2"), ("b", "y")),
    ]


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["model.lr"], "not a key with values; write for example --sweep 'model.lr="),
        (["a=[1,2"], "is not a list"),
        (["a=[1], [2]"], "is not a list"),
        (["a=[]"], "there is no value in"),
        (["a=range(0)"], "there is no value in"),
        (["a=range(1,2,0)"], "there is no value in"),
        (["a=[1,2,1]"], "the value 1 comes twice"),
        (["a=1,2", "a=3"], "--sweep a is given twice"),
        (["a=range(1000000)"], "1,000,000 runs, at most 10,000"),
        (["a=range(-5, 100000000000000000000)"], "runs, at most 10,000"),
        (["a=range(1000)", "b=range(1000)"], "1,000,000 runs, at most 10,000"),
    ],
)
def test_what_is_no_sweep_is_refused_with_the_fix(sweeps, message):
    with pytest.raises(UserError) as error:
        combinations(sweeps)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sweeps", "expected"),
    [
        (["model.init_args.lr=[1e-3,0.1]"], ["x-lr1e-3", "x-lr0.1"]),
        (["model.lr=1,2", "seed_everything=[3]"], ["x-lr1-seed3", "x-lr2-seed3"]),
        (["model.milestones=[[0.5], [0.3]]"], ["x-1", "x-2"]),
        (["data.path=/a,/b"], ["x-1", "x-2"]),
        (["a.size=1,2", "b.size=1,2"], ["x-size1-size1", "x-size1-size2", "x-size2-size1", "x-size2-size2"]),
        (["a=averyveryverylongvalue,b"], ["x-1", "x-2"]),
    ],
)
def test_runs_are_called_after_their_values_where_those_are_short_and_plain(sweeps, expected):
    assert names("x", combinations(sweeps)) == expected


def test_numbered_names_sort():
    found = names("x", combinations(["data.path=" + ",".join(f"/{n}" for n in range(12))]))
    assert found == sorted(found)


NO_WANDB = ("tracking.enabled=false", "test_after_fit=false", "trainer.max_epochs=1")


@pytest.fixture
def sweep_tiny(runs: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    """Sweep the tiny recipe, with processes that do not outlive the test."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tiny_recipe.parent)
    submitted: list[Run] = []

    def sweep_it(name: str, *sweeps: str, words=NO_WANDB, at_most=None, turn=None, callbacks=(), **shape) -> Sweep:
        listed = f"trainer.callbacks=[{', '.join(callbacks)}]"
        arguments = RecipeArguments.parse([str(tiny_recipe), listed, *words])
        asked = Shape(**{"cluster": "local", **shape})
        sweep = submit_sweep(arguments, asked, name, False, "test", sweeps, at_most, turn)
        assert isinstance(sweep, Sweep)
        submitted.extend(sweep.runs)
        return sweep

    yield sweep_it
    for run in submitted:
        (run.path / "cancelled").touch()
        if status(run).state in LIVE:
            ENGINES[run.info.engine].cancel(run)


@pytest.mark.slow
def test_a_sweep_on_this_machine_runs_one_after_the_other(sweep_tiny):
    """Each with its own values and W&B run, in one group, of one copy of the code; a cancelled one is passed over."""
    sweep = sweep_tiny("lr", "model.lr=[0.05,0.01]", "seed_everything=[2]", "trainer.max_epochs=1,2", words=QUICK)
    last = sweep.runs[-1]
    assert [run.name for run in sweep.runs[1:]] == [f"lr-lr{v}" for v in LABELS]
    assert status(last).state == "queued"
    cancel(sweep.runs[1])
    cancel(sweep.runs[2])
    assert status(sweep.runs[1]).state == "cancelled"
    most = 0

    def over() -> bool:
        nonlocal most
        states = [status(run).state for run in sweep.runs]
        most = max(most, states.count("running"))
        return not {"queued", "running"} & set(states)

    wait_for(over, 120, "the sweep")
    assert most == 1
    assert [status(run).state for run in sweep.runs] == ["finished", "cancelled", "cancelled", "finished"]
    assert sweep.runs[1].attempts() == []
    recipe = yaml.safe_load(last.recipe.read_text())
    assert (recipe["seed_everything"], recipe["model"]["init_args"]["lr"]) == (2, 0.01)
    tracked = [wandb_run(run) for run in (sweep.runs[0], last)]
    assert [of["display_name"] for of in tracked] == [sweep.runs[0].name, last.name]
    assert [of["run_group"] for of in tracked] == ["lr", "lr"]
    given = json.loads((last.path.parent / "lr/sweep.json").read_text())
    assert given[last.name] == {"model.lr": "0.01", "seed_everything": "2", "trainer.max_epochs": "2"}
    files = [run.path / "code/paperscale/jobs/worker.py" for run in sweep.runs]
    assert len({file.stat().st_ino for file in files}) == 1


QUICK = ("trainer.max_steps=3", "test_after_fit=false")
LABELS = ("0.05-seed2-max_epochs2", "0.01-seed2-max_epochs1", "0.01-seed2-max_epochs2")


def wandb_run(run: Run) -> dict[str, object]:
    """What W&B's own reader says of the run."""
    folder = next((run.path / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(record["run"] for record in map(json.loads, lines) if record["type"] == "run")


@pytest.mark.parametrize(
    ("sweeps", "words", "message"),
    [
        (["model.lr=[0.1,fast]"], (), "with model.lr=fast: model.lr: expected float"),
        (["model.lrr=[1,2]"], (), "with model.lrr=1: unknown key 'lrr'"),
        (["data.global_batch_size=[32,1]"], (), "with data.global_batch_size=1: data.global_batch_size=1 cannot be"),
        (["seed_everything=[1,2]"], ("data.path=/nowhere",), "no shards at /nowhere"),
    ],
)
def test_one_wrong_combination_and_nothing_is_queued(sweep_tiny, runs, sweeps, words, message):
    with pytest.raises(UserError) as error:
        sweep_tiny("bad", *sweeps, words=words, procs_per_node=2)
    assert message in str(error.value)
    assert not runs.exists()


def test_a_taken_name_and_nothing_is_queued(sweep_tiny, runs):
    (runs / "x-seed2").mkdir(parents=True)
    (runs / "x-seed2/run.json").write_text("{}")
    with pytest.raises(UserError, match="run 'x-seed2' exists"):
        sweep_tiny("x", "seed_everything=[1,2]")
    assert [path.name for path in runs.iterdir()] == ["x-seed2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-parallel", "2"], "--max-parallel is for sweeps"),
        (["--repeat", "3"], "--repeat: the local cluster sets no time limit"),
        (["--repeat", "3", "--sweep", "seed_everything=1,2"], "--repeat and --sweep"),
        (["--after", "nothing"], "no run 'nothing'"),
        (["--sweep", "seed_everything=1,2", "--name", "a b"], "for example --name a-b"),
    ],
)
def test_options_that_make_no_sense(words, message, runs, tiny_recipe, capsys):
    assert main(["submit", str(tiny_recipe), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not runs.exists()


def test_a_dry_run_lists_the_runs_and_writes_nothing(runs, tiny_recipe, capsys):
    words = ["submit", str(tiny_recipe), "--name", "s", "--sweep", "model.lr=[0.1,'0.2 # x']", "--dry-run"]
    assert main(words) == 2, "the second is no number"
    words[5] = "model.lr=[0.1,0.2]"
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("# 2 runs, 1 at once\n# s-lr0.1  model.lr=0.1\n# s-lr0.2  model.lr=0.2\n#!/bin/bash\n")
    assert not runs.exists()
    assert main([*words, "--cluster", "slurm", "--max-parallel", "1"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --array=0-1%1\n" in script
    assert "    s-lr0.2  # model.lr=0.2\n" in script


@pytest.mark.slow
def test_a_run_after_another_waits_for_it(sweep_tiny):
    first = sweep_tiny("first", "seed_everything=1", callbacks=(callback("Slowly", seconds=0.2),)).runs[0]
    second = sweep_tiny("second", "seed_everything=1", turn=Turn("first-seed1")).runs[0]
    assert status(second).state == "queued"
    assert second.info.after == "first-seed1"
    wait_for(lambda: status(second).state == "finished", 120)
    assert second.attempts()[0].facts["started"] > first.attempts()[0].facts["ended"]
    third = sweep_tiny("third", "seed_everything=1", turn=Turn("first-seed1")).runs[0]
    wait_for(lambda: status(third).state == "finished", 60, "it need not wait for what has finished")


def test_a_run_after_one_that_fails_ends_with_the_reason(sweep_tiny):
    slow, broken = callback("Slowly", seconds=0.3), callback("Broken")
    sweep_tiny("first", "seed_everything=1", callbacks=(slow, broken))
    second = sweep_tiny("second", "seed_everything=1", turn=Turn("first-seed1")).runs[0]
    wait_for(lambda: status(second).state not in LIVE, 60)
    assert "run 'first-seed1', which it comes after, is failed" in (second.path / "job.log").read_text()
    assert second.attempts() == []
    with pytest.raises(UserError, match=r"--after first-seed1: that run is failed .* `paperscale resume first-seed1`"):
        sweep_tiny("third", "seed_everything=1", turn=Turn("first-seed1"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "model.lr=1,2", "model.lr=7"], "--sweep model.lr and model.lr=7 set the same key; leave one"),
        (["--sweep", "model.lr=1", "--sweep", "model.init_args.lr=2"], "and --sweep model.lr set the same key"),
        (["--name", ""], "--name is empty"),
        (["--name", "a" * 300], "300 letters, a name has at most 100; shorten it"),
        (["--sweep", "data.path=/a,/b", "--name", "a" * 99], "its runs' names have 101 letters, at most 100"),
        (["--sweep", "model.lr=1,2", "--name", "taken"], "`paperscale runs --group taken` lists it; choose another"),
    ],
)
def test_names_and_keys_that_cannot_be_are_refused(words, message, runs, tiny_recipe, capsys):
    (runs / "taken").mkdir(parents=True)
    (runs / "taken/sweep.json").write_text("{}")
    assert main(["submit", str(tiny_recipe), *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_recipes_put_together_are_those_that_would_be_parsed(tiny_recipe):
    """Fractions and seeds are parsed once for each value, integers and classes in every combination of theirs."""
    words = [str(tiny_recipe), *NO_WANDB]
    sweeps = [
        "model.lr=[0.1,1e-5,1]",
        "seed_everything=range(4)",
        "trainer.gradient_clip_val=[0.5,1.0]",
        "model.network.n=[1,2]",
    ]
    chosen, calls = combinations(sweeps), []
    validator = Validator(Place())

    def check(values):
        calls.append(values)
        return validator(RecipeArguments.parse([*words, *(f"{key}={value}" for key, value in values)]))

    found = [checked.recipe for checked in validate_all(check, chosen)]
    assert len(calls) == 10
    assert found == [check(values).recipe for values in chosen]
