"""ResNet-152 and BERT-large as jobs of 1, 8 and 64 GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from paperscale.cli import main
from paperscale.recipes import find
from paperscale.training.recipe import RecipeCLI

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


SHAPES = {1: (1, 1), 8: (1, 8), 64: (8, 8)}


@pytest.mark.parametrize(
    ("recipe", "gpus", "strategy"),
    [
        pytest.param(recipe, gpus, strategy, marks=[] if (gpus, strategy) == quick else pytest.mark.slow)
        for recipe, quick in (("bert-large-phase1", (64, "deepspeed_zero2")), ("bert-large-phase2", (8, "ddp")))
        for gpus in SHAPES
        for strategy in ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
        if gpus > 1 or strategy == "ddp"
    ],
)
def test_berts_phases_are_rendered_with_the_same_global_batch(
    recipe: str,
    gpus: int,
    strategy: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)  # without any data
    nodes, per_node = SHAPES[gpus]
    shape = ["--cluster", "gpu", "--nodes", str(nodes), "--gpus-per-node", str(per_node)]
    assert main(["submit", recipe, *shape, "--strategy", strategy, "--dry-run"]) == 0
    script, warnings = capsys.readouterr()
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert not warnings
    cli = RecipeCLI([f"--config={find(recipe)}"], build=False)
    data = cli.config.data.init_args
    passes = -(-data.global_batch_size // (gpus * data.micro_batch_size))
    assert passes * gpus * data.micro_batch_size == data.global_batch_size == {1: 65536, 2: 32768}[int(recipe[-1])]
