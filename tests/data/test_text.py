"""Token shards and the DataModules of text."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from paperscale.data import TokenBlocks, TokenDocuments
from paperscale.data.faults import SampleFault
from paperscale.data.index import load
from paperscale.data.shards import ShardSet
from paperscale.data.tokens import Document, TokenSet, write_tokens
from paperscale.data.writer import ShardWriter
from paperscale.errors import UserError


def article(number: int) -> Document:
    """A document of 1 to 4 sentences; the first token tells which one it is."""
    rng = np.random.default_rng(number)
    sentences = [rng.integers(0, 5000, rng.integers(1, 400)) for _ in range(1 + number % 4)]
    sentences[0][0] = number
    return Document(sentences, number % 3)


def pair(number: int) -> Document:
    rng = np.random.default_rng(number)
    size = int(rng.integers(1, 60))
    return Document([rng.integers(1, 300, size), rng.integers(1, 300, max(1, size + int(rng.integers(-3, 4))))])


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("articles")
    with ShardWriter(folder, "articles", shard_bytes=300_000, num_processes=0) as writer:
        write_tokens(writer, "train", range(1200), article, 5000)
        write_tokens(writer, "val", range(100), article, 5000)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    with ShardWriter(folder, "pairs", shard_bytes=200_000, num_processes=0) as writer:
        write_tokens(writer, "train", range(6000), pair, 300)
        write_tokens(writer, "val", range(101), pair, 300)
    return folder


def text_of(numbers: range) -> np.ndarray:
    return np.concatenate([sentence for number in numbers for sentence in article(number).sentences])


def test_documents_come_back(articles):
    shards = ShardSet(articles, "train")
    tokens = TokenSet(shards)
    number = 0
    for shard, size in enumerate(tokens.sizes("documents")):
        for row in range(size):
            sentences, label = tokens.document(shard, row)
            expected = article(number)
            assert label == expected.label
            assert [s.tolist() for s in sentences] == [s.tolist() for s in expected.sentences]
            number += 1
    assert number == 1200
    assert len(shards.shards) > 2


def test_webdataset_reads_token_shards(articles):
    urls = [str(path) for path in sorted(articles.glob("train-*.tar"))]
    chunks = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert np.array_equal(np.concatenate([chunk["tokens.npy"] for chunk in chunks]), text_of(range(1200)))
    assert chunks[0]["tokens.npy"].dtype == np.uint16


def test_a_killed_writer_of_documents_goes_on(tmp_path, articles):
    asked = []

    def failing(number):
        asked.append(number)
        if number == 900:
            raise KeyboardInterrupt
        return article(number)

    with pytest.raises(KeyboardInterrupt):
        write_tokens(ShardWriter(tmp_path, "articles", shard_bytes=300_000, num_processes=0), "train", range(1200),
                     failing, 5000)  # fmt: skip
    asked.clear()
    with ShardWriter(tmp_path, "articles", shard_bytes=300_000, num_processes=0) as writer:
        write_tokens(writer, "train", range(1200), lambda n: asked.append(n) or article(n), 5000)
    assert 0 < asked[0] < 900
    for tar in articles.glob("train-*.tar"):
        assert (tmp_path / tar.name).read_bytes() == tar.read_bytes()


def test_blocks_hold_the_text_without_padding_or_loss(articles):
    stream = TokenBlocks(str(articles), 16, length=100, val=None, seed=1)
    text = text_of(range(1200))
    seen = {}
    for batch in stream.train_dataloader():
        for sample, tokens in zip(batch["sample"].tolist(), batch["tokens"], strict=True):
            seen[sample] = tokens.numpy()
    assert sorted(seen) == list(range(len(text) // 100))
    assert np.array_equal(np.concatenate([seen[n] for n in sorted(seen)]), text[: len(seen) * 100])


def test_targets_and_segments(articles):
    stream = TokenBlocks(str(articles), 16, length=512, next_token=True, segments=True, val=None, seed=1)
    text = text_of(range(1200))
    ends = np.cumsum([sum(map(len, article(n).sentences)) for n in range(1200)])
    batch = next(iter(stream.train_dataloader()))
    for row, sample in enumerate(batch["sample"].tolist()):
        start = sample * 512
        places = np.arange(start, start + 512)
        document = np.searchsorted(ends, places, side="right")
        assert np.array_equal(batch["segment"][row], document - document[0])
        begins = np.maximum(np.concatenate([[0], ends])[document], start)
        assert np.array_equal(batch["position"][row], places - begins)
        last = np.isin(places + 1, ends)
        assert np.array_equal(batch["targets"][row], np.where(last, -100, text[places + 1]))
    assert batch["segment"].max() > 0
    tokens = batch["tokens"].flatten()
    parts = [tokens[a:b] for a, b in pairwise(batch["offsets"].tolist())]
    assert [len(part) for part in parts] == batch["lengths"]
    numbers = (512 * np.arange(16)[:, None] + batch["segment"].numpy()).ravel()
    assert [part.tolist() for part in parts] == [tokens[numbers == n].tolist() for n in np.unique(numbers)]
    full = stream.full_batch(3)
    assert (full["lengths"], full["offsets"].tolist()) == ([512] * 3, [0, 512, 1024, 1536])
    assert full["position"].tolist() == [list(range(512))] * 3


@pytest.mark.parametrize("world", [1, 3])
def test_batches_by_tokens_hold_every_pair_once(pairs, world, monkeypatch):
    steps: dict[int, list[int]] = {}
    for rank in range(world):
        stream = TokenDocuments(
            str(pairs), fields=["source", "target"], max_tokens=500, val=None, seed=1, num_threads=2
        )
        monkeypatch.setattr(stream, "_rank", lambda rank=rank: (rank, world))
        for batch in stream.train_dataloader():
            kept = batch["sample"].tolist() if batch["cursor"].weight else []
            steps.setdefault(batch["cursor"].consumed, []).extend(kept)
            for row, number in enumerate(batch["sample"].tolist()):
                source, target = pair(number).sentences
                assert batch["source"][row, : len(source)].tolist() == source.tolist()
                assert batch["target_length"][row] == len(target)
                assert not batch["target"][row, len(target) :].any()
    assert sorted(sample for step in steps.values() for sample in step) == list(range(6000))
    for samples in steps.values():
        assert sum(len(pair(n).sentences[0]) for n in samples) <= 500


def test_one_field_takes_a_whole_document_with_its_label(articles):
    batch = next(iter(TokenDocuments(str(articles), 8, fields=["text"], val=None).train_dataloader()))
    for row, number in enumerate(batch["sample"].tolist()):
        expected = np.concatenate(article(number).sentences)
        assert batch["text"][row, : len(expected)].tolist() == expected.tolist()
        assert batch["text_length"][row] == len(expected)
        assert batch["label"][row] == number % 3


def test_documents_of_another_number_of_sentences_are_refused(articles):
    with pytest.raises(UserError, match="do not all have 2 sentences"):
        next(iter(TokenDocuments(str(articles), 8, fields=["a", "b"], val=None).train_dataloader()))


def test_passes_of_a_batch_by_tokens_are_of_like_size(pairs):
    stream = TokenDocuments(
        str(pairs), fields=["source", "target"], max_tokens=2000, micro_tokens=500, val=None, seed=1, window=2000
    )
    found = list(stream.train_dataloader())
    assert stream.accumulate(1) == 4
    tokens = [max(int(batch["source_length"].sum()), int(batch["target_length"].sum())) for batch in found]
    assert max(tokens) < 500 + 63, "by less than a document"
    for batch in found:
        if batch["cursor"].last:
            assert batch["cursor"].consumed > 0
    assert sorted(n for b in found if b["cursor"].weight for n in b["sample"].tolist()) == list(range(6000))


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_damaged_documents_are_skipped_and_counted(pairs, tmp_path, max_tokens):
    folder = Path(shutil.copytree(pairs, tmp_path / "pairs"))
    index = load(folder / "train-000001.tar")
    offset = int(index.members[0, index.fields.index("tokens.npy")]["offset"])
    with (folder / "train-000001.tar").open("r+b") as file:
        file.seek(offset + 300)
        file.write(b"damaged")
    arguments = {"fields": ["source", "target"], "max_tokens": max_tokens, "val": None}
    with pytest.raises(SampleFault, match=r"train-000001\.tar: sample 'train-\d+': member 'tokens.npy'"):
        list(TokenDocuments(str(folder), **arguments).train_dataloader())
    stream = TokenDocuments(str(folder), on_fault="skip", max_skipped=6000, **arguments)
    seen = []
    for batch in stream.train_dataloader():
        seen += batch["sample"].tolist() if batch["cursor"].weight else []
        stream.advance(batch["cursor"])
    assert len(stream.faults.times) == index.lengths["documents"][0]
    assert sorted([*seen, *stream.faults.times]) == list(range(6000))


def test_sets_of_different_tokenizers_are_not_mixed(articles, tmp_path):
    with ShardWriter(tmp_path / "other", "other", num_processes=0) as writer:
        writer.attach("tokenizer.json", b"{}")
        write_tokens(writer, "train", range(9), article, 5000)
    with pytest.raises(UserError, match="have different tokenizers: their numbers mean different tokens"):
        TokenBlocks([str(articles), str(tmp_path / "other")], 8, val=None).train_dataloader()


def test_labelled_and_unlabelled_documents_are_not_mixed(articles, pairs):
    stream = TokenDocuments([str(articles), str(pairs)], 8, fields=["text"], val=None)
    with pytest.raises(UserError, match=r"pairs\d+ have no labels, others have"):
        next(iter(stream.train_dataloader()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": -5}, "data.max_tokens must be at least 1, not -5"),
        ({"max_length": 0}, "data.max_length must be at least 1"),
        ({"micro_tokens": 5}, "data.micro_tokens divides data.max_tokens"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be at least 1"),
        ({"num_threads": -1}, "data.num_threads must be at least 0"),
        ({"max_skipped": -1}, "data.max_skipped must be at least 0"),
        ({"epoch_samples": 10}, "data.epoch_samples is for mixtures"),
    ],
)
def test_numbers_that_make_no_sense(arguments, message, pairs):
    with pytest.raises(UserError, match=re.escape(message)):
        TokenDocuments(str(pairs), **arguments)


def test_long_sentences_are_cut(pairs):
    stream = TokenDocuments(str(pairs), 64, fields=["source", "target"], max_length=20, val=None)
    batch = next(iter(stream.train_dataloader()))
    assert batch["source"].shape == (64, 20)
    assert int(batch["source_length"].max()) == 20


def test_validation_visits_every_document_once(pairs):
    loader = TokenDocuments(str(pairs), fields=["source", "target"], eval_batch_size=25).val_dataloader()
    assert torch.cat([batch["sample"] for batch in loader]).tolist() == list(range(101))


def test_a_set_of_images_is_not_text(tiny_shards):
    with pytest.raises(UserError, match="holds no token shards; make them with"):
        TokenBlocks(str(tiny_shards), 8, val=None).train_dataloader()


def test_too_little_text_for_a_block(articles):
    with pytest.raises(UserError, match=r"fewer than one block of data\.length=10000000"):
        TokenBlocks(str(articles), 8, length=10_000_000, val=None).train_dataloader()


def test_a_token_outside_the_vocabulary(tmp_path):
    writer = ShardWriter(tmp_path, "articles", num_processes=0)
    with pytest.raises(UserError, match="in a vocabulary of 300; use the tokenizer of this set"):
        write_tokens(writer, "train", range(5), article, 300)


def test_large_vocabularies_take_four_bytes(tmp_path):
    with ShardWriter(tmp_path, "large") as writer:
        write_tokens(writer, "train", range(5), lambda n: Document([[n, 70_000]]), 100_000)
    assert TokenSet(ShardSet(tmp_path, "train")).chunk(0, 0).tokens.dtype == np.uint32
