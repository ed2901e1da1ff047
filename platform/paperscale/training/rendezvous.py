"""Bringing the ranks together, and seeing before step 0 whether they can work together."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paperscale.errors import BadNode, LostRank
from paperscale.training.pulse import LISTEN

TIMEOUT_S = 120.0
"""Seconds for all ranks to appear."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A last resort: the node's agent notices a hang long before."""
_ROUNDS = 3
_CLOCK_S = 5.0


@dataclass(frozen=True)
class Preflight:
    """What the ranks have measured before step 0.

    Attributes:
        ranks: in the job.
        hosts: node names, in the order of the ranks.
        clock_s: largest difference between two nodes' clocks.
        all_reduce_gb_s: bus bandwidth of an all-reduce, 10^9 bytes a second.
        joined_s: seconds until all ranks had appeared.
        device: what the ranks compute on.
        warnings: each ends in the fix.
    """

    ranks: int
    hosts: list[str]
    clock_s: float
    all_reduce_gb_s: float
    joined_s: float
    device: str
    warnings: list[str]

    def facts(self) -> dict[str, Any]:
        """Return it for ``preflight.json``."""
        return asdict(self)

    def __str__(self) -> str:
        if self.ranks == 1:
            return f"preflight: 1 rank on {self.hosts[0]} ({self.device})"
        nodes = len(set(self.hosts))
        return (
            f"preflight: {self.ranks} ranks on {nodes} node{'s' * (nodes > 1)} ({self.device}), together after "
            f"{self.joined_s:.1f} s, clocks within {1000 * self.clock_s:.0f} ms, "
            f"all-reduce {self.all_reduce_gb_s:.2f} GB/s"
        )


def join(rank: int, world_size: int, on_gpu: bool, timeout_s: float = TIMEOUT_S) -> dist.Store:
    """Connect this rank to the others, and make the default process group.

    Args:
        rank: of this process.
        world_size: number of ranks.
        on_gpu: whether they compute on GPUs.
        timeout_s: seconds for all ranks to appear.

    Returns:
        The store that all ranks share.

    Raises:
        LostRank: ranks have not appeared in time; names them.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listen = os.environ.pop(LISTEN, None)
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=None if listen is None else int(listen),
        )
        _wait_for_all(store, rank, world_size, timeout_s)
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
        )
    except dist.DistError as error:
        raise LostRank(f"rank 0 at {address}:{port} cannot be reached: {' '.join(str(error).split())[:200]}") from error
    return store


def alone(on_gpu: bool) -> None:
    """Make a process group of this process alone, for strategies that need one."""
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def _wait_for_all(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
    names = [f"paperscale/here/{other}" for other in range(world_size)]
    store.set(names[rank], socket.gethostname())
    try:
        store.wait(names, timedelta(seconds=timeout_s))
    except dist.DistStoreError as error:
        missing = [other for other, name in enumerate(names) if not store.check([name])]
        raise LostRank(
            f"ranks {', '.join(map(str, missing))} of {world_size} have not appeared within {timeout_s:.0f} s; "
            "see their logs, or whether their nodes can reach this one"
        ) from error


def preflight(world_size: int, on_gpu: bool, joined_s: float) -> Preflight:
    """Check the device and what lies between the ranks; called on all ranks, after :func:`join`.

    Raises:
        BadNode: this rank's device computes wrongly; names it.
    """
    host = socket.gethostname()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    _check_device(device, host)
    if world_size == 1:
        return Preflight(1, [host], 0.0, 0.0, joined_s, str(device), [])
    dist.barrier()
    told: list[tuple[str, float]] = [("", 0.0)] * world_size
    dist.all_gather_object(told, (host, time.time()))  # right after a barrier: the clocks' difference, and a little
    clocks = [clock for _, clock in told]
    skew = max(clocks) - min(clocks)
    warnings = []
    if skew > _CLOCK_S:
        first, last = told[clocks.index(min(clocks))][0], told[clocks.index(max(clocks))][0]
        warnings.append(
            f"the clocks of {first} and {last} are {skew:.1f} s apart: heartbeats and logs will look stale; "
            "ask the administrator to start chrony or ntpd there"
        )
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    return Preflight(world_size, [h for h, _ in told], skew, _bandwidth(device, world_size), joined_s, name, warnings)


def _check_device(device: torch.device, host: str) -> None:
    """Multiply two matrices whose product is known."""
    if device.type == "cpu":
        return
    ones = torch.ones(1024, 1024, device=device)
    if not torch.equal(ones @ ones, torch.full_like(ones, 1024.0)):
        raise BadNode(f"{device} of {host} computes wrongly; tell the administrator")


def _bandwidth(device: torch.device, world_size: int) -> float:
    """Return the bus bandwidth of an all-reduce in GB/s: 2 (n - 1) / n bytes are moved for each byte reduced."""
    numbers = torch.ones((64 << 20 if device.type == "cuda" else 1 << 20) // 4, device=device)
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * (world_size - 1) / world_size * numbers.nbytes / best / 1e9
