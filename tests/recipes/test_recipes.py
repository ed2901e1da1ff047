"""A contract over every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from paperscale.cli import main
from paperscale.recipes import HEADER_FIELDS, RecipeArguments, all_recipes, header
from paperscale.training.recipe import RecipeCLI

RECIPES = sorted(all_recipes().values())
_LARGE = ("-imagenet", "resnet110-", "resnet1202-", "d2l-")  # seconds each


def _slow_if_large(path: Path) -> Any:
    large = any(part in path.stem for part in _LARGE)
    return pytest.param(path, marks=pytest.mark.slow) if large else path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_everything(path: Path):
    found = header(path)
    assert set(found.fields) == set(HEADER_FIELDS)
    assert all(found.fields.values())
    assert found.title
    assert found.source
    assert found.fields["run"].split()[:2] in (["paperscale", "fit"], ["paperscale", "submit"])
    assert found.fields["run"].split()[2] == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_resolves_and_says_nothing_that_the_job_decides(path: Path):
    cli = RecipeCLI(RecipeArguments.parse([str(path)]).to_cli())
    assert sum(p.numel() for p in cli.model.parameters()) > 0
    written = yaml.safe_load(path.read_text())
    assert not {"devices", "num_nodes", "logger"} & set(written["trainer"])


@pytest.mark.parametrize("path", [_slow_if_large(path) for path in RECIPES], ids=lambda path: path.stem)
def test_it_trains_for_a_step(
    path: Path, runs: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On few and small images: what the network is for, the recipe's own run shows."""
    words = [f"data={tiny_shards}", "trainer.max_steps=1", "tracking.enabled=false", "speed.compile=none"]
    written = yaml.safe_load(path.read_text())["data"]["init_args"]
    if "micro_batch_size" in written or written.get("size", 0) > 32:
        words += ["data.global_batch_size=8", "data.micro_batch_size=null"]
    if written.get("size", 0) > 32:
        words += ["data.size=32", "data.eval_size=null", "data.resize=36", "data.jitter=[36,48]"]
    assert main(["fit", str(path), "--name", "one-step", *words]) == 0
    assert (runs / "one-step/results.json").exists()
