"""ResNet-152 as a job of 1, 8 and 64 GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from paperscale.cli import main

WEAK, STRONG = "resnet152-imagenet-64gpus", "resnet152-imagenet"


@pytest.mark.parametrize(
    ("recipe", "nodes", "gpus", "strategy"),
    [
        (WEAK, 8, 8, "deepspeed_zero1"),
        pytest.param(WEAK, 8, 8, "ddp", marks=pytest.mark.slow),
        pytest.param(STRONG, 1, 8, "ddp", marks=pytest.mark.slow),
        pytest.param(STRONG, 1, 8, "deepspeed_zero1", marks=pytest.mark.slow),
        pytest.param(STRONG, 8, 8, "ddp", marks=pytest.mark.slow),
        pytest.param(STRONG, 1, 1, "auto", marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_renders_the_job(
    recipe: str,
    nodes: int,
    gpus: int,
    strategy: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)  # without any data
    shape = ["--cluster", "gpu", "--nodes", str(nodes), "--gpus-per-node", str(gpus)]
    assert main(["submit", recipe, *shape, "--strategy", strategy, "--dry-run"]) == 0
    script, warnings = capsys.readouterr()
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert f"#SBATCH --gpus-per-node={gpus}\n" in script
    assert ("batch normalisation over 4 samples" in warnings) if (recipe, nodes) == (STRONG, 8) else not warnings
    assert not runs.exists()
