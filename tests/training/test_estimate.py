"""The estimate of a GPU's memory beside what torch really keeps, on the CPU."""

from __future__ import annotations

import resource
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paperscale.papers.resnet import ResNetClassifier
from paperscale.recipes import RecipeArguments
from paperscale.training import speed
from paperscale.training.blocks import blocks
from paperscale.training.estimate import Estimate, Passes, estimate, gib
from paperscale.training.recipe import RecipeCLI
from paperscale.training.sharding import sharding


class WithAdam(ResNetClassifier):
    """Two groups, a fused optimizer on request, and dropout's kind of frozen layer."""

    def __init__(self, network: nn.Module, fused: bool = False, classes: int = 8):
        super().__init__(network, classes=classes)
        self.fused = fused
        self.network.conv1.requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        free = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": free[:5], "lr": 0.1}, {"params": free[5:]}]
        return torch.optim.AdamW(groups, lr=1e-3, fused=self.fused)


class Curious(ResNetClassifier):
    """Decides by a value, which tensors without content do not have."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss.item() > 1 else loss


class Vast(ResNetClassifier):
    """A hundred gigabytes of weights."""

    def __init__(self, network: nn.Module, classes: int = 8):
        super().__init__(network, classes=classes)
        self.vast = nn.Linear(160_000, 160_000)


def recipe(path: Path, *words: str, device: str = "meta") -> RecipeCLI:
    with torch.device(device):
        return RecipeCLI(RecipeArguments.parse([str(path), *words]).to_cli())


def really_kept(cli: RecipeCLI, dtype: torch.dtype | None = None) -> int:
    """The bytes that autograd keeps in a real training step on the CPU."""
    model, data = cli.model, cli.datamodule
    speed.apply(cli.config_init.speed, model)
    model.log = lambda *_, **__: None
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    autocast = torch.autocast("cpu", dtype) if dtype else nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.training_step(batch, 0)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize(
    "words", [(), ("data.global_batch_size=7",), ("model.network.init_args.n=3", "model.network.init_args.shortcut=B")]
)
def test_activations_are_what_a_real_step_keeps(tiny_recipe, words):
    found = estimate(recipe(tiny_recipe, *words), 1)
    assert found.unknown == ()
    assert found.activations == pytest.approx(really_kept(recipe(tiny_recipe, *words, device="cpu")), rel=0.01)


RESNET_18 = (
    "model.network={class_path: paperscale.papers.resnet.ResNet, init_args: {depth: 18, classes: 8}}",
    "data.size=64",
    "data.global_batch_size=4",
)


def test_activations_of_a_resnet_18_are_exact_to_the_byte(tiny_recipe):
    words = (*RESNET_18, "speed.channels_last=true")
    found = estimate(recipe(tiny_recipe, *words), 1)
    assert found.activations == really_kept(recipe(tiny_recipe, *words, device="cpu"))


def test_checkpointing_keeps_the_inputs_of_blocks_and_computes_one_again(tiny_recipe):
    words = ("model.network.init_args.n=3", "speed.activation_checkpointing=blocks")
    whole, found = estimate(recipe(tiny_recipe, words[0]), 1), estimate(recipe(tiny_recipe, *words), 1)
    cli = recipe(tiny_recipe, *words, device="cpu")
    inputs = []
    for _, block in blocks(cli.model):
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes))
    kept = really_kept(cli)
    assert len(inputs) == 9
    map_of_16 = 4 * 32 * 16 * 8 * 8  # bytes: batch, channels, height, width
    assert kept == pytest.approx(sum(inputs) + map_of_16, rel=0.1), "and the first convolution's, which is in no block"
    assert kept < found.activations < 0.5 * whole.activations
    assert 4 * map_of_16 <= found.activations - kept <= 5 * map_of_16, "what two convolutions and norms keep"


def test_no_shards_are_needed_where_the_recipe_tells_the_shapes(tiny_recipe):
    words = ("data.mixup=0.2", "data.normalize=pixel", "data.erase=0.1")
    here = estimate(recipe(tiny_recipe, *words, "data.size=8"), 2)
    absent = estimate(recipe(tiny_recipe, *words, "data.size=8", "data.path=/nowhere"), 2)
    assert absent == here
    assert absent.unknown == ()


def test_activations_in_mixed_precision(tiny_recipe):
    mixed = estimate(recipe(tiny_recipe, "trainer.precision=bf16-mixed"), 1)
    real = really_kept(recipe(tiny_recipe, device="cpu"), torch.bfloat16)
    assert mixed.activations == pytest.approx(real, rel=0.01)
    assert mixed.activations < 0.8 * estimate(recipe(tiny_recipe), 1).activations


def test_a_micro_batch_is_what_counts(tiny_recipe):
    cli = recipe(tiny_recipe)
    whole, quarter = estimate(cli, 1), estimate(cli, 4)
    assert (whole.samples, quarter.samples) == (32, 8)
    assert quarter.activations == pytest.approx(whole.activations / 4, rel=0.02)
    assert estimate(cli, 4, micro_batch=32).activations == whole.activations
    assert estimate(recipe(tiny_recipe, "data.micro_batch_size=8"), 1).activations == quarter.activations


def test_weights_gradients_and_optimizer_are_exact(tiny_recipe):
    found = estimate(recipe(tiny_recipe), 2)
    model = recipe(tiny_recipe, device="cpu").model
    weights = sum(p.numel() for p in model.parameters())
    assert (found.count, found.parameters, found.gradients, found.optimizer) == (weights, *[4 * weights] * 3)
    assert found.buckets == 4 * weights
    assert estimate(recipe(tiny_recipe), 1).buckets == 0
    assert found.buffers == sum(b.numel() * b.itemsize for b in model.buffers())
    half = estimate(recipe(tiny_recipe, "trainer.precision=bf16-true"), 1)
    assert (half.parameters, half.gradients, half.optimizer) == (2 * weights,) * 3


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_an_optimizer_is_what_it_makes_in_a_step(tiny_recipe, fused):
    words = ("model.class_path=test_estimate.WithAdam", f"model.fused={fused}")
    found = estimate(recipe(tiny_recipe, *words), 1)
    model = recipe(tiny_recipe, *words, device="cpu").model
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    assert found.optimizer == sum(t.numel() * t.itemsize for t in states)
    assert found.gradients == found.parameters - 4 * model.network.conv1.weight.numel()


def test_zero_divides_what_its_stage_says(tiny_recipe):
    cli = recipe(tiny_recipe)
    whole = estimate(cli, 4)
    parts = [estimate(cli, 4, strategy=f"deepspeed_zero{stage}") for stage in (1, 2, 3)]
    assert [p.optimizer for p in parts] == [-(-whole.optimizer // 4)] * 3
    assert [p.gradients for p in parts] == [whole.gradients, -(-whole.gradients // 4), -(-whole.gradients // 4)]
    assert [p.parameters for p in parts] == [whole.parameters, whole.parameters, -(-whole.parameters // 4)]
    assert "whole weights of the blocks" in parts[2].unknown[0]
    weights = whole.count
    for precision in ("bf16-mixed", "bf16-true"):  # DeepSpeed keeps 32-bit weights in either
        half = estimate(recipe(tiny_recipe, f"trainer.precision={precision}"), 1, strategy="deepspeed_zero1")
        assert (half.parameters, half.gradients, half.optimizer) == (2 * weights, 2 * weights, 8 * weights)


def test_averages_of_the_weights_lie_where_the_optimizer_steps_them(tiny_recipe):
    passes = Passes(recipe(tiny_recipe, "ema.decay=0.9"), 2)
    found = [passes.under(name) for name in ("ddp", "deepspeed_zero1", "fsdp", "deepspeed_zero2_offload")]
    weights = found[0].count
    assert [memory.averages for memory in found] == [4 * weights, 2 * weights, 2 * weights, 0]
    assert found[0].certain == 16 * weights + found[0].buffers


def test_fsdp_divides_everything_and_keeps_32_bit_weights(tiny_recipe):
    weights = estimate(recipe(tiny_recipe), 1).count
    found = estimate(recipe(tiny_recipe, "trainer.precision=bf16-mixed", "trainer.strategy=fsdp"), 4)
    assert (found.strategy, found.buckets) == ("fsdp", 0)
    assert (found.parameters, found.gradients, found.optimizer) == (weights,) * 3


def test_what_lies_on_the_cpu_is_not_of_the_gpu(tiny_recipe):
    cli = recipe(tiny_recipe)
    whole = estimate(cli, 4)
    second = estimate(cli, 4, strategy="deepspeed_zero2_offload")
    assert (second.parameters, second.gradients, second.optimizer) == (whole.parameters, 0, 0)
    assert estimate(cli, 4, strategy="deepspeed_zero3_offload").certain == whole.buffers
    zero = "{class_path: paperscale.training.strategies.ZeroStrategy, init_args: {stage: 3, offload_optimizer: cpu}}"
    found = estimate(recipe(tiny_recipe, f"trainer.strategy={zero}"), 4)
    assert (found.strategy, found.optimizer, found.parameters) == ("ZeroStrategy", 0, -(-whole.parameters // 4))


@pytest.mark.parametrize(
    ("name", "processes", "shown", "divided"),
    [
        ("ddp", 1, "single", 0),
        ("auto", 2, "ddp", 0),
        ("ddp_find_unused_parameters_true", 2, "ddp_find_unused_parameters_true", 0),
        ("deepspeed_zero1", 2, "deepspeed_zero1", 1),
        ("deepspeed_zero3_nvme", 2, "deepspeed_zero3_nvme", 3),
        ("fsdp", 2, "fsdp", 3),
    ],
)
def test_what_a_strategy_divides(name, processes, shown, divided):
    found = sharding(name, processes)
    assert (found.name, len(found.divided)) == (shown, divided)


def test_a_model_that_looks_at_values_is_said_to_be_unknown(tiny_recipe):
    found = estimate(recipe(tiny_recipe, "model.class_path=test_estimate.Curious"), 1)
    assert found.activations is None
    assert found.optimizer == found.parameters
    assert found.total == found.certain
    assert found.unknown[0].startswith("activations unknown: DataDependentOutputException")
    assert "activations        unknown" in str(found)


def test_a_model_larger_than_this_machine_takes_none_of_its_memory(tiny_recipe):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(recipe(tiny_recipe, "model.class_path=test_estimate.Vast"), 8)
    assert found.certain > 300e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_the_recipe_can_still_be_trained_with(tiny_recipe):
    cli = recipe(tiny_recipe, device="cpu")
    before = {name: value.clone() for name, value in cli.model.state_dict().items()}
    estimate(cli, 1)
    assert all(torch.equal(value, before[name]) for name, value in cli.model.state_dict().items())
    assert cli.model._trainer is None
    assert really_kept(cli) > 0


def test_the_table():
    table = str(Estimate(8, 32, "ddp", "bf16-mixed", 1000, 4 << 30, 4 << 30, None, 0, 4 << 30, 10 << 20, ("why",)))
    assert table.splitlines()[0] == "memory of a GPU   ddp on 8 processes, bf16-mixed, 32 samples a pass"
    assert "parameters        4.00 GiB   1,000 of them" in table
    assert "optimizer          unknown" in table
    assert "total            12.01 GiB" in table
    assert table.endswith("why")
    assert gib(1 << 20) == "1.0 MiB"
