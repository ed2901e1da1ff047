"""``paperscale validate``, ``test`` and ``predict`` on the checkpoints of real runs, alone and as an ensemble."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import Tensor

import attempts
from paperscale.cli import main
from paperscale.errors import FINISHED, UserError
from paperscale.jobs import evaluate
from paperscale.jobs.run import Run
from paperscale.nn.ensemble import Ensemble
from paperscale.papers.resnet import CifarResNet
from paperscale.training.tensorfile import TensorReader
from tiny import SIZES, image_of, write_recipe

SHORT = ("trainer.max_epochs=1", "trainer.limit_val_batches=0", "test_after_fit=false", "checkpoint.every_n_steps=4")
DEPTHS = {"one": 1, "two": 2}  # n of each run's network


class Bare(LightningModule):
    """Has neither weights nor a network."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A folder of runs: two of other depths, the second on a copy of the shards."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_recipe(folder / "tiny.yaml", tiny_shards)
    copy = shutil.copytree(tiny_shards, folder / "copy")
    own = {"one": (), "two": (f"data.path={copy}",)}
    with pytest.MonkeyPatch.context() as patch, attempts.own_signals():
        patch.setenv("PAPERSCALE_RUNS", str(folder / "runs"))
        for seed, (name, words) in enumerate(own.items()):
            depth = (f"model.network.n={DEPTHS[name]}", f"seed_everything={seed}", "model.lr=0.02")
            run = attempts.begin(name, str(folder / "tiny.yaml"), *SHORT, *depth, *words)
            assert attempts.attempt(run) == FINISHED
    return folder


@pytest.fixture
def run(trained: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The first run, to do with as one likes."""
    shutil.copytree(trained / "runs", runs)
    monkeypatch.chdir(tmp_path)
    return Run(runs / "one")


def asked(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """Return what a command prints as JSON, or its error under ``error``."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    captured = capsys.readouterr()
    return {"error": captured.err} if code else {**json.loads(captured.out), "warnings": captured.err}


def folder_of(run: Run, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def weights(checkpoint: Path) -> dict[str, Tensor]:
    reader = TensorReader(checkpoint)
    names = [name for name in reader.tensors if name.startswith("model/")]
    return {name.removeprefix("model/"): reader.whole(name) for name in names}


def scores(name: str, step: int, runs: Path) -> Tensor:
    """Return the softmax of a run's network for each image of the test split, computed without Paperscale's data."""
    network = CifarResNet(DEPTHS[name], channels=1, classes=8).eval()
    state = weights(runs / name / f"checkpoints/step-{step:08d}")
    network.load_state_dict({key.removeprefix("network."): value for key, value in state.items()})
    images = torch.stack([torch.from_numpy(image_of("test", number)[0]) for number in range(SIZES["test"])])
    with torch.no_grad():
        return network((images[:, None] / 255 - 0.25) / 0.2).softmax(dim=1)


def accuracy(scores: Tensor) -> float:
    labels = torch.tensor([image_of("test", number)[1] for number in range(SIZES["test"])])
    return float((scores.argmax(dim=1) == labels).float().mean())


def test_an_ensemble_scores_the_mean_softmax_of_runs_of_other_depths_and_of_checkpoints(run, runs, capsys):
    found = asked(capsys, "test", "one", "--with", "two", "--with", "one@4")
    mean = sum(scores(*of, runs) for of in (("one", 8), ("two", 8), ("one", 4))) / 3
    assert found["metrics"]["test/accuracy"] == pytest.approx(accuracy(mean))
    loss = -mean[range(len(mean)), [image_of("test", number)[1] for number in range(len(mean))]].log().mean()
    assert found["metrics"]["test/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert [(of["name"], of["step"]) for of in found["ensemble"]] == [("two", 8), ("one@4", 4)]
    assert found["step"] == 8
    predicted = asked(capsys, "predict", "two", "--with", "one")
    both = scores("one", 8, runs) + scores("two", 8, runs)
    assert json.loads(Path(predicted["file"]).read_text()) == both.argmax(dim=1).tolist()
    assert not torch.equal(both.argmax(dim=1), scores("two", 8, runs).argmax(dim=1)), "it is neither one's alone"


def test_every_evaluation_keeps_its_own_file_and_says_what_it_reproduces(run, capsys):
    plain = asked(capsys, "test", "one")
    assert plain["file"] == str(run.path / "evaluations/test.json")
    kept = json.loads(Path(plain["file"]).read_text())
    assert kept["reproduces"].startswith("a single view")
    assert {key: kept[key] for key in ("stage", "overrides", "step", "weights", "ensemble")} == {
        "stage": "test",
        "overrides": [],
        "step": 8,
        "weights": "trained",
        "ensemble": [],
    }
    assert asked(capsys, "test", "one")["file"] == plain["file"], "the same once more"
    ten = asked(capsys, "test", "one", "data.eval_crop=ten", "data.size=6", "data.resize=8")
    assert Path(ten["file"]).name == "test-eval_crop=ten-size=6-resize=8.json"
    assert "tables 2 and 3" in ten["reproduces"]
    assert ten["overrides"] == ["data.eval_crop=ten", "data.size=6", "data.resize=8"]
    shutil.rmtree(folder_of(run, 8))
    older = asked(capsys, "test", "one")
    assert (older["step"], Path(older["file"]).name) == (4, "test-2.json"), "of other weights, it takes no one's place"
    assert json.loads(Path(plain["file"]).read_text())["checkpoint"] == "one/step-00000008"
    assert "nothing to validate" in asked(capsys, "validate", "one", code=2)["error"]
    centre = ("data.eval_crop=center", "data.size=6", "data.resize=8", "trainer.limit_val_batches=1.0")
    assert main(["validate", "one", *centre]) == 0
    out = capsys.readouterr().out
    assert re.search("^reproduces +the centre crop", out, re.MULTILINE)


def test_a_file_of_weights_is_scored_by_the_recipe_that_is_named(trained, run, tmp_path, capsys):
    state = weights(folder_of(run, 4))
    save_file(state, tmp_path / "own.safetensors")
    bare = {name.removeprefix("network."): tensor for name, tensor in state.items() if "num_batches" not in name}
    torch.save({"model_ema": bare, "epoch": 3}, tmp_path / "bare.pth")
    expected = asked(capsys, "test", "one", "--checkpoint", "4")["metrics"]
    recipe = str(trained / "tiny.yaml")
    own = asked(capsys, "test", recipe, "--checkpoint", "own.safetensors")
    assert (own["metrics"], own["step"], "file" in own) == (expected, None, False)
    words = ("test", recipe, "--checkpoint", "bare.pth")
    assert "add init_prefix=/network." in asked(capsys, *words, code=2)["error"]
    prefixed = asked(capsys, *words, "init_prefix=/network.")
    assert prefixed["metrics"] == expected
    assert prefixed["weights"] == f"37 tensors from model_ema of {tmp_path}/bare.pth"
    del state["network.fc.bias"]
    save_file(state, tmp_path / "own.safetensors")
    error = asked(capsys, "test", "one", "--checkpoint", "own.safetensors", code=2)["error"]
    assert error.endswith("1 missing (network.fc.bias); use the recipe that made it\n")


def test_long_evaluations_say_how_far_they_are_and_why_enlarged_images_take_long(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "_EVERY_S", 0)
    dense = ("data.eval_crop=dense", "data.eval_batch_size=30")
    said = asked(capsys, "test", "one", *dense, "data.scales=[8,16]")["warnings"]
    assert re.fullmatch(r"batch 1 of 2, \d+ s left\nbatch 2 of 2, 0 s left\n", said)
    said = asked(capsys, "predict", "one", *dense, "data.scales=[16,24]")["warnings"].splitlines()
    assert said[0] == (
        "WARNING data.scales=[16, 24] enlarge images of 8 x 8, to 13 times their pixels; set sizes near theirs, for "
        "example 'data.scales=[7,8,12,15,20]'"
    )
    assert len(said) == 3


def test_networks_that_cannot_be_averaged_are_refused_with_the_fix(trained, run, own_shards, tmp_path, capsys):
    def refused(*words: str) -> str:
        return asked(capsys, *words, code=2)["error"]

    both = Ensemble([CifarResNet(1, 8), CifarResNet(1, 9)], ["one", "nine"])
    with pytest.raises(
        UserError, match="nine gives 9 classes and one 8: these cannot be averaged; leave one of the two"
    ):
        both(torch.zeros(2, 3, 8, 8))
    manifest = own_shards / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.25", "0.5"))
    error = refused("test", "one", f"data.path={own_shards}", "--with", "two")
    assert "--with two: it was trained with other normalisation" in error
    assert error.endswith("leave it out, or train it on the same data\n")
    assert "is taken already; name another checkpoint" in refused("test", "one", "--with", "one@8")
    assert "did you mean 'two'?" in refused("test", "one", "--with", "tow")
    assert "name best, last or a step: 4, 8" in refused("test", "one", "--with", "two@5")
    assert f"--with two@best: {run.path.parent}/two/checkpoints: which is best" in refused(
        "test", "one", "--with", "two@best"
    )
    assert "name a run, or a checkpoint's folder" in refused("test", "one", "--with", "w.safetensors")
    assert "there is no such file; check the path" in refused("test", "one", "--checkpoint", "w.safetensors")
    recipe = tmp_path / "bare.yaml"
    data = (trained / "tiny.yaml").read_text().partition("data:")[2]
    recipe.write_text(f"model: {{class_path: test_evaluation.Bare}}\ndata:{data}")
    error = refused("test", str(recipe), "--checkpoint", str(folder_of(run, 8)), "--with", "two")
    assert "Bare has no `network` whose scores could be averaged; evaluate the runs one by one" in error
    assert "with --checkpoint" in refused("test", str(recipe))
    (trained / "copy").rename(trained / "away")
    try:
        found = asked(capsys, "test", "one", "--with", "two")
    finally:
        (trained / "away").rename(trained / "copy")
    assert "WARNING --with two: whether its images were normalised alike is not known" in found["warnings"]
    assert found["ensemble"][0]["name"] == "two"
