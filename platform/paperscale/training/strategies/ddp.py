"""Data parallel: every process holds the whole model."""

# No `from __future__ import annotations`: DDP looks at the annotations of a communication hook.

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from paperscale.training.strategies.portable import PortableStrategy


def ordered_mean(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over ranks, adding them up in the order of the ranks.

    A ring adds each part of a bucket in another order of ranks, and DDP rearranges its buckets after the first step:
    with three ranks or more, a resumed run, whose first step comes later, would differ in the last bit. Moves as
    many bytes as a ring does.
    """
    buffer, world_size = bucket.buffer(), dist.get_world_size()
    padded = F.pad(buffer, (0, -len(buffer) % world_size))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)  # row r: rank r's gradients of the part that this rank adds up
    rows = parts.view(world_size, -1)
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    dist.all_gather_into_tensor(padded, total / world_size)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(padded[: len(buffer)])
    return future


class ExactDDPStrategy(PortableStrategy, DDPStrategy):
    """DDP whose gradients on the CPU do not depend on how DDP has laid out its buckets."""

    def configure_ddp(self) -> None:
        """Wrap the model."""
        super().configure_ddp()
        if self.root_device.type == "cpu" and self.world_size > 2:  # the sum of two is the same either way round
            model: Any = self.model
            assert isinstance(model, DistributedDataParallel)  # noqa: S101  what configure_ddp has just made
            model.register_comm_hook(None, ordered_mean)
