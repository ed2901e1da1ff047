"""Shards: writing, indexing, verifying, ordering and streaming them; the DataModules that feed a model.

Nothing here knows of papers, ranks' networks or jobs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paperscale.data.images import ImageShards
    from paperscale.data.pairs import SegmentPairs
    from paperscale.data.questions import Questions
    from paperscale.data.stream import ShardStream
    from paperscale.data.tagged import TaggedWords
    from paperscale.data.tasks import Choices, LabelledText
    from paperscale.data.text import TokenBlocks, TokenDocuments
    from paperscale.data.webdataset import WebDatasetStream
    from paperscale.data.writer import ShardWriter

__all__ = [
    "Choices",
    "ImageShards",
    "LabelledText",
    "Questions",
    "SegmentPairs",
    "ShardStream",
    "ShardWriter",
    "TaggedWords",
    "TokenBlocks",
    "TokenDocuments",
    "WebDatasetStream",
]

_HOME = {
    "Choices": "tasks",
    "ImageShards": "images",
    "LabelledText": "tasks",
    "Questions": "questions",
    "SegmentPairs": "pairs",
    "ShardStream": "stream",
    "ShardWriter": "writer",
    "TaggedWords": "tagged",
    "TokenBlocks": "text",
    "TokenDocuments": "text",
    "WebDatasetStream": "webdataset",
}


def __getattr__(name: str) -> Any:  # `paperscale data` must not pay for importing torch
    if name in _HOME:
        return getattr(importlib.import_module(f"paperscale.data.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
