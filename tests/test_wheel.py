"""The built wheel, from a directory that knows nothing of the source."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def use(python: str, cwd: str, *words: str, **env: str) -> str:
    command = [python, "-m", "paperscale", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_holds_recipes_and_cluster_files_and_no_package_called_platform(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "paperscale/_assets/recipes/resnet/resnet20-mnist.yaml" in names
    assert "paperscale/_assets/cluster/templates/job.sbatch.j2" in names
    assert "paperscale/_assets/cluster/profiles/local.yaml" in names
    assert not [name for name in names if name.startswith(("platform", "tests", "recipes", "cluster"))]


def test_from_the_root_directory_it_lists_recipes_and_renders_a_script(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    where = "import paperscale; print(paperscale.__file__)"
    env = {**os.environ, "PYTHONPATH": str(target)}
    found = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, cwd="/", env=env, check=True)
    assert found.stdout.startswith(str(target))
    paths = {"PYTHONPATH": str(target), "PAPERSCALE_RUNS": str(tmp_path / "runs")}
    assert "resnet20-mnist" in use(sys.executable, "/", "recipes", **paths)
    script = use(sys.executable, "/", "submit", "resnet20-mnist", "--cluster", "slurm", "--dry-run", **paths)
    assert "#SBATCH --job-name=resnet20-mnist" in script
    assert "srun" in script


@pytest.mark.slow
def test_in_an_empty_environment_it_installs_and_works(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, cwd="/")
    runs = {"PAPERSCALE_RUNS": str(tmp_path / "runs"), "PYTHONPATH": ""}
    assert "resnet20-mnist" in use(python, "/", "recipes", **runs)
    assert "srun" in use(python, "/", "submit", "resnet20-mnist", "--cluster", "slurm", "--dry-run", **runs)
