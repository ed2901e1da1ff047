"""Which modules of a network are its blocks."""

from __future__ import annotations

import pytest
from torch import nn

from paperscale.errors import UserError
from paperscale.papers.resnet import CifarResNet, ResNetClassifier
from paperscale.training.blocks import blocks, separable_blocks, tied_parameters


class Layer(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in blocks(module)]


def test_a_resnets_blocks_are_its_residual_blocks() -> None:
    model = ResNetClassifier(CifarResNet(2))
    assert names(model) == [f"network.blocks.{i}" for i in range(6)]
    assert all(dict(model.named_modules())[name] is block for name, block in blocks(model))


def test_a_transformers_blocks_are_the_layers_of_encoder_and_decoder() -> None:
    model = nn.Transformer(4, 2, 2, 3, 8)
    assert names(model) == [f"encoder.layers.{i}" for i in range(2)] + [f"decoder.layers.{i}" for i in range(3)]


def test_stages_that_are_plain_sequences_are_looked_into() -> None:
    stages = nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), Layer(), Layer()))
    assert names(stages) == ["0.0", "0.1", "1.0", "1.1", "1.2"]


def test_the_outermost_are_taken_unless_the_network_says_otherwise() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(Stage(), Stage())
            self.last = Layer()

    class Named(Network):
        block_classes = (Layer,)

    assert names(Network()) == ["stages.0", "stages.1"]
    inner = [f"stages.{i}.layers.{j}" for i in range(2) for j in range(2)]
    assert names(Named()) == [*inner, "last"]
    assert names(nn.Sequential(Named())) == [f"0.{name}" for name in [*inner, "last"]]


def test_layers_without_parts_and_without_parameters_are_none() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    parts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
    losses = nn.ModuleList(nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance()) for _ in range(2))
    assert names(nn.ModuleList([plain, parts, losses])) == []


def test_a_block_that_is_used_twice_is_one() -> None:
    layer = Layer()
    assert names(nn.ModuleList([layer, layer, Layer()])) == ["0", "2"]


def test_a_block_whose_weight_is_used_elsewhere_cannot_be_divided_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))
            self.layers[1].mlp[0].weight = self.layers[2].mlp[0].weight
            self.layers[3].mlp[0].weight = self.layers[3].mlp[2].weight
            self.head = nn.Linear(4, 4)

    model = Tied()
    assert [name for name, _ in separable_blocks(model)] == ["layers.0", "layers.3"]
    assert tied_parameters(model) == [
        ["layers.1.mlp.0.weight", "layers.2.mlp.0.weight"],
        ["layers.3.mlp.0.weight", "layers.3.mlp.2.weight"],
    ]


@pytest.mark.parametrize("named", [Layer, ("Layer",), (int,)])
def test_wrong_names_are_refused(named: object) -> None:
    model = nn.Sequential(Layer())
    model.block_classes = named  # type: ignore[assignment]
    with pytest.raises(UserError, match="give a tuple of module classes"):
        blocks(model)


def test_names_of_what_is_not_there_are_refused() -> None:
    model = nn.Sequential(Layer())
    model.block_classes = (nn.Conv2d,)  # type: ignore[assignment]
    with pytest.raises(UserError, match="names Conv2d, of which it has none; name the classes"):
        blocks(model)
