"""The nodes of the development cluster are machines: they have names and addresses, and they can fail."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.dev import SCRIPT, dev_cluster, devcluster, machines, output  # noqa: F401  a fixture
from helpers import wait_for

pytestmark = pytest.mark.slurm


def connect(node: str, other: str, then: str = "") -> list[str | Path]:
    """A command that connects from a node to another one, where slurmd listens, and does something then."""
    program = f"import socket; s = socket.create_connection(('{other}', 16818), 2); {then}"
    return [SCRIPT, "exec", node, sys.executable, "-c", program]


def reaches(node: str, other: str) -> bool:
    return subprocess.run(connect(node, other), capture_output=True, check=False).returncode == 0


def submit(path: Path, script: str, *options: str) -> str:
    """Submit a job whose output goes to a file; return its id."""
    return output("sbatch", "--parsable", "--open-mode=append", "-o", str(path), *options, "--wrap", script)[0]


def state(job: str) -> str:
    """The job's state, empty when it has left the queue."""
    return " ".join(output("squeue", "-h", "-t", "all", "-j", job, "-o", "%T"))


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def daemons() -> list[int]:
    """Our processes; one that has ended and waits to be collected has lost its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"PAPERSCALE_CLUSTER=" in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def up_again(options: dict[str, Any]) -> list[str]:
    """The words that ask for the same cluster."""
    numbers = [word for name in ("cpus", "mem", "gpus") for word in (f"--{name}", str(options[name]))]
    switches = [f"--{name.replace('_', '-')}" for name in ("dbd", "loopback_name") if options[name]]
    return ["up", str(options["nodes"]), *numbers, *switches]


def test_a_job_sees_nodes_with_names_and_addresses_of_their_own(dev_cluster):  # noqa: F811
    script = "echo $(hostname) $(getent hosts $(hostname)) $(ls /sys/class/net) $(readlink /proc/self/ns/ipc)"
    lines = sorted(" ".join(output("srun", "-N1", "-w", name, "bash", "-c", script)) for name in dev_cluster["nodes"])
    for line, (name, node) in zip(lines, sorted(dev_cluster["nodes"].items()), strict=True):
        assert line.startswith(f"{name} {node['address']} {name} eth0 lo ipc:")
    assert len({line.split()[-1] for line in lines} | {str(Path("/proc/self/ns/ipc").readlink())}) == len(lines) + 1


def test_a_node_sees_this_machines_files_and_can_submit(dev_cluster, tmp_path):  # noqa: F811
    command = ["sbatch", "--wait", "-o", "out", "--wrap", "echo from $PWD"]
    words = [SCRIPT, "exec", "n2", *command]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "out").read_text() == f"from {tmp_path}\n"


def test_a_cut_node_lives_on_without_a_network_until_it_is_healed(dev_cluster):  # noqa: F811
    assert reaches("n1", "n2")
    devcluster("cut", "n2")
    assert not reaches("n1", "n2")
    assert devcluster("exec", "n2", "hostname") == "n2\n"
    assert machines()["nodes"]["n2"]["network"] == "cut"
    devcluster("heal", "n2")
    assert reaches("n1", "n2")


def test_a_crashed_node_is_silent_and_comes_back(dev_cluster):  # noqa: F811
    """No socket is closed properly: who was connected is not told, as when the power fails."""
    listen = connect("n1", "n2", "print('connected', flush=True); s.recv(1)")
    with subprocess.Popen(listen, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as connected:
        assert connected.stdout
        connected.stdout.readline()
        devcluster("crash", "n2")
        assert "timed out" in connected.communicate()[1]
    assert machines()["nodes"]["n2"]["power"] == "off"
    assert not reaches("n1", "n2")
    devcluster("boot", "n2")
    assert reaches("n1", "n2")
    hostname, uptime = output("srun", "-w", "n2", "sh", "-c", "hostname; cut -d ' ' -f 1 /proc/uptime")
    assert hostname == "n2"
    assert float(uptime) < 30, "SLURM can tell that it has rebooted"


def test_the_controllers_end_and_return_leave_a_running_job_alone(dev_cluster, tmp_path):  # noqa: F811
    job = submit(tmp_path / "out", f"while sleep 0.1; do touch {tmp_path}/beat; done")
    wait_for((tmp_path / "beat").exists, 20)
    devcluster("ctld", "restart")  # saves what it knows; a kill within 5 s of a job's start would lose the start
    assert state(job) == "RUNNING"
    devcluster("ctld", "kill")
    assert machines()["controller"]["state"] == "down"
    assert {node["slurm"] for node in machines()["nodes"].values()} == {"unknown"}
    devcluster("ctld", "start")
    assert state(job) == "RUNNING"
    (tmp_path / "beat").unlink()
    wait_for((tmp_path / "beat").exists, 5)
    assert "Restarts=0" in output("scontrol", "show", "job", job)
    output("scancel", "--signal=KILL", "--full", job)


def test_up_again_does_nothing(dev_cluster, tmp_path):  # noqa: F811
    job = submit(tmp_path / "out", "sleep 30")
    wait_for(lambda: state(job) == "RUNNING", 20)
    devcluster(*up_again(dev_cluster["options"]))
    assert state(job) == "RUNNING"
    output("scancel", "--signal=KILL", "--full", job)


@pytest.mark.slow
def test_down_leaves_no_trace_and_up_makes_what_is_asked(dev_cluster):  # noqa: F811
    """GPUs are given out by number; Debian's way of naming a machine can be had."""
    if output("squeue", "-h"):
        pytest.skip("jobs are in the queue")
    before = interfaces()
    try:
        devcluster("down")
        assert not [path for path in Path("/etc/slurm").iterdir() if path.is_symlink()]
        assert not Path("/run/paperscale-cluster").exists()
        assert interfaces() == {name for name in before if not name.startswith("paperscale")}
        assert not daemons()
        devcluster("up", "2", "--gpus", "2", "--cpus", "8", "--mem", "1000", "--loopback-name")
        assert output("srun", "--gpus=1", "printenv", "CUDA_VISIBLE_DEVICES") == ["0"]
        names = ["127.0.1.1", "n1", machines()["nodes"]["n2"]["address"], "n2"]
        assert output("srun", "-w", "n1", "getent", "hosts", "n1", "n2") == names
        assert output("sinfo", "-h", "-p", "debug", "-o", "%D %c %m %G") == ["2", "8", "1000", "gpu:2"]
    finally:
        devcluster(*up_again(dev_cluster["options"]))
    assert machines()["options"] == dev_cluster["options"]
