"""Arrays, chains, trains and snapshots on a real SLURM of two nodes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.dev import output
from helpers import wait_for
from jobs.conftest import callback, ended, submit_tiny  # noqa: F401  a fixture
from jobs.test_sweep import NO_WANDB, sweep_tiny  # noqa: F401  a fixture
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs.drill import preempt
from paperscale.jobs.facts import Cluster
from paperscale.jobs.resume import resume
from paperscale.jobs.run import Run
from paperscale.jobs.status import LIVE, cancel, status
from paperscale.jobs.submit import Shape, Turn

pytestmark = pytest.mark.slurm

FAST = ("tracking.enabled=false", "test_after_fit=false")


@pytest.fixture
def submit(submit_tiny):  # noqa: F811
    """Submit the tiny recipe to one node."""

    def submit_it(name: str, *words: str, **options: object) -> Run:
        asked = {"cluster": "slurm-dev", "nodes": 1, "procs_per_node": 1, **options}
        return submit_tiny(name, *FAST, *words, **asked)

    return submit_it


@pytest.fixture
def sweep(sweep_tiny):  # noqa: F811
    """Sweep the tiny recipe on one node each."""
    return lambda *args, **options: sweep_tiny(*args, **{"cluster": "slurm-dev", **options})


def queued(name: str) -> list[str]:
    """The jobs and tasks of that name that are in the queue."""
    words = ["squeue", "-h", "-r", "-n", name, "-o", "%i %T"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()


def log(run: Run) -> str:
    return (run.path / "job.log").read_text()


@pytest.mark.slow
def test_a_sweep_is_one_array_whose_tasks_are_requeued_alone(sweep):
    """At most two at once; a task that is preempted does not take the others with it."""
    slow = (callback("Slowly", seconds=0.3),)
    of = sweep("s", "seed_everything=range(3)", at_most=2, callbacks=slow)
    assert len(of.jobs) == 1
    assert [run.job for run in of.runs] == [f"{of.jobs[0]}_{task}" for task in range(3)]
    wait_for(lambda: of.runs[0].read_json("progress.json").get("step", 0) >= 2, 60)
    assert status(of.runs[2]).state == "queued"
    assert status(of.runs[2]).job.reason == "JobArrayTaskLimit"
    preempt(of.runs[0])
    most = 0

    def over() -> bool:
        nonlocal most
        most = max(most, sum(line.endswith(" RUNNING") for line in queued("s")))
        return not {"queued", "running"} & {status(run).state for run in of.runs}

    wait_for(over, 150, "the sweep")
    assert [status(run).state for run in of.runs] == ["finished"] * 3, [log(run) for run in of.runs]
    assert most == 2
    assert [len(run.attempts()) for run in of.runs] == [2, 1, 1], log(of.runs[0])
    assert [log(run).count("attempt 1 on ") for run in of.runs] == [1, 1, 1], "a log of its own"


@pytest.mark.slow
def test_a_task_of_an_array_is_cancelled_and_resumed_alone(sweep):
    of = sweep("alone", "seed_everything=range(2)", callbacks=(callback("Slowly", seconds=0.3),))
    first, second = of.runs
    wait_for(lambda: first.read_json("progress.json").get("step", 0) >= 2, 60)
    cancel(first)
    assert ended(first) == "cancelled"
    now = int(time.time())
    (first.path / "excluded").write_text(f"n1 {now - 60} no space\nn2 {now - 13 * 3600} long ago\nn1 {now} no space\n")
    resume(first, Shape())
    assert "#SBATCH --exclude=n1\n" in first.script.read_text()
    assert first.job.isdigit()
    assert "--array" not in first.script.read_text()
    assert (ended(first), ended(second)) == ("finished", "finished")
    assert first.attempts()[-1].facts["host"] == "n2"
    assert len(second.attempts()) == 1


def test_bad_nodes_are_tried_again_where_too_few_would_be_left(submit, capsys):
    run = submit("two", "trainer.max_steps=1", nodes=2, callbacks=(callback("Broken"),))
    assert ended(run) == "failed"
    nodes = sorted(set(output("sinfo", "-h", "-N", "-p", "debug", "-o", "%N")))
    bad = nodes[: len(nodes) - 1]
    (run.path / "excluded").write_text("".join(f"{node} {int(time.time())} no space\n" for node in bad))
    resume(run, Shape())
    assert "--exclude" not in run.script.read_text()
    assert f"without {', '.join(bad)}, found bad lately, too few nodes would be left" in capsys.readouterr().err
    assert ended(run) == "failed"


def test_arrays_are_split_at_the_clusters_largest(sweep, monkeypatch):
    """Stood in for: the cluster's largest size, which needs a restart of the controller. The arrays are real."""
    monkeypatch.setattr(Cluster, "config", {"MaxArraySize": "2"})
    of = sweep("split", "seed_everything=range(5)", at_most=1, callbacks=(callback("Slowly", seconds=2),))
    assert len(of.jobs) == 3
    assert [run.job.partition("_")[2] for run in of.runs] == ["0", "1", "0", "1", "0"]
    waiting = {line.split()[0].partition("_")[0] for line in queued("split") if line.endswith("PENDING")}
    assert set(of.jobs[1:]) <= waiting
    shown = subprocess.run(["scontrol", "show", "job", of.jobs[1]], capture_output=True, text=True).stdout
    assert f"Dependency=afterany:{of.jobs[0]}" in shown


def test_a_chain_starts_when_the_first_has_finished(submit):
    first = submit("phase-1", "trainer.max_epochs=1")
    second = submit("phase-2", "trainer.max_epochs=1", turn=Turn("phase-1"))
    wait_for(lambda: "Dependency" in status(second).detail or second.attempts(), 10)
    assert (ended(first), ended(second)) == ("finished", "finished"), log(second)
    assert second.attempts()[0].facts["started"] > first.attempts()[0].facts["ended"]
    third = submit("phase-3", "trainer.max_steps=1", turn=Turn("phase-1"))
    assert "--dependency" not in third.script.read_text(), "it has finished already"
    assert ended(third) == "finished"


def test_a_chain_whose_first_run_fails_ends(submit):
    """SLURM itself would leave the second waiting for ever."""
    submit("broken", callbacks=(callback("Broken"),))
    second = submit("never", turn=Turn("broken"))
    wait_for(lambda: not queued("never"), 60, "SLURM ends it")
    assert status(second).state not in LIVE
    assert second.attempts() == []
    with pytest.raises(UserError, match=r"--after broken: that run is failed .*continue it first with"):
        submit("later", turn=Turn("broken"))
    with pytest.raises(UserError, match=r"is on cluster 'slurm-dev', this one on 'local'.*use --cluster slurm-dev"):
        submit("elsewhere", cluster="local", turn=Turn(submit("waits").name))


@pytest.mark.slow
def test_a_train_of_jobs_carries_one_run(submit):
    """The job that is told to stop leaves the rest to the next; what is left over at the end is cancelled."""
    run = submit("train", callbacks=(callback("SignalAt", step=5),), turn=Turn(repeat=5))
    assert run.job.isdigit()
    after = submit("caboose", "trainer.max_steps=1", turn=Turn("train"))
    assert ended(run) == "finished", log(run)
    assert [attempt.exit_code for attempt in run.attempts()] == [75, 0]
    assert queued("train") == []
    assert ended(after) == "finished", "the jobs left over do not count as a failure"


def test_the_source_may_change_and_go_once_a_job_is_queued(submit, tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", project], check=True)
    code = "from helpers import SampleLog\nclass Mine(SampleLog):\n    def setup(self, *a, **k): print('VERSION', {})\n"
    (project / "src/mine.py").write_text("import other\n" + code.format("other.NUMBER"))
    (project / "src/other.py").write_text("NUMBER = 1\n")
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project / "src"))
    profile = project / "cluster/profiles/held.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("partition: debug\ntime: '10:00'\nsbatch: [--hold]\n")
    run = submit("held", "trainer.max_steps=2", cluster="held", callbacks=("{class_path: mine.Mine}",))
    assert status(run).state == "queued"
    (project / "src/mine.py").write_text(code.format(2))
    (project / "src/other.py").unlink()
    subprocess.run(["scontrol", "release", run.job], check=True)
    assert ended(run) == "finished", run.attempts()[-1].error
    assert "VERSION 1" in run.attempts()[0].log().read_text()


def test_what_sbatch_refuses_leaves_nothing(submit, sweep, runs, tiny_recipe):
    profile = tiny_recipe.parent / "cluster/profiles/refused.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("partition: debug\ntime: '10:00'\nsbatch: [--reservation=nothing]\n")
    with pytest.raises(UserError, match=r"sbatch: .*[Rr]eservation"):
        submit("refused", cluster="refused")
    with pytest.raises(UserError, match=r"sbatch: .*[Rr]eservation"):
        sweep("refused", "seed_everything=1,2", cluster="refused")
    assert list(runs.iterdir()) == []
    assert queued("refused") == []


def test_the_surrounding_jobs_variables_do_not_reach_the_job(submit, monkeypatch):
    """A submission from inside a job, or with defaults that say other than the profile."""
    for name, value in {"SBATCH_PARTITION": "nowhere", "SLURM_MEM_PER_CPU": "1", "SLURM_MEM_PER_NODE": "9999999",
                        "SBATCH_ARRAY_INX": "0-5", "SLURM_NTASKS": "7"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    run = submit("clean", "trainer.max_steps=1")
    assert ended(run) == "finished", log(run)


FIT = [sys.executable, "-m", "paperscale", "fit"]


def run_wrapped(folder: Path, command: str, *options: str) -> str:
    """Run a user's own batch script; return what it says and its exit code."""
    out = folder / "own.log"
    words = ["sbatch", "-p", "debug", "-o", str(out), "-J", "bash", *options, "--wrap", f"{command}; echo code $?"]
    subprocess.run(words, check=True, capture_output=True, cwd=folder)
    wait_for(lambda: out.exists() and "\ncode " in out.read_text(), 60, "the end of the script")
    return out.read_text()


@pytest.mark.parametrize(
    ("start", "options", "tasks"),
    [
        ("srun", ("-N2", "--ntasks-per-node=1"), "2 tasks on 2 nodes"),
        ("", ("-n", "3"), "3 tasks on "),
        ("", ("-N2",), "2 tasks on 2 nodes"),
    ],
)
def test_fit_in_a_job_with_several_tasks_names_the_command_for_it(runs, tiny_recipe, start, options, tasks):
    """With srun, and without it, which Lightning itself does not notice; said once, and nothing is left."""
    command = f"{start} {shlex.join([*FIT, str(tiny_recipe), 'model.lr=0.1'])}"
    said = run_wrapped(tiny_recipe.parent, command, *options)
    assert said.count("error: this job has ") == 1, said
    assert f"this job has {tasks}" in said
    nodes, procs = re.search(r"--cluster slurm --nodes (\d+) --procs-per-node (\d+)` from a login node", said).groups()
    assert int(nodes) * int(procs) == int(tasks[0])
    assert f"`paperscale submit {tiny_recipe} model.lr=0.1 --cluster" in said
    assert said.rstrip().endswith("code 2")
    assert not runs.exists()


def test_fit_in_a_job_of_one_task_trains(runs, tiny_recipe):
    """Also named bash, at which Lightning would look away."""
    words = [*FIT, str(tiny_recipe), *NO_WANDB, "trainer.max_steps=2", "--name", "own"]
    said = run_wrapped(tiny_recipe.parent, "srun --ntasks=1 --nodes=1 " + shlex.join(words), "-N2")
    assert said.rstrip().endswith("code 0"), said
    assert Run(runs / "own").read_json("results.json")


@pytest.mark.slow
def test_a_hundred_runs_are_submitted_and_tracked_at_once(sweep, capsys):
    started = time.monotonic()
    of = sweep("hundred", "seed_everything=range(100)", at_most=2, words=(*FAST, "trainer.max_steps=2"))
    took = time.monotonic() - started
    print(f"100 runs submitted in {took:.1f} s")
    assert took < 60
    wait_for(lambda: sum(status(run).state == "finished" for run in of.runs[:6]) >= 4, 120)
    capsys.readouterr()
    started = time.monotonic()
    assert main(["runs", "--group", "hundred", "--json", "--limit", "200"]) == 0
    listed = time.monotonic() - started
    states = re.findall(r'"state": "(\w+)"', capsys.readouterr().out)
    assert len(states) == 100
    assert {"finished", "queued"} <= set(states) <= {"finished", "queued", "running"}
    assert listed < 5
    subprocess.run(["scancel", of.jobs[0]], check=True)
    wait_for(lambda: not queued("hundred"), 60)
