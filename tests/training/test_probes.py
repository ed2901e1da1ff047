"""Rows and pictures that callbacks of a recipe write: what layers put out, their gradients, the worst mistakes."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import attempts
from attempts import attempt, begin
from paperscale.errors import FINISHED, UserError
from paperscale.jobs.run import Run
from paperscale.recipes import RecipeArguments
from paperscale.tracking.metrics import read_metrics
from paperscale.training.probes import LayerGradients, LayerResponses, numbered
from paperscale.training.recipe import RecipeCLI
from paperscale.training.weights import of_checkpoint, read_weights
from processes import all_say, start_ranks
from tiny import SIZES

PROBES = [
    f"trainer.callbacks+={{class_path: paperscale.training.probes.{name}, init_args: {options}}}"
    for name, options in (
        ("LayerResponses", "{samples: 1000}"),
        ("LayerGradients", "{every_n_steps: 3}"),
        ("Mistakes", "{count: 5}"),
    )
]
WORDS = ("trainer.max_epochs=1", "checkpoint.every_n_steps=null")
RESPONSES = ["bn1", *(f"blocks.{block}.bn{layer}" for block in range(3) for layer in (1, 2))]
GRADIENTS = ["conv1", *(f"blocks.{block}.conv{layer}" for block in range(3) for layer in (1, 2)), "fc"]


@pytest.fixture
def own_signals():
    with attempts.own_signals():
        yield


def trained(recipe: Path, run: Run, *words: str) -> RecipeCLI:
    """Return the recipe's parts with the weights of a run's last checkpoint."""
    cli = RecipeCLI(RecipeArguments.parse([str(recipe), *words]).to_cli())
    read_weights(cli.model, of_checkpoint(sorted(run.checkpoints.glob("step-*"))[-1]))
    cli.model.eval()
    return cli


def images(cli: RecipeCLI, stage: str) -> tuple[Tensor, Tensor]:
    """Return all images of a split, normalised, and their labels."""
    loader: Any = getattr(cli.datamodule, f"{stage}_dataloader")()
    batches = [cli.datamodule.on_after_batch_transfer(batch, 0) for batch in loader]
    return tuple(torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))  # type: ignore[return-value]


def test_a_run_logs_responses_gradients_and_mistakes(runs, tiny_recipe, own_signals):
    run = begin("run", str(tiny_recipe), *WORDS, *PROBES)
    assert attempt(run) == FINISHED
    rows = read_metrics(run.metrics)
    cli = trained(tiny_recipe, run)

    (responses,) = (row for row in rows if any(key.startswith("responses/") for key in row))
    assert [key for key in responses if "/" in key] == numbered("responses", [f"network.{n}" for n in RESPONSES])
    assert responses["step"] == 8
    seen: dict[str, Tensor] = {}
    for name in RESPONSES:
        layer = cli.model.get_submodule(f"network.{name}")
        layer.register_forward_hook(
            lambda layer, given, output, name=name: seen.update({name: output.double().clone()})
        )
    with torch.no_grad():
        cli.model(images(cli, "val")[0][:32])
    for key, name in zip(numbered("responses", [f"network.{n}" for n in RESPONSES]), RESPONSES, strict=True):
        assert responses[key] == pytest.approx(float(seen[name].std(correction=0)), rel=1e-5), "one group of 32 of 50"

    gradients = [row for row in rows if any(key.startswith("gradients/") for key in row)]
    assert [row["step"] for row in gradients] == [0, 3, 6]
    names = numbered("gradients", [f"network.{n}" for n in GRADIENTS])
    assert [key for key in gradients[0] if "/" in key] == names
    first = RecipeCLI(RecipeArguments.parse([str(tiny_recipe)]).to_cli())
    (batch,) = islice(first.datamodule.train_dataloader(), 1)
    batch = first.datamodule.on_after_batch_transfer(batch, 0)
    F.cross_entropy(first.model.train()(batch["image"]), batch["label"]).backward()
    for key, name in zip(names, GRADIENTS, strict=True):
        weight: Any = first.model.get_submodule(f"network.{name}").weight
        assert gradients[0][key] == pytest.approx(float(weight.grad.norm()), rel=1e-4)

    for stage in ("val", "test"):
        pixels, labels = images(cli, stage)
        with torch.no_grad():
            logits = cli.model(pixels)
        worst = F.cross_entropy(logits, labels, reduction="none").topk(5).indices.tolist()
        facts = json.loads((run.path / f"media/{stage}-mistakes-8.json").read_text())
        captions = [f"{int(labels[row])} -> {int(logits[row].argmax())}" for row in worst]
        assert facts == {"key": f"{stage}/mistakes", "step": 8, "captions": captions}
        assert (run.path / f"media/{stage}-mistakes-8.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_probed_is_refused_with_the_fix():
    for make in (lambda: LayerResponses(samples=0), lambda: LayerGradients(0)):
        with pytest.raises(UserError, match="use 1 or more"):
            make()


def test_a_step_without_a_row_costs_next_to_nothing():
    probe, trainer = LayerGradients(50), Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 7
    module, optimizer = LightningModule(), torch.optim.SGD([torch.zeros(1)])
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(500):
            probe.on_before_optimizer_step(trainer, module, optimizer)
        seconds.append((time.perf_counter() - start) / 500)
    assert min(seconds) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_log_what_one_does(tiny_shards, strategy):
    script = Path(__file__).with_name("probes_rank.py")
    alone, first, second = (
        json.loads(next(line for line in text.splitlines() if line[:1] == "{"))
        for count in (1, 2)
        for text in all_say(start_ranks(script, count, tiny_shards, strategy))
    )
    assert first == second
    assert alone.keys() == first.keys()
    assert len(alone) == len(RESPONSES) + len(GRADIENTS)
    assert SIZES["val"] >= 32
    for key, value in alone.items():
        assert first[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.slow
def test_zero_is_refused_before_anything_is_trained(runs, tiny_recipe, own_signals, capsys):
    run = begin("zero", str(tiny_recipe), *WORDS, PROBES[1], "trainer.strategy=deepspeed_zero1")
    assert attempt(run) != FINISHED
    assert "use trainer.strategy=ddp or fsdp" in capsys.readouterr().err
