"""The fault matrix: what is broken is broken for real, and every run that goes on is as if nothing had happened.

With ``PAPERSCALE_FAULTS=FILE`` each test adds what it has measured to that file (`make faults` writes docs/faults.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from cluster.conftest import NO_WANDB
from cluster.dev import devcluster, machines
from cluster.life import as_uninterrupted, at_least, log
from helpers import equal, final_state, wait_for
from jobs.conftest import callback, ended
from paperscale.jobs.drill import Recovery, drill, recovery
from paperscale.jobs.run import Run
from paperscale.jobs.status import status

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("dev_cluster")]

SLOWLY = callback("Slowly", seconds=0.2)
SLOW = callback("Slowly", seconds=5.0, first="true")


def recovered(run: Run, fault: str, since: float, attempt: int = 1) -> Recovery:
    """Wait until the run trains again; note what was measured."""
    (*_, found) = recovery(run, attempt, since, timeout_s=150)
    assert isinstance(found, Recovery)
    if target := os.environ.get("PAPERSCALE_FAULTS"):
        row = {
            "fault": fault,
            "cause": found.cause,
            "seen": found.error.replace(str(run.path), f"runs/{run.name}"),
            "detected_s": round(found.detected_s, 1),
            "running_s": round(found.running_s, 1),
            "resumed_from": found.resumed_from,
        }
        with Path(target).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return found


def hung_at(run: Run) -> float:
    """Wait until a rank stands still; return when it began to."""
    mark = run.path / "attempts/0001/hung"
    wait_for(mark.exists, 60)
    return mark.stat().st_mtime


def node_of(run: Run, node: int = 0) -> str:
    """Return the host that a node of the running attempt is on."""
    wait_for(lambda: len(run.attempts()[-1].nodes()) > node)
    return str(run.attempts()[-1].nodes()[node]["host"])


@pytest.mark.slow
def test_a_rank_is_killed(submit, whole):
    """`kill -9`: named, and training goes on from the newest checkpoint."""
    run = submit("kill-rank", NO_WANDB, callbacks=(SLOWLY,))
    at_least(run, 6)
    since = time.time()
    drill(run, "kill-rank", rank=1)
    found = recovered(run, "a rank's process is killed (`kill -9`)", since)
    assert found.cause == "killed"
    assert found.error.startswith("rank 1 on n2: killed by SIGKILL")
    assert found.detected_s < 10
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_a_rank_is_stopped(submit, whole):
    """SIGSTOP: found within the limit, every rank's stack kept, the rank and its node named."""
    run = submit("stopped-rank", NO_WANDB, callbacks=(SLOWLY,), cluster="watchful")
    at_least(run, 6)
    since = time.time()
    drill(run, "hang", rank=1)
    found = recovered(run, "a rank's process stands still (SIGSTOP)", since)
    assert found.cause == "hang"
    assert "rank 1 on n2 stands in" in found.error
    assert "its process is stopped" in found.error
    assert found.detected_s < 4 + 10
    as_uninterrupted(run, whole)
    first = run.attempts()[0]
    assert all((first.path / f"stacks-rank-{rank}.txt").stat().st_size for rank in (0, 1))


@pytest.mark.slow
def test_a_collective_that_one_rank_never_enters(submit, whole):
    run = submit("deadlock", NO_WANDB, callbacks=(callback("HangAt", step=11, rank=0),), cluster="watchful")
    since = hung_at(run)
    found = recovered(run, "a collective that one rank never enters", since)
    assert found.cause == "hang"
    assert "rank 0 on n1 stands in 'forward' of step 12" in found.error
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_data_that_never_comes(submit, whole):
    run = submit(
        "stuck-data", NO_WANDB, callbacks=(callback("HangAt", step=11, rank=1, where="data"),), cluster="watchful"
    )
    since = hung_at(run)
    found = recovered(run, "data that never comes, on one rank", since)
    assert found.cause == "hang"
    assert "rank 1 on n2 stands in 'data' of step 12" in found.error
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_a_node_does_not_pass_its_preflight(submit, whole):
    """It is named and left out of the job's next start; the run goes on elsewhere."""
    run = submit("bad-node", NO_WANDB, callbacks=(SLOWLY,), nodes=1, procs_per_node=2)
    at_least(run, 6)
    bad = node_of(run)
    since = time.time()
    drill(run, "bad-node")
    found = recovered(run, "a node that is out of order", since, attempt=2)
    assert found.cause == "bad-node"
    assert found.error.startswith(f"node {bad} did not pass its preflight")
    assert node_of(run) != bad
    assert (run.path / "excluded").read_text().split()[0] == bad
    as_uninterrupted(run, whole, attempts=3)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_no_step(submit, whole):
    """A checkpoint fails, the training goes on; the next checkpoint is written when there is room again."""
    run = submit("full", "checkpoint.every_n_steps=2", callbacks=(callback("Slowly", seconds=2.0),))
    at_least(run, 3)
    drill(run, "fill-disk")
    assert ended(run) == "finished", log(run)
    assert "not written" in run.attempts()[0].log().read_text()
    assert len(run.attempts()) == 1
    assert equal(final_state(run), final_state(whole))


@pytest.mark.slow
def test_a_node_loses_power(submit, whole):
    """Nobody is told; SLURM finds out, and runs the job elsewhere."""
    run = submit("power", NO_WANDB, "checkpoint.every_n_steps=1", callbacks=(SLOW,), nodes=1, procs_per_node=2)
    at_least(run, 2)
    lost, since = node_of(run), time.time()
    devcluster("crash", lost)
    found = recovered(run, "a node loses power (SlurmdTimeout 20 s)", since)
    assert node_of(run) != lost
    assert found.running_s < 100
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_a_node_is_drained(submit, whole):
    """The job ends where it is; nothing is lost."""
    run = submit("drained", NO_WANDB, callbacks=(SLOWLY,))
    at_least(run, 4)
    subprocess.run(["scontrol", "update", "nodename=n2", "state=drain", "reason=test"], check=True)
    assert ended(run) == "finished"
    assert len(run.attempts()) == 1


@pytest.mark.slow
def test_the_network_of_a_node_is_cut(submit, whole):
    """The rank on the cut node lives on; it is fenced off before it can write into the run that goes on elsewhere."""
    run = submit("cut-off", NO_WANDB, "checkpoint.every_n_steps=1", callbacks=(SLOW,), nodes=1, procs_per_node=2)
    at_least(run, 2)
    lost, since = node_of(run), time.time()
    devcluster("cut", lost)
    found = recovered(run, "a node's network is cut (SlurmdTimeout 20 s)", since)
    assert node_of(run) != lost
    assert found.running_s < 120
    as_uninterrupted(run, whole)
    assert run.attempts()[0].verdict == 79, "superseded"


@pytest.mark.slow
def test_the_network_between_two_nodes_of_a_job_is_cut(submit, whole):
    """The ranks wait for each other; the watchdog ends that, and the job starts without the lost node."""
    if len(machines()["nodes"]) < 3:
        pytest.skip("needs three nodes: `make cluster-up NODES=3`")
    run = submit("apart", NO_WANDB, callbacks=(SLOWLY,), cluster="watchful")
    at_least(run, 6)
    lost, since = node_of(run, 1), time.time()
    devcluster("cut", lost)
    found = recovered(run, "the network between two nodes of a job is cut", since)
    assert found.cause == "hang"
    assert f"n1 does not reach {lost}" in found.error or f"{lost} does not reach n1" in found.error
    assert lost not in [report["host"] for report in run.attempts()[1].nodes()]
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_the_controller_is_away_while_the_job_runs(submit, whole):
    run = submit("no-controller", NO_WANDB, callbacks=(SLOWLY,))
    at_least(run, 4)
    devcluster("ctld", "restart")
    devcluster("ctld", "kill")
    assert status(run).state in ("unknown", "running")
    at_least(run, 12)
    devcluster("ctld", "start")
    assert ended(run) == "finished"
    assert len(run.attempts()) == 1


@pytest.mark.slow
def test_the_controller_is_away_when_the_job_wants_to_be_run_again(submit, whole):
    """The script keeps the allocation and asks until it is heard."""
    slowly = callback("Slowly", seconds=1.0, first="true")
    run = submit("unheard", NO_WANDB, "checkpoint.every_n_steps=1", callbacks=(slowly,))
    at_least(run, 2)
    devcluster("ctld", "restart")
    devcluster("ctld", "kill")
    since = time.time()
    drill(run, "kill-rank", rank=1)
    wait_for(lambda: run.attempts()[0].exit_code is not None, 60)
    time.sleep(5)
    devcluster("ctld", "start")
    recovered(run, "the controller is away when a job has to be run again (back after 10 s)", since)
    as_uninterrupted(run, whole)


@pytest.mark.slow
def test_the_port_that_others_would_take_is_taken(submit, whole):
    """The rendezvous takes a port that is free, and keeps it open until rank 0 has it."""
    held = subprocess.Popen(
        [
            Path(__file__).parents[2] / "cluster/dev/devcluster",
            *("exec", "n1", "python3", "-c"),
            "import socket, time\nheld = [socket.create_server(('', port)) for port in range(29400, 29600)]\n"
            "print('held', flush=True)\ntime.sleep(100)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        assert ended(submit("port", NO_WANDB)) == "finished"
    finally:
        held.terminate()
