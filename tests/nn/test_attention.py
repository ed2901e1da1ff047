"""Sequences in a packed batch attend to themselves alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paperscale.nn.attention import Layout, attention

LENGTHS = (
    [5, 9, 9, 3, 128, 100, 40],
    [8, 8, 8, 8, 8],
    [8, 8, 8, 8, 8, 7, 7, 3],
    [3, 7, 8, 8, 8, 8, 7, 8],
    [1],
    [1, 64, 1, 64, 64, 64, 64],
)


def packed(lengths: list[int], heads: int = 2, width: int = 8) -> tuple[list[Tensor], Layout]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(sum(lengths), heads, width, generator=generator, requires_grad=True) for _ in range(3)]
    return tensors, Layout(lengths, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32))


def one_by_one(tensors: list[Tensor], lengths: list[int], causal: bool) -> Tensor:
    parts = zip(*(tensor.split(lengths) for tensor in tensors), strict=True)
    each = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=causal).transpose(0, 1)
        for part in parts
    ]
    return torch.cat(each)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_sequence_has_the_output_and_the_gradient_that_it_has_alone(lengths: list[int], causal: bool):
    tensors, layout = packed(lengths)
    found, wanted = attention(*tensors, layout, causal=causal), one_by_one(tensors, lengths, causal)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(wanted)
    of_found = torch.autograd.grad((found * weight).sum(), tensors)
    for mine, theirs in zip(of_found, torch.autograd.grad((wanted * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_sequences_of_one_length_are_computed_where_they_lie():
    groups, order = packed([64] * 6 + [40, 7])[1].groups
    assert order is None
    assert [group.tokens for group in groups[:1]] == [slice(0, 384)]


def test_dropout_drops_probabilities_and_keeps_their_mean():
    tensors, layout = packed([64] * 8)
    ones = torch.ones_like(tensors[2])
    found = attention(tensors[0], tensors[1], ones, layout, dropout=0.5)
    assert found.std() > 0.05
    assert abs(float(found.detach().mean()) - 1) < 0.02
