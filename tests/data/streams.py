"""A stream of the tiny set's pictures, as small as a stream can be."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from paperscale.data.shards import ShardSet
from paperscale.data.stream import ShardStream


class Pictures(ShardStream):
    """Pictures of 8 x 8 and their labels."""

    def allocate(self, count: int, train: bool) -> dict[str, Any]:
        return {"image": torch.empty(count, 8, 8, dtype=torch.uint8), "label": torch.empty(count, dtype=torch.int64)}

    def fill(
        self, shards: ShardSet, batch: Any, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        members = shards.read(shard, row_in_shard)
        batch["image"][row] = torch.from_numpy(np.array(Image.open(io.BytesIO(members["png"]))))
        batch["label"][row] = int(bytes(members["cls"]))


class Places:
    """Stands in for a Trainer's place among ranks."""

    def __init__(self, rank: int, world_size: int):
        self.global_rank, self.world_size = rank, world_size


def pictures(path: Any, rank: int = 0, world_size: int = 1, **arguments: Any) -> Pictures:
    arguments = {"global_batch_size": 32, "seed": 1, "num_threads": 2, **arguments}
    stream = Pictures(str(path) if not isinstance(path, list) else path, **arguments)
    stream.trainer = Places(rank, world_size)
    return stream
