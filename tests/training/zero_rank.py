"""One rank of :mod:`test_operators`: the three stages of ZeRO, one after another, without any operator."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from paperscale.training import operators
from paperscale.training.quiet import quiet_libraries
from paperscale.training.strategies.zero import ZeroStrategy

STEPS, BATCH = 10, 16


class Classifier(LightningModule):
    """Learns which of the first four numbers is the largest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch), batch[:, :4].argmax(1))
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-2, fused=True)


def train(world_size: int, stage: Any, **offload: Any) -> list[float]:
    """Return the losses of a training on this rank."""
    samples = torch.randn(STEPS * BATCH * world_size, 16, generator=torch.Generator().manual_seed(1))
    batches = torch.utils.data.DataLoader(samples[int(os.environ["RANK"]) :: world_size], batch_size=BATCH)
    model = Classifier()
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=ZeroStrategy(stage, **offload),
        plugins=[LightningEnvironment()],
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.strategy.config["train_micro_batch_size_per_gpu"] = BATCH
    trainer.fit(model, batches)
    return model.losses


def main() -> None:
    """Print the losses of each stage, and the operators that were compiled."""
    world_size = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    quiet_libraries()
    operators.prepare()
    losses = [train(world_size, 1), train(world_size, 2, offload_optimizer="cpu"), train(world_size, 3)]
    print(json.dumps({"losses": losses, "built": operators.built("cpu")}), flush=True)


if __name__ == "__main__":
    main()
