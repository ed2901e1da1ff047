"""A network whose losses do not depend on how a batch is divided: it has no statistics over batches."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block of a layer norm and two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


class Small(LightningModule):
    """Two blocks, two parameter groups, a frozen weight, a buffer and a schedule.

    Args:
        width: of the blocks; an odd one is divided unevenly.
        lr: learning rate after five steps of warm-up.
    """

    def __init__(self, width: int = 9, lr: float = 0.01):
        super().__init__()
        self.lr = lr
        self.first = nn.Linear(64, width)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(2)))
        self.last = nn.Linear(width, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(image.flatten(1)[:, :64]) * self.scale))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen += 1
        loss = nn.functional.cross_entropy(self(batch["image"]), batch["label"])
        self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Adversaries(LightningModule):
    """Two networks with an optimizer each, stepped by hand: a backward pass through the second trains one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64))
        self.judge = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        for_maker, for_judge = self.optimizers()
        real = batch["image"].flatten(1)[:, :64]
        made = self.maker(real[:, :8])
        loss = nn.functional.softplus(-self.judge(real)).mean()
        loss = loss + nn.functional.softplus(self.judge(made.detach())).mean()
        for_judge.zero_grad()
        self.manual_backward(loss)
        for_judge.step()
        other = nn.functional.softplus(-self.judge(self.maker(real[:, :8]))).mean()
        for_maker.zero_grad()
        self.manual_backward(other)
        for_maker.step()
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.5, momentum=0.9) for part in (self.maker, self.judge)]
