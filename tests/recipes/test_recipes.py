"""A contract over every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from paperscale.cli import main
from paperscale.recipes import HEADER_FIELDS, RecipeArguments, all_overlays, all_recipes, header
from paperscale.training.recipe import RecipeCLI
from tiny_text import write_for

RECIPES = sorted(all_recipes().values())
OVERLAYS = sorted(all_overlays().values())
_LARGE = ("-imagenet", "resnet110-", "resnet1202-", "d2l-")  # seconds each
_ALIKE = ("-phase2", "-adam-", "-medium-", "-mini-", "bert-small-", "bert-large-glue", "bert-large-swag", "-boolq")
"""Recipes whose parts those of others are, with other numbers."""
_IMAGES = "paperscale.data.ImageShards"


def _slow_if_large(path: Path) -> Any:
    large = any(part in path.stem for part in (*_LARGE, *_ALIKE))
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
    import torch

    with torch.device("meta"):
        cli = RecipeCLI(RecipeArguments.parse([str(path)]).to_cli())
    assert sum(p.numel() for p in cli.model.parameters()) > 0
    written = yaml.safe_load(path.read_text())
    assert not {"devices", "num_nodes", "logger"} & set(written["trainer"])


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_says_what_it_is_and_merges(path: Path):
    base = (
        "bert-base-glue" if "glue" in path.stem or "bilstm" in path.stem or "fine" in path.stem else "bert-base-phase1"
    )
    assert path.read_text().startswith("# ")
    cli = RecipeCLI(RecipeArguments.parse([base, path.stem]).to_cli(), build=False)
    plain = RecipeCLI(RecipeArguments.parse([base]).to_cli(), build=False)
    same = path.stem == "_bert-mask-80-10-10"  # what the paper has anyway
    assert (cli.resolved() == plain.resolved()) == same


@pytest.mark.parametrize("path", [_slow_if_large(path) for path in RECIPES], ids=lambda path: path.stem)
def test_it_trains_for_a_step(
    path: Path, runs: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On few and small samples, texts through a small network: what it is for, the recipe's own run shows."""
    data = yaml.safe_load(path.read_text())["data"]
    of_images = data["class_path"] == _IMAGES
    words = ["trainer.max_steps=1", "tracking.enabled=false", "speed.compile=none"]
    words += images(tiny_shards, data["init_args"]) if of_images else text(tmp_path, path, data)
    assert main(["fit", str(path), "--name", "one-step", *words]) == 0
    assert (runs / "one-step/results.json").exists()


def images(shards: Path, written: dict[str, Any]) -> list[str]:
    words = [f"data={shards}"]
    if "micro_batch_size" in written or written.get("size", 0) > 32:
        words += ["data.global_batch_size=8", "data.micro_batch_size=null"]
    if written.get("size", 0) > 32:
        words += ["data.size=32", "data.eval_size=null", "data.resize=36", "data.jitter=[36,48]"]
    return words


def text(folder: Path, path: Path, data: dict[str, Any]) -> list[str]:
    network = yaml.safe_load(path.read_text())["model"]["init_args"]["network"]
    small = {"vocab_size": 300, "layers": 4, "hidden": 32, "heads": 4}
    words = [f"model.network.{key}={value}" for key, value in small.items()]
    assert network["class_path"].startswith("paperscale.papers.")
    length = 200 if data["class_path"].endswith(("Questions", "TaggedWords")) else 64
    length = min(length, network.get("init_args", {}).get("positions", length))
    words += [*write_for(data["class_path"], folder / "text"), f"data.length={length}"]
    words += ["trainer.val_check_interval=null", "trainer.check_val_every_n_epoch=1"]
    return [*words, "data.global_batch_size=8", "data.micro_batch_size=null", "trainer.precision=32-true"]
