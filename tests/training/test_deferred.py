"""Models that are constructed without memory have the weights that they would have had."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paperscale.errors import UserError
from paperscale.papers.resnet import CifarResNet
from paperscale.training.deferred import Initialisation, construct, deferred

WIDE = 192  # a square of this many floats is larger than what stays real


def contents(module: nn.Module, init: Initialisation) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: init.value(tensor) for name, tensor in tensors.items()}


def same_bits(first: Tensor, second: Tensor) -> bool:
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.resolve_conj().numpy().tobytes() == second.resolve_conj().numpy().tobytes()


def check(build: Callable[[], nn.Module], least: int = 1) -> tuple[nn.Module, Initialisation]:
    """Build both ways: same bits, same generator afterwards, at least so many tensors on the meta device."""
    torch.manual_seed(3)
    plain = build()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with deferred() as init:
        model = build()
    assert torch.equal(torch.get_rng_state(), after), "the generator has not moved as it would have"
    expected = contents(plain, Initialisation())
    found = contents(model, init)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    assert torch.equal(torch.get_rng_state(), after), "asking for a content has moved the generator"
    meta = sum(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert meta >= least, f"only {meta} tensors were deferred"
    return model, init


def standard_layers() -> nn.Module:
    return nn.ModuleList(
        [
            nn.Linear(WIDE, 2 * WIDE),
            nn.Conv2d(64, 64, 5, padding=2),
            nn.ConvTranspose2d(64, 64, 5),
            nn.Embedding(500, WIDE, padding_idx=3),
            nn.Embedding(500, WIDE, max_norm=1.0),
            nn.LayerNorm(20_000),
            nn.BatchNorm1d(20_000),
            nn.MultiheadAttention(WIDE, 4, add_bias_kv=True),
            nn.LSTM(WIDE, WIDE, 2),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDE, 4, 300, batch_first=True), 3),
            nn.utils.parametrizations.weight_norm(nn.Linear(WIDE, WIDE)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(WIDE, WIDE)),
            nn.utils.parametrizations.orthogonal(nn.Linear(WIDE, WIDE)),
        ]
    )


INITIALISERS: list[Callable[[Tensor], Tensor]] = [
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
    nn.init.xavier_normal_,
    nn.init.xavier_uniform_,
    nn.init.trunc_normal_,
    nn.init.orthogonal_,
    nn.init.eye_,
    nn.init.ones_,
    lambda weight: nn.init.sparse_(weight, 0.5),
    lambda weight: nn.init.constant_(weight, 0.3),
    lambda weight: nn.init.normal_(weight, generator=torch.Generator().manual_seed(5)),
    lambda weight: weight.exponential_().log_normal_().cauchy_().random_(10).bernoulli_(0.3),
    lambda weight: weight.copy_(torch.bernoulli(weight.clamp(0, 1))),  # which numbers are drawn depends on the content
    lambda weight: weight.copy_(torch.poisson(weight.abs())),
    lambda weight: weight.copy_(torch.normal(weight, weight.abs())),
]


class Initialised(nn.Module):
    """A layer for each way to initialise; in a loop after construction, as papers' code does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in INITIALISERS)
        for initialiser, module in zip(INITIALISERS, self.layers, strict=True):
            with torch.no_grad():
                initialiser(module.weight)
            nn.init.zeros_(module.bias)


class ByHand(nn.Module):
    """What authors do to weights in their constructors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(400, WIDE)
        self.head = nn.Linear(WIDE, 400, bias=False)
        self.head.weight = self.embedding.weight
        self.first = nn.Parameter(torch.Tensor(WIDE, WIDE))
        self.second = nn.Parameter(torch.randn(WIDE, WIDE) * 0.02)
        self.third = nn.Parameter(torch.cat([torch.zeros(WIDE, WIDE), torch.eye(WIDE)]), requires_grad=False)
        self.fourth = nn.Parameter(torch.from_numpy(np.arange(WIDE * WIDE, dtype=np.float32)).view(WIDE, WIDE))
        self.layer = nn.Linear(WIDE, WIDE)
        self.copy = copy.deepcopy(self.layer)
        with torch.no_grad():
            self.first.uniform_(-1, 1, generator=None)
            self.first.mul_(0.5)[0].zero_()
            self.first[:, 3:9] += self.second.t()[:, 3:9]
            self.first[self.second > 0.03] = 7.0
            self.layer.weight.copy_(self.copy.weight)
            self.copy.weight *= 2
            self.layer.bias.copy_(self.copy.weight.sum(0))
        self.second.data = self.second.data.t().contiguous().to(torch.float64)
        self.copy.weight.data.normal_(0, self.copy.weight.std().item())
        self.copy.weight.data = torch.full((WIDE, WIDE), float(self.layer.weight[1, 2].detach()))
        if self.layer.weight.max() > 0:
            torch.manual_seed(int(1000 * self.layer.weight.abs().max()))
        self.scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))
        self.seen = nn.Parameter(torch.tensor(self.layer.weight.tolist()).cos_().to(self.layer.weight.device))
        same = self.seen.to("cpu")
        assert same is self.seen
        assert same.device == torch.device("cpu")
        assert not same.is_meta


class Positions(nn.Module):
    def __init__(self, length: int = 300, width: int = 128):
        super().__init__()
        place = torch.arange(length).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
        table = torch.zeros(length, width)
        table[:, 0::2] = torch.sin(place * rate)
        table[:, 1::2] = torch.cos(place * rate)
        self.register_buffer("table", table)
        self.register_buffer("causal", torch.triu(torch.full((length, length), -torch.inf), 1), persistent=False)
        self.register_buffer("turns", torch.polar(torch.ones(length, width), torch.rand(length, width)).conj())
        self.plain = torch.ones(length, length).tril()
        self.number = torch.arange(length).sum().item()


class InLoops(nn.Module):
    """Fills a table number by number."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.empty(150, 120)
        for row in range(150):
            for column in range(5):
                table[row, column] = math.sin(row / 10_000 ** (column / 5))
            table[row, 5:] = torch.rand(115)
        self.register_buffer("table", table)


@pytest.mark.parametrize("build", [standard_layers, Initialised, lambda: CifarResNet(3)])
def test_weights_are_those_of_the_ordinary_constructor(build: Callable[[], nn.Module]) -> None:
    check(build)


def test_a_table_filled_in_loops_keeps_its_record_small() -> None:
    _, init = check(InLoops)
    assert max(len(storage.writers) for storage in init._storages.values()) < 100


def test_ties_are_kept_and_other_tensors_are_real() -> None:
    model, _ = check(ByHand)
    assert model.head.weight is model.embedding.weight
    positions, _ = check(Positions)
    assert torch.equal(positions.plain, torch.ones(300, 300).tril())
    assert positions.number == 44850


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Return b, or a copy if it shares memory with a."""
    return b.clone() if b is a or b._is_view() or a._is_view() else b


STATEMENTS: list[Callable[[list[Tensor], Tensor, Tensor], object]] = [
    lambda tensors, a, b: tensors.append(torch.randn(WIDE, WIDE)),
    lambda tensors, a, b: tensors.append(torch.empty(WIDE, WIDE).uniform_()),
    lambda tensors, a, b: tensors.append(a.clone()),
    lambda tensors, a, b: tensors.append(a.t()),
    lambda tensors, a, b: tensors.append(a - b / 2),
    lambda tensors, a, b: tensors.append(torch.where(a > b, a, b)),
    lambda tensors, a, b: tensors.append(torch.cat([a[:50], b[50:]])),
    lambda tensors, a, b: tensors.append(copy.deepcopy(a)),
    lambda tensors, a, b: tensors.append(torch.bernoulli(a.sigmoid())),
    lambda tensors, a, b: a.copy_(apart(a, b)),
    lambda tensors, a, b: a.normal_(),
    lambda tensors, a, b: a.zero_(),
    lambda tensors, a, b: a[3:7].copy_(apart(a, b)[5:9]),
    lambda tensors, a, b: a[:, 1].add_(apart(a, b)[2]),
    lambda tensors, a, b: a.mul_(0.5).add_(b.mean()),
    lambda tensors, a, b: a.fill_(b[0, 0].item()),
    lambda tensors, a, b: a[0].copy_(torch.tensor(b[:, 1].tolist())),
    lambda tensors, a, b: setattr(a, "data", b.data.mul(2)),
    lambda tensors, a, b: a.masked_fill_(b > 0.5, 1.0),
    lambda tensors, a, b: torch._foreach_mul_([a, apart(a, b)], 0.9),
    lambda tensors, a, b: a.uniform_() if b.sum() > 0 else a.normal_(),
]


class Program(nn.Module):
    """Statements on tensors drawn at random."""

    def __init__(self, program: list[tuple[int, int, int]]):
        super().__init__()
        tensors = [torch.zeros(WIDE, WIDE), torch.rand(WIDE, WIDE)]
        for statement, first, second in program:
            STATEMENTS[statement](tensors, tensors[first % len(tensors)], tensors[second % len(tensors)])
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{number}", tensor)


NUMBER = st.integers(0, 9)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(STATEMENTS) - 1), NUMBER, NUMBER), max_size=25))
def test_any_program_of_tensor_operations_gives_the_same_bits(program: list[tuple[int, int, int]]) -> None:
    check(lambda: Program(program), least=0)


class Reaching(nn.Module):
    """Writes into a weight behind torch's back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDE, WIDE)
        self.layer.weight.data.numpy()[:] = np.random.rand(WIDE, WIDE)


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDE, WIDE) @ torch.zeros(3, 3))


def test_a_constructor_that_reaches_into_memory_is_built_ordinarily() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    plain = Reaching()
    torch.manual_seed(1)
    np.random.seed(1)
    model, init = construct(Reaching)
    assert "read-only" in init.failure
    assert torch.equal(init.value(model.layer.weight), plain.layer.weight)
    assert torch.equal(init.value(model.layer.bias), plain.layer.bias)


def test_an_error_of_the_constructor_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="192x192 and 3x3"):
        construct(Wrong)


def test_changes_after_construction_are_refused() -> None:
    model, init = construct(lambda: nn.Linear(WIDE, WIDE))
    with pytest.raises(UserError, match="not recorded; create and convert"):
        init.value(model.weight.detach().half())
    nn.init.ones_(model.weight)
    with pytest.raises(UserError, match="was changed after"):
        init.value(model.weight)


def test_ambient_settings_do_not_change_a_content() -> None:
    model, init = construct(lambda: nn.Linear(WIDE, WIDE))
    content = init.value(model.weight)
    with torch.device("meta"), torch.autocast("cpu"):
        assert torch.equal(init.value(model.weight), content)


MEMORY = """
import resource, sys, torch
from torch import nn
from paperscale.training.deferred import deferred
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with deferred() as init:
    init.value(nn.Linear(256, 256).weight).sum()
base = peak()
with deferred() as init:
    model = nn.ModuleList(nn.Linear(3584, 3584) for _ in range(16))
built = peak()
total = sum(float(init.value(parameter).sum()) for parameter in model.parameters())
print(sum(p.numel() for p in model.parameters()), built - base, peak() - base)
"""


@pytest.mark.slow
def test_a_model_of_200_million_parameters_takes_one_layer_of_memory() -> None:
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    parameters, built, read = map(float, out.split())
    assert parameters > 200e6
    assert built < 100
    assert read < 100
