"""ResNet: the paper's networks, to the parameter."""

from __future__ import annotations

import pytest
import torch

from paperscale.papers.resnet import BasicBlock, CifarResNet


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("n", "option_a", "option_b"),
    [
        (3, 269_722, 272_474),
        (5, 464_154, 466_906),
        (7, 658_586, 661_338),
        (9, 853_018, 855_770),
        (18, 1_727_962, 1_730_714),
        (200, 19_421_274, 19_424_026),
    ],
)
def test_parameter_counts_of_6n_plus_2_layers(n, option_a, option_b):
    with torch.device("meta"):
        assert parameters(CifarResNet(n, shortcut="A")) == option_a
        assert parameters(CifarResNet(n, shortcut="B")) == option_b
        assert parameters(CifarResNet(n, residual=False)) == option_a


@pytest.mark.parametrize(("n", "layers"), [(3, 20), (9, 56)])
def test_weighted_layers(n, layers):
    network = CifarResNet(n)
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in network.modules()) == layers


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (28, 1), (8, 1)])
def test_logits(size, channels):
    network = CifarResNet(1, classes=7, channels=channels)
    assert network(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_option_a_is_the_identity_where_shapes_agree_and_pads_where_not():
    block = BasicBlock(4, 8, stride=2).eval()
    for convolution in (block.conv1, block.conv2):
        torch.nn.init.zeros_(convolution.weight)
    x = torch.rand(1, 4, 6, 6)
    y = block(x)  # F(x) = 0
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()
    same = BasicBlock(4, 4).eval()
    torch.nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_a_plain_block_has_no_shortcut():
    block = BasicBlock(4, 4, residual=False).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    assert not block(torch.rand(1, 4, 6, 6)).any()
