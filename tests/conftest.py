"""Fixtures: a small set of shards that a network learns in seconds, and a clean folder of runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import write_recipe, write_set


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of shards that tests read but do not change."""
    return write_set(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_shards(tmp_path: Path, tiny_shards: Path) -> Path:
    """A set of shards that a test may damage."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("mean-*")))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs; W&B offline, whatever the machine's configuration."""
    monkeypatch.setenv("PAPERSCALE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path / "runs"


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_shards: Path) -> Path:
    """A recipe that trains three epochs of eight steps in a second."""
    path = tmp_path / "tiny.yaml"
    write_recipe(path, tiny_shards)
    return path


@pytest.fixture
def shared_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter be one that no checkout below /tmp can make look like this machine's own."""
    monkeypatch.setattr(sys, "executable", shutil.which("bash"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of four megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a real full disk needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def slurm_answers() -> str | None:
    """Why the SLURM tests cannot run here, or None."""
    if shutil.which("sbatch") is None:
        return "no sbatch on PATH: `make cluster-up` installs and starts a SLURM on this machine"
    result = subprocess.run(["sinfo", "-h", "-p", "debug", "-o", "%D"], capture_output=True, text=True)
    if result.returncode or not result.stdout.strip().isdigit() or int(result.stdout) < 2:
        return "no SLURM with two nodes in partition debug answers: `make cluster-up` starts one on this machine"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    need_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if need_slurm and (reason := slurm_answers()):
        for item in need_slurm:
            item.add_marker(pytest.mark.skip(reason=reason))
