"""Each switch of the section ``speed`` does what it says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import RandomDataset
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from torch.utils.data import DataLoader

from paperscale.errors import UserError
from paperscale.papers.resnet import CifarResNet, ResNetClassifier
from paperscale.recipes import RecipeArguments
from paperscale.training.recipe import RecipeCLI
from paperscale.training.speed import SpeedOptions, apply, use_implementation

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    cudnn, config = torch.backends.cudnn, torch._dynamo.config
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, config.recompile_limit
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark, config.recompile_limit = before[1:]


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Everything that a second computation could get wrong: dropout, averages, buffers of other kinds."""

    def __init__(self, dropout: float):
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(dropout)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + self.dropout(torch.relu(self.norm(self.conv(x)))) * scale
        return x + torch.tanh(self.spectral(x))


class Network(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(2))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.last(x.mean((2, 3)))


class Model(LightningModule):
    def __init__(self, dropout: float = 0.3):
        super().__init__()
        self.network = Network(dropout)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch.view(-1, 3, 10, 10)).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def model(dropout: float = 0.3, **options: Any) -> Model:
    """A model, the same for the same options, with the switches on."""
    torch.manual_seed(0)
    made = Model(dropout)
    names = list(made.state_dict())
    apply(SpeedOptions(**options), made)
    assert list(made.state_dict()) == names
    return made


def step(of: Model) -> tuple[float, dict[str, Tensor], int]:
    """Two losses' sum, gradients and buffers after two steps, and the bytes that autograd kept in the first."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    batches = torch.rand(2, 4, 300)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        first = of.training_step(batches[0], 0)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*of.parameters(), *of.buffers())}
    activations = sum(size for storage, size in kept.items() if storage not in own)
    first.backward()
    second = of.training_step(batches[1], 1)
    second.backward()
    state = {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
    return (first + second).item(), {**state, **dict(of.named_buffers())}, activations


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_keep_less_and_give_the_same_bits() -> None:
    loss, state, kept = step(model())
    checkpointed = model(activation_checkpointing="blocks")
    less_loss, less_state, less_kept = step(checkpointed)
    assert less_loss == loss
    assert_same(less_state, state)
    assert less_kept < kept / 3


def test_a_checkpointed_models_copy_computes_with_its_own_weights() -> None:
    original = model(activation_checkpointing="blocks", optimizer="foreach")
    copied = copy.deepcopy(original)
    nn.init.zeros_(original.network.layers[0].conv.weight)
    assert step(copied)[0] == step(model())[0]
    optimizer = copied.configure_optimizers()["optimizer"]
    assert optimizer.param_groups[0]["params"][0] is copied.network.first.weight


def test_a_graph_can_be_walked_twice() -> None:
    checkpointed = model(activation_checkpointing="blocks")
    loss = checkpointed.training_step(torch.rand(4, 300), 0)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in checkpointed.named_parameters()}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in checkpointed.named_parameters())


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def runs(profiled: profile) -> int:
    return sum(event.count for event in profiled.key_averages() if event.key == "CompiledFunction")


@pytest.mark.slow
def test_graphs_are_compiled_and_run_and_run_again_where_checkpointed(compiler: None) -> None:
    expected_loss, state, kept = step(model(0.0))
    with profile() as profiled:
        compiled = model(0.0, compile="blocks", compile_backend="aot_eager", activation_checkpointing="blocks")
        loss, found, found_kept = step(compiled)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(found, state)
    assert runs(profiled) == 2 * 2 * len(compiled.network.layers), "in the forward and the backward pass of two steps"
    assert found_kept < kept / 3


@pytest.mark.slow
@pytest.mark.parametrize("which", ["blocks", "model"])
def test_checkpointed_graphs_draw_the_same_dropout(compiler: None, which: str) -> None:
    loss, state, kept = step(model(compile="blocks"))
    less_loss, less_state, less_kept = step(model(compile=which, activation_checkpointing="blocks"))
    assert less_loss == pytest.approx(loss, rel=1e-5)
    assert_close(less_state, state)
    assert less_kept < kept / 2


@pytest.mark.slow
def test_equal_blocks_share_a_graph_and_none_is_left_out(compiler: None) -> None:
    resnet = ResNetClassifier(CifarResNet(9))  # 27 blocks of 5 kinds
    apply(SpeedOptions(compile="blocks", compile_backend="aot_eager"), resnet)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), profile() as profiled:
        resnet(images)
    assert graphs() == 5
    assert sum(event.count for event in profiled.key_averages() if "Torch-Compiled Region" in event.key) == 27


@pytest.mark.slow
@pytest.mark.parametrize("which", ["blocks", "model"])
def test_generated_kernels_give_the_same_training(compiler: None, which: str) -> None:
    loss, state, _ = step(model(0.0))
    for checkpointing in ("none", "blocks"):
        found_loss, found, _ = step(model(0.0, compile=which, activation_checkpointing=checkpointing))
        assert found_loss == pytest.approx(loss, rel=1e-4)
        assert_close(found, state)
    assert torch._dynamo.utils.counters["inductor"]


def test_channels_last_reaches_the_maps_and_leaves_the_weights() -> None:
    laid_out = model(0.0, channels_last=True)
    strides: list[tuple[int, ...]] = []
    for block in laid_out.network.layers:
        block.norm.register_forward_hook(lambda module, args, out: strides.append(out.stride()))
    _, state, _ = step(laid_out)
    assert strides == [(512, 1, 64, 8)] * 4
    assert all(p.is_contiguous() for p in laid_out.parameters())
    assert_close(state, step(model(0.0))[1])


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_switched_in_matrices_and_convolutions(tf32: bool) -> None:
    model(tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_cudnn_measures_its_algorithms() -> None:
    model(cudnn_benchmark=True)
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("kind", ["fused", "foreach", "loop"])
def test_the_optimizers_implementation_is_the_one_that_runs(kind: str) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_steps=2, **quiet)
    with profile() as profiled:
        trainer.fit(model(optimizer=kind), DataLoader(RandomDataset(300, 8), 4))
    run = {event.key for event in profiled.key_averages()}
    kernels = {"fused": "aten::_fused_adamw_", "foreach": "aten::_foreach_addcdiv_"}
    assert {name for name, kernel in kernels.items() if kernel in run} == {kind} & kernels.keys()


def test_an_implementation_that_a_class_lacks_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match=r"RMSprop has no fused implementation; use speed\.optimizer=foreach or auto"):
        use_implementation(torch.optim.RMSprop([weight]), "fused")
    use_implementation(torch.optim.LBFGS([weight]), "loop")


def test_blocks_of_a_network_without_any_are_refused() -> None:
    plain = Model()
    plain.network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    for key, instead in (("compile", "model"), ("activation_checkpointing", "none")):
        with pytest.raises(UserError, match=f"speed.{key}=blocks: Model repeats no block .* use speed.{key}={instead}"):
            apply(SpeedOptions(**{key: "blocks"}), plain)
    with pytest.raises(UserError, match=r"use speed\.compile_mode=default with aot_eager"):
        apply(SpeedOptions(compile_mode="max-autotune", compile_backend="aot_eager"), Model())


def test_wrong_values_are_refused_with_the_nearest() -> None:
    recipe = str(next((ROOT / "recipes").rglob("*.yaml")))
    for word, fix in (("compile=block", "did you mean 'blocks'"), ("optimizer=fussed", "did you mean 'fused'")):
        with pytest.raises(UserError, match=fix):
            RecipeCLI(RecipeArguments.parse([recipe, f"speed.{word}"]).to_cli(), build=False)
