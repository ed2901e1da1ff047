"""``paperscale checkpoint``, and what takes a checkpoint's name, on the checkpoints of a real run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attempts
from paperscale.cli import main
from paperscale.errors import FINISHED, USER_ERROR
from paperscale.jobs.checkpoints import keep_initial
from paperscale.jobs.run import Run
from paperscale.jobs.validation import Place, Validator
from paperscale.jobs.worker import main as work
from paperscale.recipes import RecipeArguments
from paperscale.training.tensorfile import TensorReader
from tiny import write_recipe


def begin(name: str, recipe: Path, *overrides: str) -> Run:
    run = attempts.begin(name, str(recipe), *overrides)
    keep_initial(run, run.recipe.read_text())
    return run


def attempt(run: Run) -> str:
    """Carry out an attempt; return where it began."""
    with attempts.own_signals():
        assert attempts.attempt(run) == FINISHED, run.attempts()[-1].error
    return run.attempts()[-1].facts["resumed_from"] or "the start"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A folder of runs with one that has checkpoints at steps 16, 20 and 24, and the recipe beside it."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "tiny.yaml"
    write_recipe(recipe, tiny_shards, "{every_n_steps: 5, keep_last: 3, monitor: val/accuracy}", "ema: {decay: 0.9}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERSCALE_RUNS", str(folder / "runs"))
        attempt(begin("one", recipe))
    return folder


@pytest.fixture
def run(trained: Path, runs: Path) -> Run:
    """The run, to do with as one likes."""
    shutil.copytree(trained / "runs", runs)
    return Run(runs / "one")


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["checkpoint", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.out if code != 2 else captured.err


def at(run: Run, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def weights(checkpoint: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint)
    names = [name for name in reader.tensors if name.startswith(f"{kind}/")]
    return {name.removeprefix(f"{kind}/"): reader.whole(name) for name in names}


def test_list_tells_what_there_is_and_what_is_best(run, capsys):
    rows = json.loads(said(capsys, "list", "one", "--json"))
    assert [(row["step"], row["epoch"], row["samples"], row["world_size"]) for row in rows] == [
        (16, 2, 460, 1),
        (20, 2, 588, 1),
        (24, 3, 690, 1),
    ]
    assert [row["last"] for row in rows] == [False, False, True]
    scores = {row["step"]: row["metrics"].get("val/accuracy", -1.0) for row in rows}
    assert [row["step"] for row in rows if row["best"]] == [max(scores, key=scores.__getitem__)]
    assert scores[20] == -1.0, "it is within an epoch"
    assert all(row["verified"] == "sizes" for row in rows)
    text = said(capsys, "list", "one", "--verify")
    assert text.count("verified") == 3
    assert "last" in text.splitlines()[3]


def test_verify_names_the_damaged_file_and_ends_with_1(run, capsys):
    assert said(capsys, "verify", "one").count("OK") == 3
    damage(at(run, 24) / "tensors-00000.safetensors")
    text = said(capsys, "verify", "one", code=1)
    assert "step-00000024  DAMAGED" in text
    assert "tensors-00000.safetensors" in text
    assert "OK" in said(capsys, "verify", at(run, 20))
    damaged = json.loads(said(capsys, "verify", run.checkpoints, "--json", code=1))
    assert [bool(row["problem"]) for row in damaged] == [False, False, True]
    assert "step 20 of one" in said(capsys, "export", "one", "-o", run.path / "w.safetensors"), (
        "the next older is taken"
    )
    (at(run, 16) / "manifest.json").unlink()
    assert "DAMAGED" in said(capsys, "list", "one").splitlines()[1]


def test_inspect_counts_what_is_in_the_model_and_the_optimizer(run, capsys):
    found = json.loads(said(capsys, "inspect", "one", "20", "--tensors", "--json"))
    assert found["parameters"]["elements"] == found["averages"]["elements"] == 74872
    assert found["parameters"]["by_part"] == {
        "network.conv1": 144,
        "network.bn1": 32,
        "network.blocks": 74176,
        "network.fc": 520,
    }
    assert (found["buffers"]["tensors"], found["buffers"]["by_type"]) == (21, {"float32": 480, "int64": 7})
    (optimizer,) = found["optimizers"]
    assert (optimizer["class"], optimizer["groups"][0]["lr"]) == ("SGD", pytest.approx(0.0005))
    assert optimizer["state"] == {"momentum_buffer": {"tensors": 23, "elements": 74872, "dtype": "float32"}}
    assert found["random"] == {"ranks": 1, "generators": ["numpy", "python", "torch"]}
    fc = next(row for row in found["tensors"] if row["name"] == "model/network.fc.weight")
    assert (fc["shape"], fc["dtype"]) == ([8, 64], "float32")
    text = said(capsys, "inspect", at(run, 24))
    assert "SGD: momentum_buffer (float32)" in text
    assert "network.blocks  74,176" in text


def test_average_is_the_mean_in_double_precision_and_can_be_scored(run, tmp_path, capsys):
    out = tmp_path / "mean.safetensors"
    assert "the mean of steps 16, 24" in said(capsys, "average", "one", 16, 24, "-o", out)
    first, last, found = weights(at(run, 16)), weights(at(run, 24)), load_file(out)
    assert found.keys() == last.keys()
    for name, tensor in found.items():
        mean = (first[name].double() + last[name].double()) / 2
        assert torch.equal(tensor, mean.float() if last[name].is_floating_point() else last[name]), name
    folder = tmp_path / "mean"
    assert "the mean of steps 20, 24" in said(capsys, "average", "one", "--last", 2, "-o", folder)
    assert main(["test", "one", "--checkpoint", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "test/accuracy" in out
    assert "averages" not in out, "of the weights: it is another kind of average"
    assert "has no checkpoint '7'" in said(capsys, "average", "one", 7, 16, "-o", tmp_path / "x", code=2)
    assert "has 1 checkpoints to average" in said(capsys, "average", "one", 16, "-o", tmp_path / "x", code=2)
    assert "is there already" in said(capsys, "average", "one", "-o", folder, code=2)


def test_export_converts_parameters_and_keeps_buffers(run, tmp_path, capsys):
    said(capsys, "export", "one", "best", "-o", tmp_path / "b.safetensors", "--dtype", "bf16")
    found = load_file(tmp_path / "b.safetensors")
    assert found["network.fc.weight"].dtype == torch.bfloat16
    assert found["network.bn1.running_mean"].dtype == torch.float32
    assert found["network.bn1.num_batches_tracked"].dtype == torch.int64
    said(capsys, "export", at(run, 24), "-o", tmp_path / "e.safetensors", "--ema")
    averages, exported = weights(at(run, 24), "ema"), load_file(tmp_path / "e.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in averages.items())
    assert not torch.equal(exported["network.fc.bias"], weights(at(run, 24))["network.fc.bias"])
    assert "is there already" in said(capsys, "export", "one", "-o", tmp_path / "e.safetensors", code=2)
    assert "name it w.safetensors" in said(capsys, "export", "one", "-o", tmp_path / "w.bin", code=2)
    err = said(capsys, "export", "one", "-o", tmp_path / "t.safetensors", "--format", "torchvision", code=2)
    assert "torchvision has no network like CifarResNet; leave --format out" in err
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["b.safetensors", "e.safetensors"]


def test_names_of_checkpoints_are_told_where_they_are_wrong(run, capsys):
    assert "`paperscale checkpoint save one`" in said(capsys, "one", code=2)
    assert "did you mean 'list'?" in said(capsys, "lst", "one", code=2)
    assert "no run 'on'" in said(capsys, "list", "on", code=2)
    assert "name best, last or a step: 16, 20, 24" in said(capsys, "inspect", "one", "21", code=2)
    assert "leave 'best' out" in said(capsys, "inspect", at(run, 16), "best", code=2)
    recipe = at(run, 24) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("monitor: val/accuracy", "monitor: null"))
    assert "no checkpoint.monitor; name last or a step" in said(capsys, "export", "one", "best", "-o", "x", code=2)


def test_a_checkpoint_is_scored_with_its_averages_as_in_the_run(run, capsys):
    assert main(["test", "one"]) == 0
    out = capsys.readouterr().out
    assert f"{run.read_json('results.json')['test/accuracy']:.4f}" in out
    assert re.search("^weights +averages$", out, re.MULTILINE)
    assert main(["validate", "one", "ema.evaluate=false", "--checkpoint", "20"]) == 0
    out = capsys.readouterr().out
    assert "averages" not in out
    assert re.search("^step +20$", out, re.MULTILINE)


ONE_STEP = ("trainer.max_steps=1", "model.lr=0", "ema.decay=null", "test_after_fit=false")


def test_a_run_begins_with_another_ones_weights_until_it_has_a_checkpoint(trained, run, capsys):
    fine = begin("fine", trained / "tiny.yaml", "init_from=one@16", *ONE_STEP)
    expected = weights(at(run, 16))
    shutil.rmtree(run.path)  # as another run's pruning does
    for start in ("the start", "the start", "step-00000001"):
        assert attempt(fine) == start
        begun = "begins with 44 tensors" in capsys.readouterr().out
        assert begun == (start == "the start")
        found = weights(at(fine, 1))
        for name in ("network.fc.weight", "network.conv1.weight", "network.blocks.2.conv2.weight"):
            assert torch.equal(found[name], expected[name])
        (fine.path / "results.json").unlink()
        if len(fine.attempts()) == 1:
            shutil.rmtree(at(fine, 1))
    shutil.rmtree(fine.path / "init")
    words = RecipeArguments.parse([str(fine.recipe)])
    assert Validator(Place(), begun=True)(words).recipe == fine.recipe.read_text(), "nor is it looked for at a resume"
    shutil.rmtree(at(fine, 1))
    (fine.path / "attempts/0004").mkdir()
    assert work(str(fine.path), 4) == USER_ERROR
    assert "is gone, and the run has no checkpoint yet" in capsys.readouterr().err


def test_weights_that_do_not_all_fit_are_reported_and_those_of_which_none_does_are_refused(
    trained, run, tmp_path, capsys
):
    state = weights(at(run, 24))
    bare = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    save_file({**bare, "fc.weight": torch.ones(3, 64), "head.bias": torch.ones(3)}, tmp_path / "bare.safetensors")
    recipe = trained / "tiny.yaml"
    words = ["fit", str(recipe), "--init-from", str(tmp_path / "bare.safetensors"), "--name", "x"]
    assert main(words) == 2
    hint = "with 'network.' put before they give 43 of the model's 44: add init_prefix=/network."
    assert hint in capsys.readouterr().err
    part = begin("part", recipe, f"init_from={tmp_path}/bare.safetensors", "init_prefix=/network.", *ONE_STEP)
    assert "43 tensors from" in capsys.readouterr().err
    attempt(part)
    out = capsys.readouterr().out
    assert "43 tensors from" in out
    assert "of another shape, drawn as the recipe says: network.fc.weight: [3, 64], the model has [8, 64]" in out
    assert "unexpected, left out: network.head.bias" in out
    found = weights(at(part, 1))
    assert torch.equal(found["network.fc.bias"], state["network.fc.bias"])
    assert main(["fit", str(recipe), "--init-from", "one@17"]) == 2
    assert main(["fit", str(recipe), "--init-from", "missing.safetensors"]) == 2
    assert "there is no such file" in capsys.readouterr().err
