"""Runs on a real SLURM of two nodes: what Lightning's own SLURM support gets wrong, each a test."""

from __future__ import annotations

import subprocess
import time

import pytest

from cluster.conftest import NO_WANDB
from cluster.dev import output
from cluster.life import as_uninterrupted, at_least, log
from helpers import equal, final_state, rows, wait_for
from jobs.conftest import callback, ended
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs.drill import preempt
from paperscale.jobs.status import cancel, status
from paperscale.tracking.wandb_files import read_runs

pytestmark = pytest.mark.slurm


def nodes_are_back() -> bool:
    """Ask for the node; SLURM refuses while it is on its way up by itself."""
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False, capture_output=True)
    states = subprocess.run(["sinfo", "-h", "-N", "-p", "debug", "-o", "%T"], capture_output=True, text=True).stdout
    return not any(word in states for word in ("down", "drain", "unknown"))


def test_preempted_by_a_signal_to_every_process(submit, whole):
    """`scancel --signal=TERM` reaches ranks and W&B's service; SLURM runs the job again; one W&B run, no row lost."""
    run = submit("preempted", callbacks=(callback("Slowly", seconds=0.2),))
    at_least(run, 4)
    assert output("squeue", "-h", "-j", run.job, "-o", "%j") == ["preempted"], "SLURM knows the run by its name"
    preempt(run)
    as_uninterrupted(run, whole)
    assert "attempt 1 on" in log(run), "the log is kept over attempts"
    assert "attempt 2 on" in log(run)
    assert run.attempts()[0].exit_code == 75
    segments = read_runs(run.path / "wandb")
    assert {(segment.run_id, segment.name) for segment in segments} == {(run.info.wandb_id, "preempted")}
    logged = [row for segment in segments for row in segment.history]
    assert len(logged) == len(rows(run))
    steps = sorted(row["trainer/global_step"] for row in logged if "train/loss" in row)
    assert steps == list(range(24))


@pytest.mark.slow
def test_fact_1_ranks_that_are_half_a_second_apart_do_not_deadlock(submit, whole):
    """The time limit's signal, USR1, finds the ranks at different places."""
    skew = callback("SkewedSignal", step=6, signal="SIGUSR1", seconds=0.5)
    run = submit("skewed", NO_WANDB, callbacks=(skew,))
    as_uninterrupted(run, whole)
    assert run.attempts()[0].facts["reason"].startswith("SIGUSR1")


@pytest.mark.slow
def test_fact_2_sigterm_to_one_rank_only_stops_all(submit, whole):
    run = submit("one-rank", NO_WANDB, callbacks=(callback("SignalAt", step=11, rank=1),))
    as_uninterrupted(run, whole)
    assert run.attempts()[0].facts["reason"] == "SIGTERM to rank 1"


def test_fact_3_a_terminated_training_is_not_taken_for_a_finished_one(submit, whole):
    """A job of a stronger partition takes the nodes: SIGTERM with a grace time, then the job is requeued."""
    run = submit("displaced", NO_WANDB, callbacks=(callback("Slowly", seconds=0.3),))
    at_least(run, 4)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "srun sleep 2"]
    subprocess.run(urgent, check=True, capture_output=True)
    as_uninterrupted(run, whole)
    assert run.attempts()[0].exit_code == 75


def test_fact_4_a_signal_after_the_training_does_no_harm(submit):
    run = submit("late", NO_WANDB, callbacks=(callback("SignalInTest", signal="SIGUSR1"),))
    assert ended(run) == "finished", log(run)
    assert [attempt.exit_code for attempt in run.attempts()] == [0]


@pytest.mark.slow
def test_fact_4_a_signal_before_the_training_does_no_harm(submit, whole):
    run = submit("early", NO_WANDB, callbacks=(callback("Slowly", seconds=0.2),))
    wait_for(lambda: run.attempts() and run.attempts()[0].log().exists(), what="first line of the log")
    preempt(run)
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_fact_5_a_run_on_lost_nodes_continues_from_its_newest_checkpoint(submit, whole, tiny_recipe):
    """The node is declared down; a stray checkpoint of Lightning's in the way is not picked up."""
    run = submit("node-down", NO_WANDB, callbacks=(callback("Slowly", seconds=0.3),))
    for folder in (run.path, run.checkpoints, tiny_recipe.parent):
        (folder / "hpc_ckpt_7.ckpt").write_bytes(b"stale")
    at_least(run, 11)
    subprocess.run(["scontrol", "update", "nodename=n2", "state=down", "reason=test"], check=True)
    try:
        wait_for(lambda: status(run).state == "queued", 60, "the run is requeued")
    finally:
        wait_for(nodes_are_back, 60, "the node is up again")
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_a_time_limit_is_a_pause_not_an_end(submit, whole):
    """SLURM sends the signal that the script asks for before the limit."""
    run = submit("limited", NO_WANDB, time="1:00", callbacks=(callback("Slowly", seconds=2.5),))
    assert ended(run, 240) == "finished", log(run)
    first = run.attempts()[0]
    assert first.exit_code == 75
    assert first.facts["reason"].startswith("SIGUSR1")
    assert equal(final_state(run), final_state(whole))


def test_a_users_scancel_is_not_run_again(submit, capsys):
    run = submit("scancelled", NO_WANDB, callbacks=(callback("Slowly", seconds=0.2),))
    at_least(run, 3)
    subprocess.run(["scancel", run.job], check=True)
    assert ended(run) == "cancelled"
    time.sleep(2)
    assert len(run.attempts()) == 1
    assert (run.attempts()[0].cause, run.cancelled_by) == ("cancel", "scancel")


@pytest.mark.slow
def test_cancel_and_resume(submit, whole, capsys):
    run = submit("cancelled", NO_WANDB, callbacks=(callback("Slowly", seconds=0.2),))
    at_least(run, 3)
    cancel(run)
    assert ended(run) == "cancelled"
    assert main(["resume", "cancelled"]) == 0
    as_uninterrupted(run, whole)


def test_status_of_a_waiting_job_says_why(submit, capsys):
    subprocess.run(["scontrol", "update", "partitionname=debug", "state=drain"], check=False)
    subprocess.run(["scontrol", "update", "partitionname=debug", "state=down"], check=True)
    try:
        run = submit("waiting", NO_WANDB)
        wait_for(lambda: "PENDING" in status(run).detail)
        wait_for(lambda: "Partition" in status(run).detail, what="the reason")
        assert main(["status", "waiting"]) == 0
        assert "queued" in capsys.readouterr().out
        cancel(run)
    finally:
        subprocess.run(["scontrol", "update", "partitionname=debug", "state=up"], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"nodes": 99},
            "99 nodes asked for, partition 'debug' of cluster 'slurm-dev' has (\\d+); use --nodes \\1 or fewer",
        ),
        ({"procs_per_node": 99}, "99 processes of 1 CPUs on a node asked for"),
        ({"time": "9-00:00:00"}, "time 9-00:00:00 asked for, partition 'debug' of cluster 'slurm-dev' allows 01:00:00"),
    ],
)
def test_more_than_the_partition_has_is_refused_before_it_waits_for_ever(submit, runs, options, message):
    with pytest.raises(UserError, match=message):
        submit("too-much", NO_WANDB, **options)
    assert not (runs / "too-much").exists()


def test_a_partition_that_does_not_exist(submit, runs, tmp_path):
    profile = tmp_path / "cluster/profiles/typo.yaml"
    profile.write_text("partition: debgu\n")
    with pytest.raises(UserError, match="no partition 'debgu'; this cluster has debug urgent"):
        submit("typo", NO_WANDB, cluster="typo")
    assert not (runs / "typo").exists()


def test_the_rendered_script_is_one_that_sbatch_accepts(submit, runs, tiny_recipe, capsys, tmp_path):
    words = ["submit", str(tiny_recipe), "--cluster", "slurm-dev", "--nodes", "2", "--dry-run"]
    assert main(words) == 0
    script = tmp_path / "job.sh"
    script.write_text(capsys.readouterr().out)
    result = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
