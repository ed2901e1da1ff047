"""Cross-entropies without the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from paperscale.nn import losses
from paperscale.nn.losses import linear_cross_entropy


def case(rows: int = 50, vocabulary: int = 1000) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (rows, vocabulary))
    bias = torch.randn(vocabulary, generator=generator, requires_grad=True)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, bias, target, torch.rand(rows, generator=generator)


@pytest.mark.parametrize("elements", [1, 7000, 1 << 25])
def test_loss_and_gradients_are_those_of_the_whole_logits(elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses, "_ELEMENTS", {"cpu": elements})
    hidden, weight, bias, target, share = case()
    found = linear_cross_entropy(hidden, weight, bias, target, share)
    entropy = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
    torch.testing.assert_close(found.entropy_M, entropy)
    torch.testing.assert_close(found.loss, (entropy * share).sum())
    assert torch.equal(found.hit_M, F.linear(hidden, weight, bias).argmax(1) == target)
    mine = torch.autograd.grad(3 * found.loss, (hidden, weight, bias))
    for a, b in zip(mine, torch.autograd.grad(3 * (entropy * share).sum(), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_of_the_size_of_the_logits_is_kept():
    hidden, weight, bias, target, share = case(rows=400, vocabulary=3000)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, bias, target, share)
    assert kept
    assert max(kept) <= weight.numel() < 400 * 3000


def test_under_autocast_gradients_have_the_types_of_what_they_are_of():
    hidden, weight, bias, target, share = case()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, bias, target, share)
    assert found.loss.dtype == torch.float32
    exact = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
    torch.testing.assert_close(found.entropy_M, exact.detach(), rtol=0.02, atol=0.1)
    assert [g.dtype for g in torch.autograd.grad(found.loss, (hidden, weight, bias))] == [torch.float32] * 3


def test_a_batch_without_anything_to_predict_costs_nothing():
    hidden, weight, bias, _, _ = case()
    empty = torch.zeros(0, dtype=torch.int64)
    found = linear_cross_entropy(hidden[:0], weight, bias, empty, torch.zeros(0))
    assert found.loss == 0
    assert torch.autograd.grad(found.loss, weight)[0].abs().sum() == 0
