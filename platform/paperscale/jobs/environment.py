"""How Lightning learns of the ranks that a job's launcher has started."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import ClusterEnvironment


class JobEnvironment(ClusterEnvironment):
    """Reads rank and address from the environment, for SLURM and the local cluster alike.

    Used in place of Lightning's SLURM environment, which guesses from job names, derives the port from the job's
    number alone, misreads some node lists and requeues from inside a signal handler.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """The launcher has started one process per rank."""
        return True

    @property
    def main_address(self) -> str:
        """Return the address of rank 0's node."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Return the port of the rendezvous."""
        return int(os.environ.get("MASTER_PORT", "29500"))

    @staticmethod
    def detect() -> bool:
        """It is given explicitly, never detected."""
        return False

    def world_size(self) -> int:
        """Return the number of ranks."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def set_world_size(self, size: int) -> None:
        """The launcher has decided."""

    def global_rank(self) -> int:
        """Return this process's rank."""
        return int(os.environ.get("RANK", "0"))

    def set_global_rank(self, rank: int) -> None:
        """The launcher has decided."""

    def local_rank(self) -> int:
        """Return this process's rank on its node."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        """Return this node's number."""
        return int(os.environ.get("NODE_RANK", "0"))
