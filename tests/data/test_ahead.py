"""What a remote folder is asked for beforehand: the rows that are read, whatever a sample is of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paperscale.data import LabelledText, SegmentPairs, TokenBlocks, TokenDocuments
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Source
from streams import Places
from tiny_text import article, labelled, write_text


@pytest.mark.parametrize(
    ("kind", "encode", "options"),
    [
        (SegmentPairs, article, {"length": 32, "next_sentence": "order"}),
        (LabelledText, labelled, {"train_samples": 40}),
        (LabelledText, labelled, {}),
        (TokenBlocks, article, {"length": 32}),
        (TokenDocuments, labelled, {"fields": ["first", "second"]}),
    ],
)
def test_what_is_read_was_asked_for_before(kind: Any, encode: Any, options: Any, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("paperscale.data.tokens.CHUNK", 512)
    path = write_text(tmp_path / "set", encode, {"train": 200, "val": 10, "test": 10}, shard_bytes=30_000)
    data = kind(str(path), global_batch_size=8, seed=1, num_threads=0, **options)
    data.trainer = Places(0, 1)
    asked: set[tuple[int, int]] = set()
    read = ShardSet.read
    late = []

    def reading(self: ShardSet, shard: int, row: int, *fields: Any) -> Any:
        late.extend([(shard, row)] if not fields and (shard, row) not in asked else [])
        return read(self, shard, row, *fields)

    monkeypatch.setattr(ShardSet, "prefetch", lambda self, samples: asked.update(samples))
    monkeypatch.setattr(Source, "is_remote", property(lambda self: True))
    monkeypatch.setattr("paperscale.data.stream.ThreadPoolExecutor", AtOnce)
    loader = data.train_dataloader()
    late.clear()
    monkeypatch.setattr(ShardSet, "read", reading)
    for _ in loader:
        pass
    sizes = data.source("train").sets[0].sizes
    assert len(sizes) > 1
    assert max(sizes) > 1
    assert asked
    assert all(row < sizes[shard] for shard, row in asked)
    assert not late


class AtOnce:
    """An executor that does the work when it is given it."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def submit(self, work: Any, *arguments: Any) -> None:
        work(*arguments)

    def shutdown(self, **_: Any) -> None:
        pass
