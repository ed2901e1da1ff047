"""LAMB and LARS are the papers' algorithms, also where a layer's elements are divided over ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paperscale.errors import UserError
from paperscale.nn.optimizers import Lamb, Lars, Segment, decay_groups, norms
from processes import all_say, start_ranks

SHAPES = [(3, 4), (5,), (2, 3, 2)]


def weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, gradients(step, parameters[0].dtype), strict=True):
            parameter.grad = gradient
        optimizer.step()


def lamb(x: Tensor, gs: list[Tensor], lr: float, b1: float, b2: float, eps: float, decay: float, **of: Any) -> Tensor:
    """Algorithm 2 of You et al. 2019, line by line, for one layer."""
    m = v = torch.zeros_like(x)
    for t, g in enumerate(gs, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        corrected = of.get("correction", True)
        m_, v_ = (m / (1 - b1**t), v / (1 - b2**t)) if corrected else (m, v)
        r = m_ / (v_.sqrt() + eps)
        low, high = of.get("phi", (0, float("inf")))
        ratio = x.norm().clamp(low, high) / (r + decay * x).norm()
        if not of.get("adapt", True):
            ratio = torch.ones_like(ratio)
        x = x - lr * ratio.clamp(max=of.get("max_trust", float("inf"))) * (r + decay * x)
    return x


def lars(w: Tensor, gs: list[Tensor], lr: float, momentum: float, decay: float, trust: float) -> Tensor:
    """Algorithm 1 of You et al. 2017 for one layer."""
    v = torch.zeros_like(w)
    for g in gs:
        local = trust * w.norm() / (g.norm() + decay * w.norm())
        v = momentum * v + lr * local * (g + decay * w)
        w = w - v
    return w


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, {}),
        ({"bias_correction": False}, {"correction": False}),
        ({"phi": (0.5, 2.0)}, {"phi": (0.5, 2.0)}),
        ({"max_trust": 0.8}, {"max_trust": 0.8}),
        ({"adapt": False}, {"adapt": False}),
    ],
)
def test_lamb_is_algorithm_2(options, reference):
    parameters = weights()
    adapting = [{"params": parameters[:1], "adapt": True}, {"params": parameters[1:], **options}]
    groups = adapting if options == {"adapt": False} else [{"params": parameters}]
    optimizer = Lamb(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, **options)
    train(optimizer, range(4))
    for number, (parameter, first) in enumerate(zip(parameters, weights(), strict=True)):
        own = {} if options == {"adapt": False} and number == 0 else reference
        expected = lamb(first.detach(), [gradients(s)[number] for s in range(4)], 0.02, 0.8, 0.95, 1e-3, 0.1, **own)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lars_is_algorithm_1():
    parameters = weights()
    train(Lars(parameters, lr=0.5, momentum=0.8, weight_decay=0.05, trust=0.02), range(4))
    for number, (parameter, first) in enumerate(zip(parameters, weights(), strict=True)):
        expected = lars(first.detach(), [gradients(s)[number] for s in range(4)], 0.5, 0.8, 0.05, 0.02)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


def test_groups_without_decay_take_the_step_of_adam_and_of_sgd():
    for optimizer_class, plain, options in [
        (Lamb, torch.optim.Adam, {"eps": 1e-6}),
        (Lars, torch.optim.SGD, {"momentum": 0.9}),
    ]:
        module, twin = nn.Linear(3, 4), nn.Linear(3, 4)
        twin.load_state_dict(module.state_dict())
        layerwise = optimizer_class(decay_groups(module, 0.1), lr=0.01)
        ordinary = plain(twin.parameters(), lr=0.01, **options)
        for step in range(3):
            for network, optimizer in ((module, layerwise), (twin, ordinary)):
                optimizer.zero_grad()
                network(torch.full((2, 3), step + 1.0)).square().sum().backward()
                twin.weight.data.copy_(module.weight.data)
                optimizer.step()
        torch.testing.assert_close(module.bias, twin.bias)
        assert not torch.equal(module.weight, twin.weight)


def test_nothing_to_adapt_is_refused():
    with pytest.raises(UserError, match="adapt=True"):
        Lamb(weights(), weight_decay=0.0)
    with pytest.raises(UserError, match="lr is -1"):
        Lars(weights(), lr=-1)


@pytest.mark.parametrize("make", [lambda p: Lamb(p, lr=0.1), lambda p: Lars(p, lr=0.1)])
def test_state_goes_through_a_file_and_training_goes_on_in_the_same_bits(make, tmp_path):
    whole, first = weights(torch.float32), weights(torch.float32)
    train(make(whole), range(6))
    half = make(first)
    train(half, range(3))
    torch.save(half.state_dict(), tmp_path / "state.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    other = make(second)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(other, range(3, 6))
    assert all(map(torch.equal, whole, second))
    names = set(other.state_dict()["state"][0])
    assert names in ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})


def test_norms_of_large_tensors_on_the_cpu_are_right():
    large = torch.full((3_000_001,), 0.013)
    exact = float(large.double().norm())
    assert abs(float(norms([large])[0]) / exact - 1) < 1e-5 < abs(float(large.norm()) / exact - 1)


def test_lamb_learns_a_badly_scaled_problem_in_full_batches():
    torch.manual_seed(0)
    x = torch.randn(512, 8) * torch.logspace(-2, 1, 8)
    y = x @ torch.logspace(1, -2, 8)[:, None]
    network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = Lamb(decay_groups(network, 1e-4), lr=0.02)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(150):
        optimizer.step(closure)
    assert losses[-1] < 0.05 * losses[0], losses[::25]


@pytest.mark.parametrize("make", [lambda p: Lamb(p, lr=0.1), lambda p: Lars(p, lr=0.1)])
def test_padding_of_a_flat_partition_is_left_alone(make):
    whole = weights(torch.float32)
    flat = nn.Parameter(torch.cat([*(p.detach().reshape(-1) for p in whole), torch.full((4,), 7.0)]))
    bounds = [0, 12, 17, 29]
    optimizer = make([flat])
    segments = [Segment(bounds[i], bounds[i + 1], i) for i in range(3)]
    optimizer.divide({flat: segments}, 3, lambda squares: squares)
    plain = make(whole)
    for step in range(3):
        flat.grad = torch.cat([*(g.reshape(-1) for g in gradients(step, torch.float32)), torch.ones(4)])
        optimizer.step()
        train(plain, range(step, step + 1))
    expected = torch.cat([p.detach().reshape(-1) for p in whole])
    torch.testing.assert_close(flat.detach()[:29], expected)
    assert flat[29:].tolist() == [7.0] * 4


@pytest.mark.slow
def test_layers_that_are_divided_over_ranks_take_the_step_of_whole_ones():
    said = all_say(start_ranks(Path(__file__).with_name("optimizer_rank.py"), 2), 120)
    found = [json.loads(text.splitlines()[-1]) for text in said]
    assert found[0].keys() == {f"{o} {how}" for o in ("Lamb", "Lars") for how in ("DTensor", "flat")}
    for case in found:
        for name, (difference, sums) in case.items():
            assert difference < 1e-6, (name, difference)
            assert sums == 1, f"{name}: one sum over ranks a step"


def test_a_copy_steps_as_the_original_does():
    optimizer = Lamb(weights(), lr=0.1)
    twin = copy.deepcopy(optimizer)
    train(optimizer, range(2))
    train(twin, range(2))
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], twin.param_groups[0]["params"]))
