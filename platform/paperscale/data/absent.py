"""A set that is not on this machine, where only the shapes of its samples matter: for what a training takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paperscale.data.shards import Manifest, Shard, ShardSet

SAMPLES = 1 << 30
"""Of a split that is not there: more than any batch takes."""


class AbsentSet(ShardSet):
    """Answers what a set is asked before a sample is read; has nothing to read.

    Args:
        path: where the set would be.
        split: of it.
        fields: of its samples.
        image: as of :class:`~paperscale.data.shards.Manifest`.
        lengths: sums of its lengths, as of :class:`~paperscale.data.shards.Shard`.
    """

    def __init__(
        self,
        path: str,
        split: str,
        fields: tuple[str, ...],
        image: Mapping[str, Any] | None = None,
        lengths: Mapping[str, int] | None = None,
    ):
        self.path, self.split = path, split
        self.shards = [Shard("absent", SAMPLES, 0, "", dict(lengths or {}))]
        self.manifest = Manifest(Path(path).name, {split: self.shards}, image=dict(image or {}))
        self._fields = fields

    def fields(self) -> tuple[str, ...]:
        """Return the fields of the samples."""
        return self._fields
