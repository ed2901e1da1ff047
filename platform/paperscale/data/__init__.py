"""Shards: writing, indexing, verifying, ordering and streaming them; the DataModules that feed a model.

Nothing here knows of papers, ranks' networks or jobs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paperscale.data.images import ImageShards
    from paperscale.data.stream import ShardStream

__all__ = ["ImageShards", "ShardStream"]


def __getattr__(name: str) -> Any:  # `paperscale data` must not pay for importing torch
    if name == "ImageShards":
        from paperscale.data.images import ImageShards

        return ImageShards
    if name == "ShardStream":
        from paperscale.data.stream import ShardStream

        return ShardStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
