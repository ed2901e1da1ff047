"""What is known of jobs: asked of a real SLURM, of one whose controller is away, and of none."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import wait_for
from jobs.conftest import callback, submit_tiny  # noqa: F401  a fixture
from jobs.folders import write_attempt, write_run
from paperscale.cli import main
from paperscale.jobs import queue
from paperscale.jobs.status import status


def sbatch(*options: str) -> str:
    command = ["sbatch", "--parsable", "-J", "queue-test", "-o", "/dev/null", *options, "--wrap", "sleep 60"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def held_array() -> Iterator[str]:
    """An array of five tasks that wait until they are released."""
    job = sbatch("--hold", "--array=5-9%2")
    yield job
    subprocess.run(["scancel", job], check=True)


@pytest.fixture
def controller_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's commands look for a controller where none is."""
    lines = ["ClusterName=away", "SlurmctldHost=away(127.0.0.1)", "SlurmctldPort=1", "NodeName=n1"]
    (tmp_path / "slurm.conf").write_text("\n".join([*lines, "PartitionName=debug Nodes=n1\n"]))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))


@pytest.mark.slurm
def test_tasks_of_a_waiting_array_are_told_apart_and_say_why_they_wait(held_array, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")  # a user's own taste does not make jobs disappear
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    asked = [held_array, f"{held_array}_7", f"{held_array}_4", "999999"]
    found = queue.states(asked)
    assert [found[job].state for job in asked] == ["queued", "queued", "gone", "gone"]
    assert found == queue.states(asked, owners=[os.geteuid()])
    assert queue.state(f"{held_array}_9") == found[f"{held_array}_7"]
    one = found[held_array]
    assert (one.slurm, one.reason, one.left_s, one.nodes) == ("PENDING", "JobHeldUser", None, "")
    assert one.detail == "PENDING (JobHeldUser: held by you; `scontrol release JOB` lets it go)"


@pytest.mark.slurm
def test_a_running_job_has_a_start_a_place_and_a_time_left(runs, capsys):
    job = sbatch("--time=10")
    try:
        wait_for(lambda: queue.state(job).state == "running", 60, "the job runs")
        now = queue.state(job)
        assert now.nodes.startswith("n")
        assert now.left_s is not None
        assert 480 < now.left_s <= 600
        assert now.start is not None
        assert abs(now.start - time.time()) < 60
        assert now.restarts == 0
        run = write_run(runs, "mine", files={"job": job})
        write_attempt(run, 1)
        assert main(["status", "mine"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "state running (RUNNING)" in text
        assert "time limit at" in text
    finally:
        subprocess.run(["scancel", job], check=True)
    wait_for(lambda: queue.state(job).state == "gone", 60, "the job is gone")
    assert queue.how_it_ended(job) in ("", f"CANCELLED by {os.getuid()}"), "only where accounting is on"


@pytest.mark.slurm
def test_a_controller_that_is_away_means_unknown_within_seconds(controller_away, runs, capsys):
    for name in ("first", "second", "third"):
        write_attempt(write_run(runs, name, files={"job": "7"}), 1)
    started = time.monotonic()
    assert main(["runs"]) == 0
    assert time.monotonic() - started < queue.ANSWER_S + 1.5, "one question for all runs"
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split("\t")[1] for row in rows] == ["unknown"] * 3
    assert "squeue has not answered for 5 s" in rows[0] or "Unable to contact slurm controller" in rows[0]


@pytest.mark.slurm
def test_cancel_with_the_controller_away_sets_the_mark_and_says_so(controller_away, runs, capsys):
    run = write_run(runs, "far", files={"job": "7"})
    assert main(["cancel", "far"]) == 0
    assert "far is marked as cancelled" in capsys.readouterr().err
    assert run.cancelled


@pytest.mark.slurm
@pytest.mark.slow
def test_a_run_on_two_nodes_is_seen_saved_and_ended(submit_tiny, capsys):  # noqa: F811
    slowly = (callback("Slowly", seconds=0.5),)
    run = submit_tiny("two", "tracking.enabled=false", cluster="slurm-dev", nodes=2, procs_per_node=1, callbacks=slowly)
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= 2, 90, "the first steps")
    assert main(["checkpoint", "save", "two", "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)["checkpoint"]
    assert main(["status", "two", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["slurm"]["state"] == "RUNNING"
    assert facts["checkpoint"] == saved
    assert [beat["host"] for beat in facts["heartbeats"]] == ["n1", "n2"]
    assert not any(beat["stale"] for beat in facts["heartbeats"])
    assert main(["cancel", "two", "--save"]) == 0
    assert "cancelled two; its newest checkpoint is step-" in capsys.readouterr().out
    assert status(run).state == "cancelled"
    assert len(run.attempts()) == 1
    assert max(path.name for path in run.checkpoints.glob("step-*")) > saved


def test_without_slurm_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.state("7").state == "unknown"
    assert queue.states(["7"])["7"].detail == "squeue cannot be run here (No such file or directory)"
    assert queue.states([]) == {}
    assert queue.how_it_ended("7") == ""


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "higher priority"),
        ("Resources", "nodes to become free"),
        ("QOSMaxJobsPerUserLimit", "as much running as the QoS allows a user"),
        ("ReqNodeNotAvail, UnavailableNodes:n2", "down, drained or reserved"),
        ("BeginTime", "waits for a while"),
        ("DependencyNeverSatisfied", "has failed; cancel this one"),
        ("AssocGrpGRES", "your account as a whole"),
        ("AssocMaxJobsLimit", "your share of the account"),
        ("JobArrayTaskLimit", "as may at once"),
        ("launch failed requeued held", "`scontrol release JOB`"),
        ("SomethingNew", ""),
    ],
)
def test_reasons_are_translated(reason, words):
    assert words in queue.meaning(reason)
    assert bool(words) == bool(queue.meaning(reason))


def test_a_state_of_ones_own_job_needs_one_call(runs, monkeypatch, tmp_path):
    """A stand-in for squeue counts how often it is called for two hundred runs."""
    tool = tmp_path / "bin/squeue"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho call >>{tmp_path}/calls\necho "7|RUNNING|None|0|1:00|N/A|n1|"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    for number in range(200):
        write_run(runs, f"r{number}", files={"job": str(number)})
    assert main(["runs"]) == 0
    assert (tmp_path / "calls").read_text() == "call\n"
    assert status(write_run(runs, "seven", files={"job": "7"})).state == "running"
