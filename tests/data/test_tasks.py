"""What BERT is fine-tuned on: sentences, pairs, scores and choices, packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paperscale.data import Choices, LabelledText
from paperscale.data.prepare.glue import encode_score
from paperscale.data.tasks import cut
from paperscale.data.tokenizer import FILE, TokenizerFile
from paperscale.data.writer import ShardWriter
from paperscale.errors import UserError
from streams import Places
from tiny_text import choice, labelled, tokenizer, write_text

CLS, SEP = 2, 3
SIZES = {"train": 90, "val": 20, "test": 10}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("pairs"), labelled, SIZES, ["other", "same"], shard_bytes=8_000)


def stream(path: Path, kind: Any = LabelledText, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    made = kind(str(path), **{"global_batch_size": 10, "length": 64, "seed": 1, "num_threads": 0, **options})
    made.trainer = Places(rank, world_size)
    return made


def rows(data: Any, per_sample: int = 1) -> dict[int, tuple[Any, ...]]:
    """Each sample's sequences and label."""
    found = {}
    for batch in data.train_dataloader():
        offsets = batch["offsets"].tolist()
        for row, sample in enumerate(batch["sample"].tolist()):
            spans = [(offsets[n], offsets[n + 1]) for n in range(row * per_sample, (row + 1) * per_sample)]
            found[sample] = ([batch["tokens"][a:b].tolist() for a, b in spans], batch["label"][row].item())
    return found


def test_a_pair_is_framed_and_has_its_label(pairs):
    found = rows(stream(pairs))
    assert sorted(found) == list(range(90))
    for sample, ((tokens,), label) in found.items():
        (first, second), wanted = labelled(("train", sample))
        assert tokens == [CLS, *first, SEP, *second, SEP]
        assert label == wanted


def test_parts_tell_which_segment_a_token_is_of(pairs):
    batch = next(iter(stream(pairs).train_dataloader()))
    start, stop = batch["offsets"][:2].tolist()
    tokens, segment = batch["tokens"][start:stop].tolist(), batch["segment"][start:stop].tolist()
    assert segment == [0] * (tokens.index(SEP) + 1) + [1] * (len(tokens) - tokens.index(SEP) - 1)


@pytest.mark.parametrize(
    ("lengths", "room", "wanted"),
    [([5, 5], 10, [5, 5]), ([9, 3], 8, [5, 3]), ([9, 9], 9, [5, 4]), ([30], 8, [8]), ([2, 50], 8, [2, 6])],
)
def test_the_longer_part_is_cut(lengths, room, wanted):
    parts = [np.arange(length) for length in lengths]
    found = cut(list(parts), room)
    assert [len(part) for part in found] == wanted
    assert all((a == b[: len(a)]).all() for a, b in zip(found, parts, strict=True))


def test_no_sequence_is_longer_than_it_may_be(pairs):
    for (tokens,), _ in rows(stream(pairs, length=16)).values():
        assert len(tokens) <= 16
        assert tokens.count(SEP) == 2


def test_few_labels_are_the_same_on_any_number_of_ranks_and_others_with_another_seed(pairs):
    alone = rows(stream(pairs, train_samples=20))
    assert len(alone) == 20
    together = rows(stream(pairs, rank=0, world_size=2, train_samples=20))
    together |= rows(stream(pairs, rank=1, world_size=2, train_samples=20))
    assert together == alone
    assert rows(stream(pairs, train_samples=20, seed=2)) != alone
    texts = sorted(str(row) for row in alone.values())
    assert sorted(str(row) for row in rows(stream(pairs, train_samples=20, seed=2, subset=1)).values()) == texts
    everything = {str(row) for row in rows(stream(pairs)).values()}
    assert set(texts) <= everything


def test_few_labels_leave_validation_whole(pairs):
    data = stream(pairs, train_samples=20)
    assert sum(len(batch["sample"]) for batch in data.val_dataloader()) == 20 == SIZES["val"]


def test_more_labels_than_there_are_are_refused(pairs):
    with pytest.raises(UserError, match=r"data.train_samples=91: .* has 90 in 'train'"):
        stream(pairs, train_samples=91).check()


def test_choices_follow_each_other(tmp_path):
    path = write_text(tmp_path / "choices", choice, SIZES, "0123")
    for sample, (sequences, label) in rows(stream(path, Choices), 4).items():
        (context, *endings), wanted = choice(("train", sample))
        assert sequences == [[CLS, *context, SEP, *ending, SEP] for ending in endings]
        assert label == wanted


def test_another_number_of_endings_is_named(tmp_path):
    path = write_text(tmp_path / "choices", choice, SIZES, "0123")
    with pytest.raises(UserError, match=r"4 endings, and data.choices=3; set that"):
        rows(stream(path, Choices, choices=3), 3)


def test_scores_are_numbers(tmp_path):
    from paperscale.data.prepare.glue import Example

    (file := tmp_path / FILE).write_text(tokenizer().to_json())
    with ShardWriter(tmp_path / "scores", "scores", num_processes=0) as writer:
        writer.attach(FILE, file.read_bytes())
        samples = [
            encode_score((f"{n:04d}", Example(("w5 w6", "w7"), str(n / 2))), TokenizerFile.at(file)) for n in range(8)
        ]
        writer.write("train", samples)
    batch = next(iter(stream(tmp_path / "scores", val=None).train_dataloader()))
    assert batch["label"].dtype == torch.float32
    assert sorted(batch["label"].tolist()) == [n / 2 for n in range(8)]
    assert batch["tokens"][: batch["lengths"][0]].tolist() == [CLS, 5, 6, SEP, 7, SEP]


def test_a_split_without_labels_is_named(tmp_path):
    with ShardWriter(tmp_path / "scores", "scores", num_processes=0) as writer:
        writer.attach(FILE, tokenizer().to_json().encode())
        content = {"sentences": ["w5"], "tokens": [[5]], "score": None}
        writer.write("train", [{"__key__": "0", "json": json.dumps(content).encode()}])
    with pytest.raises(Exception, match="it has no label"):
        next(iter(stream(tmp_path / "scores", val=None).train_dataloader()))
