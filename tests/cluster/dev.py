"""The development cluster, for tests that break its nodes, its network and its controller."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import wait_for

SCRIPT = Path(__file__).parents[2] / "cluster/dev/devcluster"


def devcluster(*words: str) -> str:
    """Run `cluster/dev/devcluster` and return what it prints, as in ``devcluster("cut", "n2")``."""
    result = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, f"devcluster {' '.join(words)}: {result.stderr}"
    return result.stdout


def machines() -> dict[str, Any]:
    """Return what `devcluster status` says: ``options``, ``controller`` and ``nodes`` by name."""
    facts: dict[str, Any] = json.loads(devcluster("status", "--json"))
    return facts


def all_usable() -> bool:
    return all(node["slurm"] in ("idle", "mixed", "allocated") for node in machines()["nodes"].values())


def repair() -> None:
    """Undo what was done to the controller and the nodes, and wait until SLURM can use all nodes."""
    if machines()["controller"]["state"] == "down":
        devcluster("ctld", "start")
    for name, node in machines()["nodes"].items():
        if node["power"] == "off":
            devcluster("boot", name)
        if node["network"] == "cut":
            devcluster("heal", name)
        if node["slurm"].startswith(("down", "drain")):
            words = ["scontrol", "update", f"nodename={name}", "state=resume"]
            subprocess.run(words, check=False, capture_output=True)  # refused when it has come back by itself
    wait_for(all_usable, 90, "SLURM can use all nodes")


@pytest.fixture
def dev_cluster() -> Iterator[dict[str, Any]]:
    """The machines of the development cluster, which a test may break: they are repaired when it is done."""
    if subprocess.run([SCRIPT, "status"], capture_output=True, check=False).returncode:
        pytest.skip("the SLURM that answers is not the development cluster, or we are not root")
    yield machines()
    repair()


def output(*command: str) -> list[str]:
    """Run a command and return the words that it prints."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    return result.stdout.split()
