"""A contract over every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from paperscale.cli import main
from paperscale.recipes import HEADER_FIELDS, RecipeArguments, all_recipes, header
from paperscale.training.recipe import RecipeCLI

RECIPES = sorted(all_recipes().values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_everything(path: Path):
    found = header(path)
    assert set(found.fields) == set(HEADER_FIELDS)
    assert all(found.fields.values())
    assert found.title
    assert found.source
    assert found.fields["run"].split()[:2] == ["paperscale", "fit"]
    assert found.fields["run"].split()[2] == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_resolves_and_says_nothing_that_the_job_decides(path: Path):
    cli = RecipeCLI(RecipeArguments.parse([str(path)]).to_cli())
    assert sum(p.numel() for p in cli.model.parameters()) > 0
    written = yaml.safe_load(path.read_text())
    assert not {"devices", "num_nodes", "logger"} & set(written["trainer"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_trains_for_a_step(
    path: Path, runs: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On images of another size than its own: what the network is for, the recipe's own run shows."""
    words = [f"data.path={tiny_shards}", "trainer.max_steps=1", "tracking.enabled=false"]
    assert main(["fit", str(path), "--name", "one-step", *words]) == 0
    assert (runs / "one-step/results.json").exists()
