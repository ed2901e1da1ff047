"""Averages of the weights: the formula, where they are used, and that they survive what a run survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import attempts
from attempts import attempt, begin
from paperscale.errors import FINISHED, REQUEUE, UserError
from paperscale.jobs.run import Run
from paperscale.training.ema import EMA, EMAEnd, EMAOptions
from paperscale.training.strategies.single import SingleStrategy
from paperscale.training.tensorfile import TensorReader
from processes import all_say, start_ranks


class Regression(LightningModule):
    """Notes its weights after each step, and those that it is validated and tested with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)
        self.trained: list[Tensor] = []
        self.seen: dict[str, list[Tensor]] = {"val": [], "test": []}

    @property
    def weight(self) -> Tensor:
        return self.net.weight.detach().clone()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch), batch[:, :2].sin())

    def on_train_batch_end(self, *args: Any) -> None:
        self.trained.append(self.weight)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["val"].append(self.weight)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["test"].append(self.weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5, momentum=0.9)


class Written(Checkpoint):
    """Keeps the weights as a last checkpoint would."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weight = pl_module.weight


def batches(count: int) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(5)
    made: Any = [torch.randn(8, 4, generator=generator) for _ in range(count)]
    return DataLoader(made, batch_size=None)


def fit(options: EMAOptions, **settings: Any) -> tuple[Regression, EMA, Written, Trainer]:
    module, ema, written = Regression(), EMA(options), Written()
    trainer = Trainer(
        max_epochs=2,
        strategy=SingleStrategy(device="cpu"),
        callbacks=[ema, written, EMAEnd(ema)],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, batches(12), batches(1))
    trainer.test(module, batches(1), verbose=False)
    return module, ema, written, trainer


def average(weights: list[Tensor], decay: float, warmup: bool) -> list[Tensor]:
    """Return the averages after each update, in float64."""
    at, found = weights[0].double(), []
    for t, weight in enumerate(weights[1:]):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        at = d * at + (1 - d) * weight.double()
        found.append(at)
    return found


@pytest.mark.parametrize(("warmup", "every", "accumulate"), [(True, 1, 1), (False, 1, 1), (True, 2, 3)])
def test_averages_are_those_of_the_formula_and_are_what_is_evaluated(warmup, every, accumulate):
    options = EMAOptions(decay=0.6, warmup=warmup, every_n_steps=every)
    module, ema, written, _ = fit(options, accumulate_grad_batches=accumulate)
    steps = [Regression().weight, *module.trained[accumulate - 1 :: accumulate]]
    expected = average(steps[::every], 0.6, warmup)
    assert ema.updates == 24 // accumulate // every == len(expected)
    for seen, number in zip(module.seen["val"], (len(expected) // 2 - 1, -1), strict=True):
        torch.testing.assert_close(seen.double(), expected[number], rtol=1e-6, atol=1e-7)
    assert torch.equal(module.seen["test"][0], module.seen["val"][1]), "the test is of the averages too"
    assert torch.equal(written.weight, module.trained[-1]), "the last checkpoint is of the weights"
    assert torch.equal(module.weight, module.seen["test"][0]), "and the averages are left in the model"


def test_training_goes_on_with_the_same_bits_after_an_evaluation():
    averaged, ema, _, _ = fit(EMAOptions(decay=0.9))
    plain, _, _, _ = fit(EMAOptions(decay=0.9, evaluate=False))
    assert all(map(torch.equal, averaged.trained, plain.trained))
    assert torch.equal(plain.seen["val"][1], plain.trained[-1])
    assert torch.equal(plain.weight, plain.trained[-1])
    names = {piece.name: tuple(piece.tensor.shape) for piece in ema.pieces()}
    assert names == {"ema/net.weight": (2, 4), "ema/net.bias": (2,)}


def test_weights_of_sixteen_bits_are_averaged_in_thirty_two():
    module, ema, _, _ = fit(EMAOptions(decay=0.999, warmup=False), precision="bf16-true")
    (piece,) = (piece for piece in ema.pieces() if piece.name == "ema/net.weight")
    assert piece.tensor.dtype == torch.float32
    expected = average([Regression().weight.bfloat16(), *module.trained], 0.999, warmup=False)
    torch.testing.assert_close(piece.tensor.double(), expected[-1], rtol=1e-6, atol=1e-7)


class Prepared(Callback):
    """Does what a resumed run does before its first batch: other weights, and averages where there are any."""

    def __init__(self, ema: EMA, averages: float | None):
        self.ema, self.averages = ema, averages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nn.init.constant_(pl_module.net.weight, 3.0)
        if self.averages is not None:
            self.ema.load_state_dict({"updates": 0})
            for piece in self.ema.pieces():
                piece.fill(torch.full((piece.tensor.numel(),), self.averages))


@pytest.mark.parametrize("averages", [None, 7.0])
def test_averages_begin_at_the_loaded_weights_or_at_the_loaded_averages(averages):
    module, ema = Regression(), EMA(EMAOptions(decay=0.5, warmup=False))
    trainer = Trainer(
        max_steps=1,
        strategy=SingleStrategy(device="cpu"),
        callbacks=[ema, Prepared(ema, averages)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(1))
    begun = torch.full((2, 4), 3.0 if averages is None else averages)
    torch.testing.assert_close(ema.pieces()[0].tensor, (begun + module.trained[0]) / 2)


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": 0.9, "every_n_steps": 0}])
def test_wrong_options_are_refused_with_the_fix(wrong):
    with pytest.raises(UserError, match=r"ema\.\w+ is .*; use "):
        EMAOptions(**wrong)


@pytest.fixture
def own_signals():
    with attempts.own_signals():
        yield


def new_run(name: str, recipe: Path, *overrides: str) -> Run:
    return begin(name, str(recipe), "trainer.max_epochs=2", *overrides)


def averages(run: Run) -> dict[str, Tensor]:
    reader = TensorReader(sorted(run.checkpoints.glob("step-*"))[-1])
    return {name: reader.whole(name) for name in reader.tensors if name.startswith("ema/")}


def scores(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.read_json("results.json").items() if name.startswith("test/")}


@pytest.mark.slow
def test_averages_go_on_with_the_same_bits_after_an_interruption(runs, tiny_recipe, own_signals):
    cut_at = "trainer.callbacks=[{class_path: helpers.SignalAt, init_args: {step: 3}}]"
    whole = new_run("whole", tiny_recipe, "ema.decay=0.9", "ema.every_n_steps=2")
    cut = new_run("cut", tiny_recipe, "ema.decay=0.9", "ema.every_n_steps=2", cut_at)
    assert attempt(whole) == FINISHED
    assert attempt(cut) == REQUEUE
    assert attempt(cut) == FINISHED
    first, second = averages(whole), averages(cut)
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    tested = scores(cut)
    assert tested == scores(whole)
    (cut.path / "results.json").unlink()
    assert attempt(cut) == FINISHED, "training has ended, the test is left to do"
    assert scores(cut) == tested, "it is of the averages as well"


STRATEGIES = ["ddp", "fsdp", "fsdp whole", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]


@pytest.mark.slow
def test_averages_are_the_same_however_the_model_is_divided():
    for said in all_say(start_ranks(Path(__file__).with_name("ema_rank.py"), 2, *STRATEGIES)):
        lines = filter(lambda line: line[:1] == "{", said.splitlines())
        found = {row["strategy"]: row for row in map(json.loads, lines)}
        assert found.keys() == {"whole", *STRATEGIES}
        for strategy in STRATEGIES:
            for what in ("train", "val", "test", "averages"):
                wanted = pytest.approx(found["whole"][what], rel=1e-5, abs=1e-6)
                assert found[strategy][what] == wanted, (strategy, what)
            assert found[strategy]["restored"], strategy
