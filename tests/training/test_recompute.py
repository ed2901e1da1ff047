"""Statistics of batch normalisation after training: they are those of the samples, and every reader sees them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import attempts
from attempts import attempt, begin
from paperscale.errors import FINISHED, USER_ERROR
from paperscale.jobs.run import Run
from paperscale.recipes import RecipeArguments
from paperscale.tracking.metrics import read_metrics
from paperscale.training.recipe import RecipeCLI
from paperscale.training.recompute import deal
from paperscale.training.tensorfile import TensorReader
from paperscale.training.weights import of_checkpoint, read_weights
from processes import all_say, start_ranks
from tiny import SIZES

RECOMPUTE = (
    "trainer.callbacks+={class_path: paperscale.training.recompute.RecomputeBatchNorm, init_args: {samples: 99}}"
)
BATCHES = (24, 25, 25, 25)  # the 99 samples, in batches of at most 32
WORDS = ("trainer.max_epochs=2", "data.eval_batch_size=32", "data.flip=true")


@pytest.fixture
def own_signals():
    with attempts.own_signals():
        yield


def newest(run: Run) -> Path:
    return sorted(run.checkpoints.glob("step-*"))[-1]


def tensors(run: Run, prefix: str = "model/") -> dict[str, Tensor]:
    reader = TensorReader(newest(run))
    return {name.removeprefix(prefix): reader.whole(name) for name in reader.tensors if name.startswith(prefix)}


def by_hand(recipe: Path, words: tuple[str, ...], run: Run, epoch: int, averages: bool = False) -> dict[str, Tensor]:
    """Return the statistics of the samples that follow, by hooks on a network of the checkpoint's weights."""
    cli = RecipeCLI(RecipeArguments.parse([str(recipe), *words]).to_cli())
    model, data = cli.model, cli.datamodule
    read_weights(model, of_checkpoint(newest(run), averages))
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            keep = inputs.setdefault(name, [])
            layer.register_forward_pre_hook(lambda layer, given, keep=keep: keep.append(given[0].double()))
    data.consumed = epoch * 230
    data.global_batch_size = 1
    images: list[Tensor] = [data.on_after_batch_transfer(b, 0)["image"] for b in islice(data.train_dataloader(), 99)]
    with torch.no_grad():
        for batch in torch.cat(images).split(BATCHES):
            model.train()(batch)
    found = {}
    for name, parts in inputs.items():
        values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
        found[f"{name}.running_mean"], found[f"{name}.running_var"] = values.mean(1), values.var(1, correction=0)
    return found


def accuracy(recipe: Path, words: tuple[str, ...], run: Run, stage: str) -> float:
    """Return the share of right answers of a checkpoint."""
    cli = RecipeCLI(RecipeArguments.parse([str(recipe), *words]).to_cli())
    read_weights(cli.model, of_checkpoint(newest(run)))
    right = 0.0
    for batch in getattr(cli.datamodule, f"{stage}_dataloader")():
        images = cli.datamodule.on_after_batch_transfer(batch, 0)["image"]
        right += float((cli.model.eval()(images).argmax(1) == batch["label"]).sum())
    return right / SIZES[stage]


def check(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


class Before(Callback):
    """Keeps what there is when the weights are trained. Listed first."""

    state: dict[str, Tensor]
    random: Tensor

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Before.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        Before.random = torch.get_rng_state()


class After(Callback):
    """Sees whether the module and the random numbers are as they were. Listed last."""

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert pl_module.training
        assert torch.equal(torch.get_rng_state(), Before.random)


def test_statistics_are_those_of_the_next_samples_and_nothing_else_changes(runs, tiny_recipe, own_signals):
    look = [f"trainer.callbacks+={{class_path: test_recompute.{name}}}" for name in ("Before", "After")]
    words = (*WORDS, "trainer.max_epochs=1")
    run = begin("run", str(tiny_recipe), *words, look[0], RECOMPUTE, look[1])
    assert attempt(run) == FINISHED
    before, after = Before.state, tensors(run)
    check(by_hand(tiny_recipe, words, run, epoch=1), after)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith(("running_mean", "running_var"))
    }
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    assert manifest["consumed"] == 230
    rows = {key: value for row in read_metrics(run.metrics) for key, value in row.items()}
    for stage in ("val", "test"):
        assert rows[f"{stage}/accuracy"] == pytest.approx(accuracy(tiny_recipe, words, run, stage)), stage


def test_parts_are_dealt_out_so_that_each_counts_once_and_all_ranks_compute_equally_often():
    for count, world_size in ((5, 1), (5, 2), (1, 3), (6, 3)):
        shares = [deal(range(count), rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(part for share in shares for part, counts in share if counts) == [*range(count)]


def test_a_model_without_batch_normalisation_is_refused_before_it_is_trained(runs, tiny_recipe, own_signals, capsys):
    run = begin("none", str(tiny_recipe), "model.network.class_path=helpers.Linear", RECOMPUTE)
    assert attempt(run) == USER_ERROR
    assert "no batch normalisation with running statistics; remove it from trainer.callbacks" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("trainer.max_steps=10",),  # in the middle of an epoch, where a checkpoint is due as well
        ("trainer.callbacks+={class_path: helpers.SignalAt, init_args: {step: 16}}",),  # at the last step
        ("speed.compile=blocks", "speed.compile_backend=aot_eager"),
        ("trainer.precision=bf16-mixed",),
    ],
)
def test_the_last_checkpoint_has_them_however_the_training_ends(runs, tiny_recipe, own_signals, words):
    run = begin("run", str(tiny_recipe), *WORDS, *words, RECOMPUTE)
    assert attempt(run) == FINISHED
    found = tensors(run)
    expected = by_hand(tiny_recipe, WORDS, run, epoch=2)
    tolerance = 0.02 if "bf16" in words[0] else 1e-5
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)


EARLY = "{monitor: val/accuracy, mode: max, stopping_threshold: 0.0}"
STOP = f"trainer.callbacks+={{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {EARLY}}}"


@pytest.mark.slow
def test_a_training_that_stops_early_writes_its_last_step_again(runs, tiny_recipe, own_signals):
    run = begin("early", str(tiny_recipe), *WORDS, STOP, RECOMPUTE, "trainer.val_check_interval=5")
    assert attempt(run) == FINISHED
    assert newest(run).name.endswith("5"), "the validation at step 5 ends it, after that step was kept"
    check(by_hand(tiny_recipe, WORDS, run, epoch=1), tensors(run))


@pytest.mark.slow
def test_averages_of_the_weights_have_statistics_of_their_own(runs, tiny_recipe, own_signals):
    words = (*WORDS, "ema.decay=0.9")
    run = begin("averaged", str(tiny_recipe), *words, RECOMPUTE)
    assert attempt(run) == FINISHED
    check(by_hand(tiny_recipe, words, run, epoch=2), tensors(run))
    check(by_hand(tiny_recipe, words, run, epoch=2, averages=True), tensors(run, "ema/"))
    results = run.read_json("results.json")
    (run.path / "results.json").unlink()
    assert attempt(run) == FINISHED, "training has ended, the test is left to do"
    again: dict[str, Any] = run.read_json("results.json")
    assert {key: again[key] for key in again if key.startswith("test/")} == {
        key: results[key] for key in results if key.startswith("test/")
    }


@pytest.mark.slow
def test_one_and_two_ranks_agree(tmp_path, tiny_shards):
    said = []
    for world_size in (1, 2):
        script = Path(__file__).with_name("recompute_rank.py")
        said += [
            json.loads(text[text.index("{") :].splitlines()[0])
            for text in all_say(start_ranks(script, world_size, tiny_shards))
        ]
    alone, first, second = said
    assert first == second, "both ranks have the same statistics, to the bit"
    assert alone.keys() == first.keys()
    for name, values in alone.items():
        assert first[name] == pytest.approx(values, rel=1e-6, abs=1e-7), name
