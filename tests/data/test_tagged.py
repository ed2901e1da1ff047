"""Words with tags: sentences in their documents, and what a batch holds of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paperscale.data import ShardWriter, TaggedWords
from paperscale.data.faults import SampleFault
from paperscale.data.prepare.conll import TAGS
from paperscale.data.tagged import CONLL_2003, in_context, parts
from tiny_text import tokenizer


def document(number: int, sentences: int) -> dict[str, Any]:
    """Sentences of words, some of which have several pieces, and one that has none of the tokenizer's."""
    rng = np.random.default_rng(number)
    made = []
    for _ in range(sentences):
        words = [f"w{n}" for n in rng.integers(5, 240, rng.integers(1, 12))]
        words = [w + "##260##270" * int(rng.integers(2)) for w in words]
        words[0] = "\u00ad" if number == 2 else words[0]
        made.append({"words": words, "tags": [TAGS[n] for n in rng.integers(0, 9, len(words))]})
    return {"id": f"d{number}", "sentences": made}


DOCUMENTS = [document(number, 1 + 4 * number) for number in range(6)]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of the words in :func:`document`: ``w7##260##270`` has three pieces."""
    from tokenizers import Regex, pre_tokenizers

    fast = tokenizer()._tokenizer
    split = pre_tokenizers.Split(Regex("##[0-9]+"), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    path = tmp_path_factory.mktemp("tokenizer") / "pieces.json"
    path.write_text(fast.to_str())
    return str(path)


def write(folder: Path, documents: list[dict[str, Any]] = DOCUMENTS) -> str:
    with ShardWriter(folder, "tagged", num_processes=0, classes=list(TAGS)) as writer:
        for split in ("train", "val", "test"):
            rows = list(enumerate(documents))
            writer.write(split, rows, lambda of: {"__key__": f"{of[0]:04d}", "json": json.dumps(of[1]).encode()})
    return str(folder)


def test_the_default_tags_are_those_of_the_set():
    assert CONLL_2003 == TAGS


@pytest.mark.parametrize("length", [14, 40, 512])
def test_every_word_is_predicted_once_with_the_most_context(tmp_path, pieces, length):
    data = TaggedWords(write(tmp_path), 2, length, pieces, eval_batch_size=4, num_threads=0)
    seen: dict[str, list[list[str]]] = {}
    for batch in data.val_dataloader():
        assert max(batch["lengths"]) <= length
        assert len(batch["places"]) == len(batch["tag"]) == len(batch["first"])
        assert int(batch["first"].sum()) == sum(map(len, batch["documents"].sizes))
        seen |= batch["documents"].divided([TAGS[tag] for tag in batch["tag"].tolist()])
        words = [w for d in batch["documents"].ids for s in DOCUMENTS[int(d[1:])]["sentences"] for w in s["words"]]
        encoded = data.pieces(words)
        assert batch["tokens"][batch["places"]].tolist() == [word[0] for word in encoded]
        if length == 512:
            assert len(batch["lengths"]) == len(batch["documents"]), "a document that fits is one sequence"
    assert seen == {d["id"]: [s["tags"] for s in d["sentences"]] for d in DOCUMENTS}


def brute_context(begin: int, end: int, tokens: int, room: int) -> int:
    """The least of left and right that any window of the greatest size can give, where both sides have enough."""
    size = min(room, tokens)
    starts = [s for s in range(tokens - size + 1) if s <= begin and end <= s + size]
    return max(min(begin - s, s + size - end) for s in starts)


def test_context_is_as_wide_as_a_sequence_allows_and_even():
    for tokens in (5, 20, 33):
        for begin in range(tokens):
            for end in range(begin + 1, min(tokens, begin + 10) + 1):
                start, stop = in_context(begin, end, tokens, 10)
                assert 0 <= start <= begin
                assert end <= stop <= tokens
                assert stop - start == min(10, tokens)
                assert min(begin - start, stop - end) == brute_context(begin, end, tokens, 10)


def test_a_sentence_longer_than_a_sequence_is_parted_between_words():
    begins = [0, 3, 4, 8, 10, 11, 19]  # words of 3, 1, 4, 2, 1 and 8 tokens
    assert [tuple(part) for part in parts([4, 2], begins, 8)] == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert [tuple(part) for part in parts([4, 0, 2], begins, 100)] == [(0, 4), (4, 6)]


def test_documents_that_are_none_are_named(tmp_path, pieces):
    without = {"id": "x", "sentences": [{"words": ["w5"], "tags": ["B-DOG"]}]}
    with pytest.raises(SampleFault, match="a tag is none of the classes \\('B-DOG'\\)"):
        list(TaggedWords(write(tmp_path / "a", [without]), 1, tokenizer=pieces, num_threads=0).val_dataloader())
    without["sentences"][0]["tags"] = ["O", "O"]
    with pytest.raises(SampleFault, match="it has 1 words and 2 tags"):
        list(TaggedWords(write(tmp_path / "b", [without]), 1, tokenizer=pieces, num_threads=0).val_dataloader())


def test_an_empty_document_is_an_empty_sequence(tmp_path, pieces):
    path = write(tmp_path, [{"id": "x", "sentences": []}])
    (batch,) = TaggedWords(path, 1, tokenizer=pieces, num_threads=0).val_dataloader()
    assert batch["lengths"] == [2]
    assert len(batch["places"]) == 0
    assert batch["documents"].divided([]) == {"x": []}
