"""A Trainer on one of several ranks that are processes of this machine, as :mod:`processes` starts them."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from paperscale.jobs.environment import JobEnvironment
from paperscale.training import strategies


def trainer_of_rank(strategy: str, callback: Callback, **settings: Any) -> Trainer:
    """Join the other ranks and return a Trainer for one step, without validation and files; seeds the model.

    Args:
        strategy: of several ranks.
        callback: of the Trainer.
        settings: further arguments of it; ``max_steps`` for more steps.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    return Trainer(
        **{"max_steps": 1, **settings},
        accelerator="cpu",
        devices=world_size,
        strategy=strategies.make("auto" if world_size == 1 else strategy, world_size),
        plugins=[JobEnvironment()] if world_size > 1 else [],
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
