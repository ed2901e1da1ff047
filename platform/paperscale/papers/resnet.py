"""Deep Residual Learning for Image Recognition. He, Zhang, Ren, Sun. 2015. https://arxiv.org/abs/1512.03385

==============================================  ==========================================================
the paper                                       here
==============================================  ==========================================================
F(x) + x (eqn. 1), W_s x (eqn. 2)               ``Block.joined``, ``Block.shortcut``
building blocks (figure 5)                      ``BasicBlock``, ``Bottleneck``
options A and B (section 3.3), C (section 4.1)  ``shortcut="A"``, ``"B"``, ``"C"``
plain networks (section 3.3)                    ``residual=False``
18, 34, 50, 101, 152 layers (table 1)           ``ResNet(depth=...)``, stages ``conv2_x`` to ``conv5_x``
6n + 2 layers (section 4.2)                     ``CifarResNet(n=...)``
shallow net plus identities (section 1)         ``deepen``
augmentation, crops, scales (3.4, 4.2)          ``data`` of the recipes: ``paperscale.data.ImageShards``
SGD, drops, warm-up of 110 layers (3.4, 4.2)    ``ResNetClassifier.configure_optimizers``
scores of several views (3.4)                   ``ResNetClassifier.scores``
layer responses (figure 7)                      ``LayerResponses``, a callback of the recipes
VGG, highway networks (compared with)           ``VGG``, ``shortcut="gated"``
==============================================  ==========================================================

Where we depart from the paper, and why:

- The learning rate is divided by 10 at fixed fractions of the training: on ImageNet the paper waits for the error to
  plateau, which nobody can repeat. 110 layers are warmed up for 400 steps, where the paper waits for a training error
  below 80 %, "about 400"; 1202 layers likewise, of which the paper does not speak.
- Weights of convolutions are drawn from He's normal distribution by fan-out, as in fb.resnet.torch and torchvision; the
  paper does not say which fan. The fully connected layer's are PyTorch's.
- Weight decay is on all parameters, as in fb.resnet.torch; the paper does not say.
- On ImageNet the recipes subtract the mean of each channel and divide by its deviation, in place of a mean per pixel,
  and compute in bf16. At several scales, logits are averaged over the places of the last map before the softmax.
- SGD is PyTorch's, v = momentum v + g, w = w - lr v; the authors' Caffe keeps v = momentum v + lr g, which differs for
  some steps after each drop.
- ``bottleneck_stride="3x3"`` moves a bottleneck's stride to its 3x3 convolution, as Torch's and torchvision's models
  have it ("v1.5"): the same parameters, 0.23 G more multiply-adds, about half a point better.

Shapes: B batch, V views, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from paperscale.errors import UserError
from paperscale.nn.ensemble import Ensemble
from paperscale.nn.optimizers import Lamb, Lars, decay_groups
from paperscale.nn.schedules import cosine, scheduled, steps_down, warmed_up

Shortcut = Literal["A", "B", "C", "gated"]

# -- the parts: section 3 ----------------------------------------------------------------------------------


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the map's size, divided by ``stride``; BN follows, so no bias."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=bias)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a 1x1 convolution."""
    return nn.Conv2d(channels_in, channels_out, 1, stride, bias=bias)


class PadShortcut(nn.Module):
    """Option A of section 3.3: identity, with stride and zeros for the added channels. Has no parameters."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.stride, self.added = stride, channels_out - channels_in

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return shape [B, C + added, H / stride, W / stride]."""
        return F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


def shortcut_for(option: Shortcut, channels_in: int, channels_out: int, stride: int, biases: bool) -> nn.Module:
    """Return what the input passes through beside the layers: W_s of eqn. 2, or nothing of eqn. 1."""
    changes = stride > 1 or channels_in != channels_out
    if option != "C" and not changes:
        return nn.Identity()
    if option in ("A", "gated"):
        return PadShortcut(channels_in, channels_out, stride)
    if biases:
        return conv1x1(channels_in, channels_out, stride, bias=True)
    return nn.Sequential(conv1x1(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))


class Block(nn.Module):
    """What the two building blocks share: the shortcut, and how it meets the layers.

    Args:
        channels_in: C of the input.
        channels_out: C of the output.
        stride: of the block.
        shortcut: the option; ``gated``: y = T(x) F(x) + (1 - T(x)) x with T(x) = sigmoid(W_T x + b_T), b_T = -2 at the
            start (Srivastava et al. 2015, eqn. 3 and section 2.2).
        residual: ``False`` leaves the shortcut out.
        biases: see :class:`D2LResNet18`.
    """

    expansion = 1  # channels of the output for each of the block's width

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, shortcut: Shortcut, residual: bool, biases: bool
    ):
        super().__init__()
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if residual:
            self.shortcut = shortcut_for(shortcut, channels_in, channels_out, stride, biases)
        self.gate = conv1x1(channels_in, channels_out, stride, bias=True) if residual and shortcut == "gated" else None
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, -2.0)  # type: ignore[arg-type]

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """Return the normalisation before the addition."""
        raise NotImplementedError

    def joined(self, f_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Return y = relu(F(x) + x), eqn. 1 and 2; without ``+ x`` in a plain network."""
        if not self.residual:
            return F.relu(f_BCHW, inplace=True)
        if self.gate is not None:
            return F.relu(torch.lerp(self.shortcut(x_BCHW), f_BCHW, self.gate(x_BCHW).sigmoid()), inplace=True)
        return F.relu(f_BCHW + self.shortcut(x_BCHW), inplace=True)


class BasicBlock(Block):
    """Two 3x3 convolutions and their shortcut (figure 2 and figure 5, left)."""

    def __init__(
        self,
        channels_in: int,
        width: int,
        stride: int = 1,
        shortcut: Shortcut = "A",
        residual: bool = True,
        biases: bool = False,
    ):
        super().__init__(channels_in, width, stride, shortcut, residual, biases)
        self.conv1, self.bn1 = conv3x3(channels_in, width, stride, biases), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, bias=biases), nn.BatchNorm2d(width)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """Return the normalisation before the addition."""
        return self.bn2

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return shape [B, width, H / stride, W / stride]."""
        f_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        return self.joined(self.bn2(self.conv2(f_BCHW)), x_BCHW)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions and their shortcut (figure 5, right): reduced, computed, restored to 4 times."""

    expansion = 4

    def __init__(
        self,
        channels_in: int,
        width: int,
        stride: int = 1,
        shortcut: Shortcut = "B",
        residual: bool = True,
        biases: bool = False,
        stride_of: Literal["1x1", "3x3"] = "1x1",
    ):
        channels_out = width * self.expansion
        super().__init__(channels_in, channels_out, stride, shortcut, residual, biases)
        of_1x1, of_3x3 = (stride, 1) if stride_of == "1x1" else (1, stride)
        self.conv1, self.bn1 = conv1x1(channels_in, width, of_1x1, biases), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, of_3x3, biases), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, channels_out, bias=biases), nn.BatchNorm2d(channels_out)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """Return the normalisation before the addition."""
        return self.bn3

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return shape [B, 4 width, H / stride, W / stride]."""
        f_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        f_BCHW = F.relu(self.bn2(self.conv2(f_BCHW)), inplace=True)
        return self.joined(self.bn3(self.conv3(f_BCHW)), x_BCHW)


# -- the networks: table 1 and section 4.2 -----------------------------------------------------------------


def he_normal(network: nn.Module) -> None:
    """Draw the weights of convolutions from a normal of deviation sqrt(2 / (k k C_out)) (He et al. 2015b)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def zero_last_norms(network: nn.Module) -> None:
    """Let every residual block begin as the identity (Goyal et al. 2017, section 5.1)."""
    for module in network.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.last_norm.weight)


def in_colour(image_BCHW: Tensor, channels: int) -> Tensor:
    """Return grey images repeated over a network's channels, others as they are."""
    grey = image_BCHW.shape[1] == 1 and channels > 1
    return image_BCHW.expand(-1, channels, -1, -1) if grey else image_BCHW


BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Depth to block and number of blocks in conv2_x to conv5_x (table 1)."""


class ResNet(nn.Module):
    """The networks of table 1, for ImageNet.

    Args:
        depth: 18, 34, 50, 101 or 152 weighted layers.
        classes: K.
        channels: C of the images; grey images are repeated over them.
        shortcut: option A (no parameters), B (projections where dimensions change) or C (all projections); ``gated``
            as in highway networks.
        bottleneck_stride: the convolution that a bottleneck's stride lies in: ``1x1`` in the paper, ``3x3`` since.
        residual: ``False`` gives the plain network of the same depth.
        zero_init: begin with blocks that are identities.
        biases: see :class:`D2LResNet18`.

    Raises:
        UserError: there is no network of that depth in table 1.
    """

    def __init__(
        self,
        depth: int = 50,
        classes: int = 1000,
        channels: int = 3,
        shortcut: Shortcut = "B",
        bottleneck_stride: Literal["1x1", "3x3"] = "1x1",
        residual: bool = True,
        zero_init: bool = False,
        biases: bool = False,
    ):
        super().__init__()
        if depth not in BLOCKS:
            raise UserError(f"network.depth={depth}: table 1 has {', '.join(map(str, BLOCKS))}; use one of these")
        self.depth, self.shortcut, self.residual, self.biases = depth, shortcut, residual, biases
        self.classes, self.channels, self.bottleneck_stride = classes, channels, bottleneck_stride
        self._channels_in = 64
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=biases), nn.BatchNorm2d(64)
        counts = BLOCKS[depth][1]
        self.conv2_x = self._stage(64, counts[0], 1)
        self.conv3_x = self._stage(128, counts[1], 2)
        self.conv4_x = self._stage(256, counts[2], 2)
        self.conv5_x = self._stage(512, counts[3], 2)
        self.fc = nn.Linear(self._channels_in, classes)
        he_normal(self)
        if zero_init:
            zero_last_norms(self)

    def _stage(self, width: int, count: int, stride: int) -> nn.Sequential:
        """Return one row of table 1; its first block has the stride."""
        block = BLOCKS[self.depth][0]
        options: dict[str, Any] = {"shortcut": self.shortcut, "residual": self.residual, "biases": self.biases}
        if block is Bottleneck:
            options["stride_of"] = self.bottleneck_stride
        blocks = []
        for number in range(count):
            blocks.append(block(self._channels_in, width, stride if number == 0 else 1, **options))
            self._channels_in = width * block.expansion
        return nn.Sequential(*blocks)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits, shape [B, K]; of larger images the mean over all places of the last map (section 3.4)."""
        x_BCHW = F.relu(self.bn1(self.conv1(in_colour(image_BCHW, self.channels))), inplace=True)
        x_BCHW = F.max_pool2d(x_BCHW, 3, 2, padding=1)
        x_BCHW = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(x_BCHW))))
        return self.fc(x_BCHW.mean(dim=(2, 3)))

    def torchvision_names(self) -> dict[str, str]:
        """Return this network's names to those of torchvision's network that computes the same.

        Raises:
            UserError: torchvision has none.
        """
        has: dict[str, tuple[object, object]] = {
            "residual": (self.residual, True),
            "shortcut": (self.shortcut, "B"),
            "channels": (self.channels, 3),
            "biases": (self.biases, False),
        }
        if BLOCKS[self.depth][0] is Bottleneck:
            has["bottleneck_stride"] = (self.bottleneck_stride, "3x3")
        for name, (value, theirs) in has.items():
            if value != theirs:
                raise UserError(
                    f"torchvision has no ResNet-{self.depth} with {name}={value}, only with {theirs}: train with "
                    f"model.network.{name}={theirs}"
                )
        changes = {f"conv{2 + stage}_x.": f"layer{1 + stage}." for stage in range(4)} | {".shortcut.": ".downsample."}
        return {name: replaced(name, changes) for name in self.state_dict()}


def replaced(text: str, changes: dict[str, str]) -> str:
    """Return a text with each of ``changes`` made."""
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


class CifarResNet(nn.Module):
    """The 6n + 2 layer network of section 4.2, for small images.

    A 3x3 convolution, then 2n layers at each of 16, 32 and 64 filters on maps of 1, 1/2 and 1/4 of the image's
    size, global average pooling and a K-way fully connected layer.

    Args:
        n: blocks per stage: 3 for ResNet-20, 5 for 32, 7 for 44, 9 for 56, 18 for 110, 200 for 1202.
        classes: K.
        channels: C of the images; grey images are repeated over them.
        shortcut: option A (the paper's choice on CIFAR-10), B or C; ``gated`` as in highway networks.
        residual: ``False`` gives the plain network of the same depth.
        zero_init: begin with blocks that are identities.

    Raises:
        UserError: n is less than 1.
    """

    def __init__(
        self,
        n: int = 3,
        classes: int = 10,
        channels: int = 3,
        shortcut: Shortcut = "A",
        residual: bool = True,
        zero_init: bool = False,
    ):
        super().__init__()
        if n < 1:
            raise UserError(f"network.n={n}: use 1 or more; 3 gives 20 layers")
        self.n, self.classes, self.channels, self.shortcut, self.residual = n, classes, channels, shortcut, residual
        self.conv1, self.bn1 = conv3x3(channels, 16), nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        channels_in = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(n):
                blocks.append(BasicBlock(channels_in, width, stride if block == 0 else 1, shortcut, residual))
                channels_in = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)
        he_normal(self)
        if zero_init:
            zero_last_norms(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits, shape [B, K]."""
        x_BCHW = F.relu(self.bn1(self.conv1(in_colour(image_BCHW, self.channels))), inplace=True)
        x_BCHW = self.blocks(x_BCHW)
        return self.fc(x_BCHW.mean(dim=(2, 3)))


def deepen(shallow: CifarResNet, n: int) -> CifarResNet:
    """Return a deeper network that computes the same as a shallow one: it exists by construction (section 1).

    Layers are copied, those that are added are identities: of a residual block F(x) = 0, of a plain one each layer
    passes its input on, exactly so in evaluation. That training finds no solution as good is the degradation problem.

    Args:
        shallow: is not changed.
        n: blocks per stage of the deeper one.

    Raises:
        ValueError: it would not be deeper.
    """
    if n <= shallow.n:
        raise ValueError(f"n must be more than {shallow.n}, not {n}")
    deep = CifarResNet(n, shallow.classes, shallow.channels, shallow.shortcut, shallow.residual)
    for part in ("conv1", "bn1", "fc"):
        getattr(deep, part).load_state_dict(getattr(shallow, part).state_dict())
    for number, block in enumerate(deep.blocks):
        stage, place = divmod(number, n)
        if place < shallow.n:
            block.load_state_dict(shallow.blocks[stage * shallow.n + place].state_dict())
        else:
            _make_identity(block)  # type: ignore[arg-type]
    return deep.train(shallow.training)


@torch.no_grad()
def _make_identity(block: BasicBlock) -> None:
    if block.residual:
        nn.init.zeros_(block.bn2.weight)
        return
    for convolution, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
        nn.init.dirac_(convolution.weight)
        norm.weight.fill_((1 + norm.eps) ** 0.5)  # its running variance is 1


# -- what is compared with ---------------------------------------------------------------------------------


class D2LResNet18(ResNet):
    """ResNet-18 as Dive into Deep Learning (d2l.ai) builds it in its first edition: 11,178,378 parameters.

    Convolutions have biases, projections have no batch normalisation, weights are drawn from Xavier's uniform
    distribution, as the book's training function does.

    Args:
        classes: K.
        channels: C of the images.
    """

    def __init__(self, classes: int = 10, channels: int = 1):
        super().__init__(18, classes, channels, biases=True)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight)


class VGG(nn.Module):
    """The networks that ResNets are compared with in tables 3 and 4 (Simonyan & Zisserman 2014, table 1, D and E).

    Args:
        depth: 16 or 19 weighted layers.
        classes: K.
        channels: C of the images; grey images are repeated over them.
        dropout: after the first two fully connected layers.

    Raises:
        UserError: the depth is another one.
    """

    def __init__(self, depth: int = 16, classes: int = 1000, channels: int = 3, dropout: float = 0.5):
        super().__init__()
        if depth not in (16, 19):
            raise UserError(f"network.depth={depth}: VGG has 16 or 19 layers; use one of these")
        self.classes, self.channels = classes, channels
        layers: list[nn.Module] = []
        channels_in = channels
        for width, count in zip((64, 128, 256, 512, 512), (2, 2) + ((depth - 7) // 3,) * 3, strict=True):
            for _ in range(count):
                layers += [conv3x3(channels_in, width, bias=True), nn.ReLU(inplace=True)]
                channels_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = [nn.ReLU(inplace=True), nn.Dropout(dropout)]
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096), *hidden, nn.Linear(4096, 4096), *hidden, nn.Linear(4096, classes)
        )
        he_normal(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits, shape [B, K]."""
        x_BCHW = self.features(in_colour(image_BCHW, self.channels))
        return self.classifier(F.adaptive_avg_pool2d(x_BCHW, 7).flatten(1))


# -- objective and training: section 3.4 and 4.2 -----------------------------------------------------------


def classes_of(network: nn.Module, classes: int | None) -> int:
    """Return the number of classes that a network tells apart.

    Raises:
        UserError: it has another number than ``classes``, or neither tells.
    """
    own: int | None = getattr(network, "classes", None)
    if classes and own and classes != own:
        raise UserError(f"model.classes={classes} and model.network.classes={own} differ: leave model.classes out")
    if not (found := classes or own):
        raise UserError(f"{type(network).__name__} does not tell its number of classes: set model.classes")
    return found


PROTOCOLS = {
    "none": "a single view of the whole image, as in table 6",
    "center": "the centre crop, as in figure 4",
    "ten": "10-crop testing, as in tables 2 and 3",
    "dense": "fully convolutional at several scales, as in table 4",
}
"""How images are seen in evaluation (``data.eval_crop``), to where in the paper that is done."""


class ResNetClassifier(LightningModule):
    """Training by softmax cross-entropy and SGD, and the paper's ways of testing.

    Args:
        network: maps images [B, C, H, W] to logits [B, K].
        lr: learning rate after the warm-up.
        lr_batch_size: the global batch that ``lr`` is for: with another one it is scaled in proportion (Goyal et al.
            2017, section 2.1), as when the batch has grown with the number of GPUs. ``null``: never scaled.
        momentum: of SGD and LARS.
        weight_decay: on all parameters.
        decay_norms: ``False`` leaves biases and batch normalisation without weight decay.
        optimizer: ``sgd``, as in the paper; ``lamb`` or ``lars`` for large batches.
        schedule: ``steps``: divided by 10 at each milestone; ``cosine``: down to 0.
        milestones: rising fractions of the training, between 0 and 1.
        warmup_steps: steps until ``lr`` is reached; the paper warms 110 layers up for about 400.
        warmup_lr: learning rate during these steps (the paper's 0.01); by default it rises linearly.
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2015, section 7).
        classes: K, by default as the network says.

    Raises:
        UserError: the milestones are no such fractions, or the network has another number of classes, or tells none.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.1,
        lr_batch_size: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay_norms: bool = True,
        optimizer: Literal["sgd", "lamb", "lars"] = "sgd",
        schedule: Literal["steps", "cosine"] = "steps",
        milestones: tuple[float, ...] = (0.5, 0.75),
        warmup_steps: int = 0,
        warmup_lr: float | None = None,
        label_smoothing: float = 0.0,
        classes: int | None = None,
    ):
        super().__init__()
        if list(milestones) != sorted(milestones) or not all(0 < fraction < 1 for fraction in milestones):
            raise UserError(
                f"model.milestones={list(milestones)}: give rising fractions of the training, for example "
                "[0.25, 0.5, 0.75]"
            )
        self.classes = classes_of(network, classes)
        self.network = network
        self.lr, self.lr_batch_size = lr, lr_batch_size
        self.momentum, self.weight_decay, self.decay_norms = momentum, weight_decay, decay_norms
        self.optimizer_name, self.schedule, self.milestones = optimizer, schedule, milestones
        self.warmup_steps, self.warmup_lr = warmup_steps, warmup_lr
        self.label_smoothing = label_smoothing
        self.train_accuracy = MulticlassAccuracy(self.classes, average="micro")
        for stage in ("val", "test"):
            setattr(self, f"{stage}_accuracy", MulticlassAccuracy(self.classes, average="micro"))
            if self.classes > 5:
                setattr(self, f"{stage}_accuracy_top5", MulticlassAccuracy(self.classes, top_k=5, average="micro"))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits, shape [B, K]."""
        return self.network(image_BCHW)

    def loss(self, logits_BK: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the mean cross-entropy; of mixed images, the two labels' in their shares."""

        def entropy(label_B: Tensor) -> Tensor:
            return F.cross_entropy(logits_BK, label_B, reduction="none", label_smoothing=self.label_smoothing)

        if "share" not in batch:
            return entropy(batch["label"]).mean()
        return torch.lerp(entropy(batch["other_label"]), entropy(batch["label"]), batch["share"]).mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch; the accuracy is over the epoch, of mixed images by their own label."""
        logits_BK = self(batch["image"])
        loss = self.loss(logits_BK, batch)
        self.train_accuracy.update(logits_BK, batch["label"])
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(logits_BK))
        self.log("train/loss", loss.detach())
        return loss

    def scores(self, image: Any) -> Tensor:
        """Return logits, shape [B, K]; of several views of each image, the logarithm of their mean softmax.

        Args:
            image: one view of each, shape [B, C, H, W]; V views, shape [B, V, C, H, W] (10-crop); or for each image a
                list of views [1, C, H, W] of any size (multi-scale).
        """
        if isinstance(image, Tensor) and image.dim() == 4:
            return self(image)
        if isinstance(image, Tensor):
            logits_BVK = self(image.flatten(0, 1)).unflatten(0, image.shape[:2])
            return logits_BVK.float().softmax(dim=2).mean(dim=1).log()
        scores_BK: list[Any] = [0.0] * len(image)
        for rows, views in _alike(image):
            for row, score_K in zip(rows, self(views).float().softmax(dim=1), strict=True):
                scores_BK[row] = scores_BK[row] + score_K / len(image[row])
        return torch.stack(scores_BK).log()

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Score one batch; also without the smoothing of labels, which would be part of the loss."""
        logits_BK, label_B = self.scores(batch["image"]), batch["label"]
        self.log(f"{stage}/loss", F.cross_entropy(logits_BK, label_B), batch_size=len(label_B), on_epoch=True)
        for name in ("accuracy", "accuracy_top5") if self.classes > 5 else ("accuracy",):
            metric = getattr(self, f"{stage}_{name}")
            metric.update(logits_BK, label_B)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=len(label_B))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the test split."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the most likely class of each image, shape [B]."""
        return self.scores(batch["image"]).argmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule."""
        lr, steps = self.lr, int(self.trainer.estimated_stepping_batches)
        if self.lr_batch_size:
            lr *= self.trainer.datamodule.global_batch_size / self.lr_batch_size  # type: ignore[attr-defined]
        parameters: Any = self.parameters() if self.decay_norms else decay_groups(self, self.weight_decay)
        options: dict[str, Any] = {"lr": lr, "weight_decay": self.weight_decay}
        if self.optimizer_name == "lamb":
            optimizer: torch.optim.Optimizer = Lamb(parameters, **options)
        elif self.optimizer_name == "lars":
            optimizer = Lars(parameters, momentum=self.momentum, **options)
        else:
            optimizer = torch.optim.SGD(parameters, momentum=self.momentum, **options)
        drops = [int(fraction * steps) for fraction in self.milestones]
        after = steps_down(drops) if self.schedule == "steps" else cosine(steps, self.warmup_steps)
        start = None if self.warmup_lr is None else self.warmup_lr / lr
        return scheduled(optimizer, warmed_up(after, self.warmup_steps, start))  # type: ignore[return-value]

    def export_names(self, format: str) -> dict[str, str]:
        """Return this module's names to those of another library's network, empty where there is none.

        Raises:
            UserError: the library has such networks, but none that computes the same.
        """
        if format != "torchvision" or not isinstance(self.network, ResNet):
            return {}
        return {f"network.{name}": other for name, other in self.network.torchvision_names().items()}

    def reproduces(self, eval_crop: str) -> str:
        """Return which of the paper's protocols an evaluation follows."""
        if not isinstance(self.network, Ensemble):
            return PROTOCOLS[eval_crop]
        views, _, _ = PROTOCOLS[eval_crop].partition(",")
        where = ", as in table 5" if eval_crop == "dense" else ""
        return f"an ensemble of {len(self.network.networks)} networks, {views}{where}"


def _alike(images: list[list[Tensor]]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the views of equal shape together, shape [N, C, H, W], with the rows of their images."""
    by_shape: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for row, views in enumerate(images):
        for view in views:
            by_shape.setdefault(view.shape, []).append((row, view))
    for found in by_shape.values():
        yield [row for row, _ in found], torch.cat([view for _, view in found])
