"""The traps of a job's start on SLURM: each is handled, on a cluster that sets it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from cluster.conftest import NO_WANDB
from cluster.dev import devcluster, machines, output
from cluster.life import log
from jobs.conftest import ended

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("dev_cluster")]


@pytest.fixture
def rebuilt(dev_cluster: object) -> Iterator[object]:
    """A way to build the cluster with other options; the one that was there is built again afterwards."""
    nodes = str(len(machines()["nodes"]))
    yield lambda *options: devcluster("up", nodes, *options)
    devcluster("up", nodes)


def test_a_job_called_bash_is_a_job_like_any_other(submit):
    run = submit("bash", NO_WANDB, "trainer.max_steps=2")
    assert ended(run) == "finished", log(run)
    assert "2 ranks on 2 nodes" in run.attempts()[0].log().read_text()


def test_a_node_list_of_two_dimensions_is_taken_apart():
    assert output("scontrol", "show", "hostnames", "rack[1-2]n[3-4]")[0] == "rack1n3"


@pytest.mark.slow
def test_nodes_whose_own_name_is_127_0_1_1(submit, rebuilt):
    rebuilt("--loopback-name")
    assert "127.0.1.1" in devcluster("exec", "n1", "getent", "hosts", "n1")
    run = submit("loopback", NO_WANDB, "trainer.max_steps=2")
    assert ended(run) == "finished", log(run)
    assert [report["preflight"]["interface"] for report in run.attempts()[0].nodes()] == ["eth0", "eth0"]


@pytest.mark.slow
def test_gpus_that_cannot_be_used_are_no_reason_to_train_on_the_cpu(submit, rebuilt):
    """The scheduler of the development cluster has GPUs to give that no program can use."""
    rebuilt("--gpus", "2")
    run = submit("no-gpu", NO_WANDB, gpus_per_node=1)
    assert ended(run) == "stopped", log(run)
    assert "torch sees 0 of 1 GPUs" in run.attempts()[0].error
    assert len(run.attempts()) == 3, "and it does not go on for ever"
    cpu = submit("on-cpu", NO_WANDB, "trainer.max_steps=2", "trainer.accelerator=cpu", gpus_per_node=1)
    assert ended(cpu) == "finished", log(cpu)
    asked = subprocess.run(["scontrol", "show", "job", cpu.job], capture_output=True, text=True, check=True).stdout
    assert "gres/gpu" in asked or "gres:gpu" in asked
