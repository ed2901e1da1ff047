"""One rank of :mod:`test_interruption`: steps with a collective each, and a look at every boundary."""

from __future__ import annotations

import json
import os
import random
import sys
import time

import torch
import torch.distributed as dist

from paperscale.training import signals
from paperscale.training.interruption import StopAgreement


def main(told: int, at: int, step_s: float) -> None:
    """Train until the ranks stop; rank ``told`` is told to at boundary ``at``. Print where this one stopped."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    agreement = StopAgreement(store)
    lag = random.Random(rank)
    gradient = torch.ones(1)
    for boundary in range(1, 2000):
        time.sleep(step_s * lag.random())
        dist.all_reduce(gradient)
        if rank == told and boundary == at:
            signals.received = signals.SIGNALS[0]
        if agreement.reached():
            print(json.dumps({"rank": rank, "boundary": boundary, "every": agreement.look_every}), flush=True)
            break
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
