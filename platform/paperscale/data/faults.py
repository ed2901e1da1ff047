"""Damaged samples: what is said of them, and whether the run goes on without them."""

from __future__ import annotations

from typing import NamedTuple

from paperscale.errors import UserError


class SampleFault(UserError):
    """A sample that cannot be read or decoded.

    Args:
        shard: the tar.
        key: the sample's key, or ``row N`` where the index itself cannot be read.
        reason: what is wrong, with the member and its offset.
    """

    def __init__(self, shard: str, key: str, reason: str):
        self.shard, self.key, self.reason = shard, key, reason
        super().__init__(
            f"{self.what}; `paperscale data verify` lists all damage: copy the shard again or make the set again, "
            "or go on without such samples with data.on_fault=skip"
        )

    @property
    def what(self) -> str:
        """Return what is wrong, without the advice."""
        return f"{self.shard}: sample '{self.key}': {self.reason}"

    def __reduce__(self) -> tuple[type[SampleFault], tuple[str, str, str]]:  # crosses from worker processes
        return SampleFault, (self.shard, self.key, self.reason)


class RemoteError(UserError):
    """The server does not give what it should: nothing is wrong with the sample that was to be read."""


class Skipped(NamedTuple):
    """A sample that was left out of a batch.

    Attributes:
        sample: its number in the split.
        message: what was wrong with it.
    """

    sample: int
    message: str


class FaultLog:
    """Counts the samples that were skipped, and ends the run where there are too many.

    Args:
        most: samples that may be skipped, each counted once however often it is met.
    """

    def __init__(self, most: int):
        self.most = most
        self.times: dict[int, int] = {}

    def record(self, faults: tuple[Skipped, ...]) -> list[str]:
        """Count the faults of a batch that was trained on; return the messages of samples not met before.

        Raises:
            UserError: more samples than ``most`` have been skipped.
        """
        new = [fault.message for fault in faults if fault.sample not in self.times]
        for fault in faults:
            self.times[fault.sample] = self.times.get(fault.sample, 0) + 1
        if len(self.times) > self.most:
            raise UserError(
                f"{len(self.times)} samples could not be read, at most {self.most} may be skipped "
                f"(data.max_skipped); the last: {faults[-1].message}"
            )
        return new
