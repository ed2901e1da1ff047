"""Deep Residual Learning for Image Recognition. He, Zhang, Ren, Sun. 2015. https://arxiv.org/abs/1512.03385

====================================  ====================================================
the paper                             here
====================================  ====================================================
n (section 4.2: 6n + 2 layers)        ``CifarResNet(n=...)``
F(x) + x (eqn. 1), W_s x (eqn. 2)     ``BasicBlock.forward``, ``BasicBlock.shortcut``
options A and B (section 3.3)         ``shortcut="A"``, ``shortcut="B"``
plain network (section 3.3)           ``residual=False``
====================================  ====================================================

Where we depart from the paper, and why:

- The learning rate is divided by 10 at 1/2 and 3/4 of the training, whatever its length: the paper's 32k and 48k of
  64k iterations, also for data sets on which 64k iterations would be a waste.
- Weights are drawn from He's normal distribution by fan-out, as the authors' released models and every PyTorch
  descendant do; the paper does not say which fan.
- Batch normalisation keeps moving averages; the authors' release recomputes the statistics after training.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

# -- the parts ---------------------------------------------------------------------------------------------


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the map's size, divided by ``stride``; BN follows, so no bias."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Option A of section 3.3: identity, with stride and zeros for the added channels. Has no parameters."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.stride, self.added = stride, channels_out - channels_in

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return shape [B, C + added, H / stride, W / stride]."""
        return F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and their shortcut (figure 2 and figure 5, left)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        stride: int = 1,
        shortcut: Literal["A", "B"] = "A",
        residual: bool = True,
    ):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out)
        self.conv2, self.bn2 = conv3x3(channels_out, channels_out), nn.BatchNorm2d(channels_out)
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if residual and (stride > 1 or channels_in != channels_out):
            self.shortcut = (
                PadShortcut(channels_in, channels_out, stride)
                if shortcut == "A"
                else nn.Sequential(
                    nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
                )
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return y = relu(F(x) + x), eqn. 1 (without ``+ x`` in a plain network)."""
        f_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        f_BCHW = self.bn2(self.conv2(f_BCHW))
        return F.relu(f_BCHW + self.shortcut(x_BCHW) if self.residual else f_BCHW)


# -- the network -------------------------------------------------------------------------------------------


class CifarResNet(nn.Module):
    """The 6n + 2 layer network of section 4.2, for small images.

    A 3x3 convolution, then 2n layers at each of 16, 32 and 64 filters on maps of 1, 1/2 and 1/4 of the image's
    size, global average pooling and a K-way fully connected layer.

    Args:
        n: blocks per stage: 3 for ResNet-20, 5 for 32, 7 for 44, 9 for 56, 18 for 110, 200 for 1202.
        classes: K.
        channels: C of the images.
        shortcut: option A (the paper's choice on CIFAR-10) or B.
        residual: ``False`` gives the plain network of the same depth.

    Raises:
        ValueError: n is less than 1.
    """

    def __init__(
        self,
        n: int = 3,
        classes: int = 10,
        channels: int = 3,
        shortcut: Literal["A", "B"] = "A",
        residual: bool = True,
    ):
        super().__init__()
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        self.conv1, self.bn1 = conv3x3(channels, 16), nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        channels_in = 16
        for channels_out, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(n):
                blocks.append(BasicBlock(channels_in, channels_out, stride if block == 0 else 1, shortcut, residual))
                channels_in = channels_out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits, shape [B, K]."""
        x_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        x_BCHW = self.blocks(x_BCHW)
        return self.fc(x_BCHW.mean(dim=(2, 3)))


# -- objective and training --------------------------------------------------------------------------------


class ResNetClassifier(LightningModule):
    """Training by softmax cross-entropy and SGD as in section 3.4 and 4.2.

    Args:
        network: maps images [B, C, H, W] to logits [B, K].
        lr: learning rate at the start.
        momentum: of SGD, in PyTorch's form v = momentum v + g, w = w - lr v.
        weight_decay: on all parameters, as in the authors' release.
        milestones: fractions of the training at which the learning rate is divided by 10.
        classes: K.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        milestones: tuple[float, ...] = (0.5, 0.75),
        classes: int = 10,
    ):
        super().__init__()
        self.network = network
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.milestones = milestones
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits, shape [B, K]."""
        return self.network(x_BCHW)

    def _score(self, batch: dict[str, Any], name: str, accuracy: MulticlassAccuracy) -> Tensor:
        """Return the mean cross-entropy, and count the batch's right answers."""
        logits_BK = self(batch["image"])
        accuracy.update(logits_BK, batch["label"])
        self.log(name, accuracy, on_step=False, on_epoch=True, batch_size=len(logits_BK))
        return F.cross_entropy(logits_BK, batch["label"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        loss = self._score(batch, "train/accuracy", self.train_accuracy)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._score(batch, "val/accuracy", self.val_accuracy)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score one batch of the test split."""
        self._score(batch, "test/accuracy", self.test_accuracy)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the most likely class of each image, shape [B]."""
        return self(batch["image"]).argmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with the learning rate divided by 10 at each milestone."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [int(fraction * steps) for fraction in self.milestones], gamma=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
