"""ResNet: the paper's networks to the parameter and the multiply-add, its ways of training and of testing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from paperscale.data.images import Ragged
from paperscale.errors import UserError
from paperscale.nn.ensemble import Ensemble
from paperscale.papers.resnet import (
    VGG,
    BasicBlock,
    Bottleneck,
    CifarResNet,
    D2LResNet18,
    ResNet,
    ResNetClassifier,
    deepen,
)


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def multiply_adds(network: torch.nn.Module, size: int) -> int:
    with FlopCounterMode(display=False) as counted, torch.device("meta"):
        network(torch.empty(1, 3, size, size))
    return counted.get_total_flops() // 2


# -- table 1, section 3.3, section 4.2 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "options", "count", "giga", "paper"),
    [
        (18, {"residual": False}, 11_515_688, 1.795, 1.8),
        (18, {"shortcut": "A"}, 11_515_688, 1.795, 1.8),
        (18, {"shortcut": "B"}, 11_689_512, 1.814, None),
        (18, {"shortcut": "C"}, 12_043_816, 1.878, None),
        (34, {"residual": False}, 21_623_848, 3.644, 3.6),
        (34, {"shortcut": "A"}, 21_623_848, 3.644, 3.6),
        (34, {"shortcut": "B"}, 21_797_672, 3.664, None),
        (34, {"shortcut": "C"}, 22_716_840, 3.831, None),
        (50, {}, 25_557_032, 3.858, 3.8),
        (50, {"bottleneck_stride": "3x3"}, 25_557_032, 4.089, None),
        (50, {"shortcut": "C", "bottleneck_stride": "3x3"}, 40_128_552, 6.555, None),
        (101, {}, 44_549_160, 7.570, 7.6),
        (101, {"bottleneck_stride": "3x3"}, 44_549_160, 7.801, None),
        (152, {}, 60_192_808, 11.282, 11.3),
        (152, {"bottleneck_stride": "3x3"}, 60_192_808, 11.514, None),
    ],
)
def test_parameters_and_multiply_adds_of_table_1(depth, options, count, giga, paper):
    with torch.device("meta"):
        network = ResNet(depth, **options)
    assert parameters(network) == count
    found = multiply_adds(network, 224) / 1e9
    assert found == pytest.approx(giga, abs=0.0006)
    assert paper is None or found == pytest.approx(paper, abs=0.06), "the paper's FLOPs column"


@pytest.mark.parametrize(
    ("n", "option_a", "option_b", "mega"),
    [
        (3, 269_722, 272_474, 40.6),
        (5, 464_154, 466_906, 68.9),
        (7, 658_586, 661_338, 97.2),
        (9, 853_018, 855_770, 125.5),
        (18, 1_727_962, 1_730_714, 252.9),
        pytest.param(200, 19_421_274, 19_424_026, 2829, marks=pytest.mark.slow),
    ],
)
def test_parameters_and_multiply_adds_of_6n_plus_2_layers(n, option_a, option_b, mega):
    with torch.device("meta"):
        network = CifarResNet(n, shortcut="A")
        assert parameters(CifarResNet(n, shortcut="B")) == option_b
        assert parameters(CifarResNet(n, residual=False)) == option_a
    assert parameters(network) == option_a
    assert multiply_adds(network, 32) / 1e6 == pytest.approx(mega, abs=0.3)


@pytest.mark.parametrize(("depth", "count", "giga"), [(16, 138_357_544, 15.3), (19, 143_667_240, 19.6)])
def test_vgg_that_resnets_are_compared_with(depth, count, giga):
    with torch.device("meta"):
        network = VGG(depth)
    assert parameters(network) == count
    assert multiply_adds(network, 224) / 1e9 == pytest.approx(giga, rel=0.015)


def test_resnet_34_takes_18_percent_of_vgg_19s_multiply_adds():
    with torch.device("meta"):
        assert multiply_adds(ResNet(34, shortcut="A"), 224) / multiply_adds(VGG(19), 224) == pytest.approx(
            0.18, abs=0.01
        )


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_weighted_layers(depth):
    with torch.device("meta"):
        network = ResNet(depth, shortcut="A")
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in network.modules()) == depth


def test_a_depth_that_table_1_has_not_is_refused():
    with pytest.raises(UserError, match=r"table 1 has 18, 34, 50, 101, 152"):
        ResNet(20)


def test_d2ls_resnet18_has_the_chapters_parameters():
    network = D2LResNet18()
    assert parameters(network) == 11_178_378
    assert network(torch.rand(1, 1, 96, 96)).shape == (1, 10)


# -- blocks ----------------------------------------------------------------------------------------------------


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


def test_a_bottlenecks_stride_is_in_the_convolution_that_is_asked_for():
    strides = {of: [m.stride[0] for m in Bottleneck(8, 4, 2, stride_of=of).modules() if isinstance(m, torch.nn.Conv2d)]
               for of in ("1x1", "3x3")}  # the shortcut's first  # fmt: skip
    assert strides == {"1x1": [2, 2, 1, 1], "3x3": [2, 1, 2, 1]}


def test_a_gated_block_begins_near_its_input():
    block = BasicBlock(4, 4, shortcut="gated").eval()
    torch.nn.init.zeros_(block.gate.weight)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 4, 6, 6)
    assert torch.allclose(block(x), (1 - torch.tensor(-2.0).sigmoid()) * x)


def test_with_zero_init_every_residual_block_begins_as_the_identity():
    network = CifarResNet(2, zero_init=True)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(network.blocks[1](x), x)


@pytest.mark.parametrize("residual", [True, False])
def test_a_deeper_network_that_computes_the_same_exists_by_construction(residual):
    shallow = CifarResNet(2, residual=residual)
    shallow(torch.rand(8, 3, 16, 16))  # statistics that are not those of the start
    deep = deepen(shallow.eval(), 5)
    x = torch.rand(4, 3, 16, 16)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in deep.modules()) == 31
    assert torch.allclose(deep(x), shallow(x), atol=1e-5)


def test_grey_images_are_repeated_over_the_channels():
    network = CifarResNet(1).eval()
    grey = torch.rand(2, 1, 8, 8)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milestones": (30, 60)}, "rising fractions of the training"),
        ({"milestones": (0.75, 0.5)}, "rising fractions of the training"),
        ({"classes": 5}, "model.classes=5 and model.network.classes=10 differ"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        ResNetClassifier(CifarResNet(1), **options)
    with pytest.raises(UserError, match="does not tell its number of classes"):
        ResNetClassifier(torch.nn.Linear(2, 2))


# -- training ----------------------------------------------------------------------------------------------------


def rates(steps: int, batch: int = 256, **options) -> list[float]:
    """The learning rates of a training."""
    model = ResNetClassifier(CifarResNet(1), **options)
    model._trainer = SimpleNamespace(
        estimated_stepping_batches=steps, datamodule=SimpleNamespace(global_batch_size=batch)
    )
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_is_divided_by_10_at_each_milestone():
    assert rates(8) == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_110_layers_are_warmed_up_at_a_hundredth():
    assert rates(8, warmup_steps=2, warmup_lr=0.01) == pytest.approx([0.01] * 2 + [0.1] * 2 + [0.01] * 2 + [0.001] * 2)


def test_the_modern_schedule_rises_linearly_and_falls_as_a_cosine():
    found = rates(10, schedule="cosine", warmup_steps=4, lr=1.0)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[7] == pytest.approx(0.5)
    assert sorted(found[4:], reverse=True) == found[4:]


def test_the_rate_grows_with_the_batch_where_that_is_asked_for():
    assert rates(2, batch=2048, lr_batch_size=256, milestones=())[0] == pytest.approx(0.8)
    assert rates(2, batch=2048, milestones=())[0] == pytest.approx(0.1)
    warm = rates(3, batch=2048, lr_batch_size=256, milestones=(), warmup_steps=1, warmup_lr=0.01)
    assert warm == pytest.approx([0.01, 0.8, 0.8])


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("lamb", "Lamb"), ("lars", "Lars")])
def test_the_optimizer_and_what_it_decays(name, kind):
    model = ResNetClassifier(CifarResNet(1), optimizer=name, decay_norms=False)
    model._trainer = SimpleNamespace(estimated_stepping_batches=10)
    optimizer = model.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__ == kind
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 1e-4
    assert spared["weight_decay"] == 0
    assert {p.dim() for p in spared["params"]} == {1}


def test_mixed_images_are_trained_on_both_labels_in_their_shares():
    model = ResNetClassifier(CifarResNet(1))
    logits, a, b = torch.randn(2, 10), torch.tensor([1, 2]), torch.tensor([3, 4])
    share = torch.tensor([0.25, 1.0])
    found = model.loss(logits, {"label": a, "other_label": b, "share": share})
    target = torch.zeros(2, 10)
    target[0, 1], target[0, 3], target[1, 2] = 0.25, 0.75, 1.0
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item())


# -- testing -----------------------------------------------------------------------------------------------------


def test_views_are_scored_by_their_mean_softmax():
    model = ResNetClassifier(CifarResNet(1)).eval()
    views = torch.rand(3, 10, 3, 16, 16)
    expected = torch.stack([model(view).softmax(1).mean(0) for view in views])
    assert torch.allclose(model.scores(views).exp(), expected, atol=1e-6)


def test_several_scales_are_scored_by_their_mean_softmax():
    model = ResNetClassifier(CifarResNet(1)).eval()
    sizes = [[(16, 16), (20, 20)], [(16, 18), (20, 22)], [(16, 16), (20, 20)]]
    images = Ragged([torch.rand(1, 3, *size) for size in row] for row in sizes)
    expected = torch.cat([sum(model(view).softmax(1) for view in views) / 2 for views in images])
    assert torch.allclose(model.scores(images).exp(), expected, atol=1e-6)


def test_a_larger_image_is_scored_by_the_mean_over_all_places():
    network = ResNet(18, classes=5).eval()
    maps: list[torch.Tensor] = []
    network.conv5_x.register_forward_hook(lambda *call: maps.append(call[-1]))
    logits = network(torch.rand(1, 3, 96, 128))
    everywhere = torch.einsum("bchw,kc->bkhw", maps[0], network.fc.weight) + network.fc.bias.view(1, -1, 1, 1)
    assert maps[0].shape[2:] == (3, 4)
    assert torch.allclose(everywhere.mean(dim=(2, 3)), logits, atol=1e-5)


def test_each_way_of_testing_names_what_it_reproduces():
    model = ResNetClassifier(CifarResNet(1))
    assert model.reproduces("ten") == "10-crop testing, as in tables 2 and 3"
    assert model.reproduces("dense").endswith("as in table 4")
    model.network = Ensemble([CifarResNet(1), CifarResNet(1)])
    assert model.reproduces("dense").endswith("several scales, as in table 5")
    assert model.reproduces("center") == "an ensemble of 2 networks, the centre crop"


# -- torchvision -------------------------------------------------------------------------------------------------


def test_torchvisions_names_are_those_of_its_layers():
    with torch.device("meta"):
        names = ResNetClassifier(ResNet(50, bottleneck_stride="3x3")).export_names("torchvision")
    assert names["network.conv2_x.0.shortcut.0.weight"] == "layer1.0.downsample.0.weight"
    assert names["network.conv5_x.2.bn3.running_var"] == "layer4.2.bn3.running_var"
    assert names["network.fc.bias"] == "fc.bias"
    assert len(names) == len(set(names.values())) == 320


@pytest.mark.parametrize(
    ("depth", "options", "key"),
    [
        (50, {}, "bottleneck_stride"),
        (18, {"shortcut": "A"}, "shortcut"),
        (34, {"residual": False}, "residual"),
        (18, {"channels": 1}, "channels"),
    ],
)
def test_what_torchvision_has_not_is_not_exported_under_its_names(depth, options, key):
    with torch.device("meta"):
        model = ResNetClassifier(ResNet(depth, **options))
    with pytest.raises(UserError, match=f"train with model.network.{key}="):
        model.export_names("torchvision")
