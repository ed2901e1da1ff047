"""What BERT is pre-trained on: spans, pairs and masks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paperscale.data import SegmentPairs
from paperscale.data.masking import Masking, Vocabulary, mask
from paperscale.data.shards import ShardSet
from paperscale.data.spans import Spans, spans_of
from paperscale.data.tokens import Document, TokenSet
from paperscale.errors import UserError
from streams import Places
from tiny_text import CONTINUES, SPECIAL, VOCABULARY, article, tokenizer, write_text

CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), sizes={"train": 400, "val": 40, "test": 12}, shard_bytes=40_000)


def stream(path: Path, rank: int = 0, world_size: int = 1, **options: Any) -> SegmentPairs:
    made = SegmentPairs(str(path), **{"global_batch_size": 16, "length": 48, "seed": 1, "num_threads": 0, **options})
    made.trainer = Places(rank, world_size)  # type: ignore[assignment]
    return made


def sequences(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a batch, each with its parts and what it has to predict."""
    found, offsets = [], batch["offsets"].tolist()
    for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
        here = (batch["places"] >= start) & (batch["places"] < stop)
        tokens = batch["tokens"][start:stop].clone()
        tokens[batch["places"][here] - start] = batch["targets"][here]
        found.append(
            {
                "seen": batch["tokens"][start:stop].tolist(),
                "tokens": tokens.tolist(),
                "segment": batch["segment"][start:stop].tolist(),
                "position": batch["position"][start:stop].tolist(),
                "places": (batch["places"][here] - start).tolist(),
                "label": int(batch["label"][row]) if "label" in batch else None,
                "sample": int(batch["sample"][row]),
                "share": batch["share"][here].tolist(),
            }
        )
    return found


def epoch_of(data: SegmentPairs) -> list[dict[str, Any]]:
    return [sequence for batch in data.train_dataloader() for sequence in sequences(batch)]


def parts(sequence: dict[str, Any]) -> tuple[list[int], list[int]]:
    """A and B without the special tokens."""
    tokens, end = sequence["tokens"], sequence["tokens"].index(SEP)
    assert tokens[0] == CLS
    assert tokens[-1] == SEP
    return tokens[1:end], tokens[end + 1 : -1]


def documents(count: int = 400) -> list[Document]:
    return [article(("train", number)) for number in range(count)]


def whole(document: Document) -> str:
    return " " + " ".join(str(token) for sentence in document.sentences for token in np.asarray(sentence)) + " "


def where(part: list[int], texts: list[str]) -> list[int]:
    wanted = " " + " ".join(map(str, part)) + " "
    return [number for number, text in enumerate(texts) if wanted in text]


# -- spans ---------------------------------------------------------------------------------------------------


def test_a_span_ends_with_the_sentence_that_fills_it_or_with_its_document():
    documents, sentences = np.array([4, 5, 7]), np.array([10, 20, 25, 60, 62, 70, 74])
    assert spans_of(documents, sentences, 20).tolist() == [0, 2, 4, 5, 7]


def test_every_sentence_is_in_one_span_of_its_document(text):
    tokens = TokenSet(ShardSet(text, "train"))
    spans, found = Spans(tokens, 45), []
    for shard, count in enumerate(spans.sizes):
        for number in range(count):
            span = spans[shard, number]
            chunk = tokens.chunk(shard, span.chunk)
            ends = [0, *chunk.documents[:, 1].tolist()]
            assert ends[span.document] <= span.first < span.stop <= ends[span.document + 1]
            found += [(shard, span.chunk, sentence) for sentence in range(span.first, span.stop)]
    assert len(found) == len(set(found)) == sum(len(document.sentences) for document in documents())


def test_the_number_of_spans_is_kept_beside_the_shards(tmp_path):
    data = stream(write_text(tmp_path / "text"))
    size = len(epoch_of(data))
    (kept,) = (tmp_path / "text").glob("spans-*.npy")
    assert np.load(kept).sum() >= size
    kept.write_bytes(b"no array")
    assert len(epoch_of(stream(tmp_path / "text"))) == size


# -- pairs ---------------------------------------------------------------------------------------------------


def test_b_follows_a_or_is_of_another_document(text):
    texts = [whole(document) for document in documents()]
    for sequence in epoch_of(stream(text, length=64, short_sequences=0.0, mask_mix=[0, 1, 0])):
        first, second = parts(sequence)
        if min(len(first), len(second)) < 3 or len(sequence["tokens"]) == 64:
            continue  # too short to tell documents by, or cut
        if sequence["label"] == 0:
            assert where(first + second, texts)
        else:
            assert not set(where(first, texts)) & set(where(second, texts))


def test_half_of_the_pairs_are_the_next_and_lonely_sentences_never_are(text):
    """Of spans of several sentences; a span of one sentence cannot be followed by anything (A.2)."""
    data = stream(text)
    labels: Counter[tuple[bool, int]] = Counter()
    for _ in range(12):
        spans = data.spans(data.shards("train"))
        starts = np.cumsum([0, *spans.sizes])
        for sequence in epoch_of(data):
            shard = int(starts.searchsorted(sequence["sample"], side="right")) - 1
            span = spans[shard, sequence["sample"] - int(starts[shard])]
            labels[span.stop - span.first > 1, sequence["label"]] += 1
        data.consumed += len(data._order_and_batches()[1])
    several = labels[True, 0] + labels[True, 1]
    assert several > 4000
    assert abs(labels[True, 1] - several / 2) < 3 * math.sqrt(several / 4)
    assert labels[False, 0] == 0 < labels[False, 1]


def test_a_sequence_is_framed_and_no_longer_than_it_may_be(text):
    short = 0
    for sequence in epoch_of(stream(text)):
        first, second = parts(sequence)
        assert len(sequence["tokens"]) <= 48
        assert sequence["segment"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert sequence["position"] == list(range(len(sequence["tokens"])))
        assert not {CLS, SEP} & {*first, *second}
        short += len(sequence["tokens"]) < 40
    assert short > 20


def test_the_longer_segment_is_cut_at_both_ends(text):
    texts = [whole(document) for document in documents()]
    full = [s for s in epoch_of(stream(text, short_sequences=0.0)) if len(s["tokens"]) == 48]
    assert len(full) > 100
    for sequence in full[:100]:
        for part in parts(sequence):
            assert where(part, texts)


def test_order_is_what_is_predicted_instead(text):
    texts = [whole(document) for document in documents()]
    labels: Counter[int] = Counter()
    for sequence in epoch_of(stream(text, length=400, next_sentence="order", short_sequences=0.0)):
        first, second = parts(sequence)
        labels[sequence["label"]] += 1
        assert where(first + second if sequence["label"] == 0 else second + first, texts)
    assert min(labels.values()) > 0.4 * sum(labels.values())


def test_without_next_sentence_there_is_one_segment(text):
    (batch, *_) = stream(text, next_sentence="none").train_dataloader()
    assert "label" not in batch
    assert not batch["segment"].any()
    assert all(sequence["tokens"].count(SEP) == 1 for sequence in sequences(batch))


def test_left_to_right_each_token_predicts_the_next(text):
    data = stream(text, next_sentence="none", objective="left-to-right")
    for sequence in sequences(next(iter(data.train_dataloader()))):
        assert sequence["places"] == list(range(len(sequence["seen"]) - 1))
        assert MASK not in sequence["seen"]
    batch = next(iter(data.train_dataloader()))
    start, stop = batch["offsets"][:2].tolist()
    assert batch["targets"][: stop - 1].tolist() == batch["tokens"][start + 1 : stop].tolist()


# -- what a batch depends on ---------------------------------------------------------------------------------


def by_sample(data: SegmentPairs) -> dict[int, dict[str, Any]]:
    return {sequence["sample"]: sequence for sequence in epoch_of(data)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_sample_is_the_same_on_any_number_of_ranks(text, world_size):
    alone, together = by_sample(stream(text)), {}
    for rank in range(world_size):
        together |= by_sample(stream(text, rank, world_size, num_threads=2))
    assert together == alone


def test_it_differs_in_each_epoch_and_repeats_after_its_duplicates(text):
    def epochs(count: int, **options: Any) -> list[dict[int, dict[str, Any]]]:
        data, found = stream(text, **options), []
        for _ in range(count):
            found.append(by_sample(data))
            data.consumed += len(data._order_and_batches()[1])
        return found

    first, second = epochs(2)
    assert first.keys() == second.keys()
    assert sum(first[n] == second[n] for n in first) < 0.05 * len(first)
    first, second, third = epochs(3, duplicates=2)
    assert first == third != second


def test_validation_is_masked_alike_each_time(text):
    data = stream(text)
    first, second = ([sequences(batch) for batch in data.val_dataloader()] for _ in range(2))
    assert first == second


def test_a_damaged_chunk_is_left_out_of_a_batch(tmp_path):
    folder = write_text(tmp_path / "text", sizes={"train": 2000, "val": 10, "test": 10}, shard_bytes=1 << 30)
    whole_ = by_sample(stream(folder))
    shard = ShardSet(folder, "train")
    assert shard.sizes[0] > 1
    index = shard.opened(0)[0]
    offset = int(index.members[1]["offset"][list(index.fields).index("tokens.npy")])
    tar = folder / shard.shards[0].name
    content = bytearray(tar.read_bytes())
    content[offset + 1000] ^= 1
    tar.write_bytes(content)
    found = by_sample(stream(folder, on_fault="skip", max_skipped=10_000))
    assert 0 < len(found) < len(whole_)
    assert all(whole_[sample] == sequence for sample, sequence in found.items())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"next_sentence": "nsp"}, "choose random, order, none"),
        ({"objective": "left-to-rigth"}, "did you mean 'left-to-right'"),
        ({"mask_rate": 1.5}, "data.mask_rate=1.5"),
        ({"mask_mix": [0.8, 0.1, 0.2]}, "add up to 1"),
        ({"length": 4}, "data.length must be at least 8"),
        ({"short_sequences": -1}, "data.short_sequences=-1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_does(text, options, what):
    with pytest.raises(UserError, match=what):
        stream(text, **options)


def test_a_shard_of_a_single_document_is_refused(tmp_path):
    folder = write_text(tmp_path / "text", sizes={"train": 1, "val": 4, "test": 4})
    with pytest.raises(UserError, match=r"a single document.*data.next_sentence=order"):
        stream(folder).train_dataloader()


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    from paperscale.data.tokenizer import FILE, Tokenizer, _bytes
    from paperscale.data.tokens import write_tokens
    from paperscale.data.writer import ShardWriter

    with ShardWriter(tmp_path / "text", "bytes", num_processes=0) as writer:
        writer.attach(FILE, Tokenizer(_bytes()).to_json().encode())
        write_tokens(writer, "train", range(4), lambda n: Document([np.arange(20)]), 256)
    with pytest.raises(UserError, match="no token for 'begin'"):
        next(iter(stream(tmp_path / "text", val=None).train_dataloader()))


# -- masks ---------------------------------------------------------------------------------------------------


def vocabulary() -> Vocabulary:
    return Vocabulary.of(tokenizer())


def masked(lengths: np.ndarray, how: Masking, seed: int = 0) -> tuple[np.ndarray, Any]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(len(SPECIAL), VOCABULARY, lengths.sum())
    ends = np.cumsum(lengths)
    tokens[ends - lengths], tokens[ends - 1] = CLS, SEP
    numbers = np.arange(len(lengths))
    return tokens, mask(tokens, lengths, how, vocabulary(), seed, numbers * 0, numbers)


def chi_square(found: np.ndarray, shares: np.ndarray) -> float:
    wanted = shares * found.sum()
    return float(((found - wanted) ** 2 / wanted).sum())


def test_masks_have_the_shares_of_the_paper_over_a_million_tokens():
    lengths = np.full(8000, 128)
    tokens, found = masked(lengths, Masking())
    assert len(tokens) > 10**6
    assert (found.counts == 19).all()  # 15 % of 128, special tokens counted
    assert not np.isin(found.targets, (CLS, SEP)).any()
    seen = found.tokens[found.places]
    kinds = np.array([(seen == MASK).sum(), (seen == found.targets).sum()])
    rest = len(seen) - kinds.sum()
    same = 0.1 + 0.1 / VOCABULARY  # a random token is now and then the right one
    mask_share = 0.8 + 0.1 / VOCABULARY
    shares = np.array([mask_share, same, 1 - mask_share - same])
    assert chi_square(np.array([*kinds, rest]), shares) < 13.8, "p > 0.001, 2 degrees of freedom"
    random = seen[(seen != MASK) & (seen != found.targets)]
    others = np.delete(np.bincount(random, minlength=VOCABULARY), MASK)
    spread = chi_square(others, np.full(VOCABULARY - 1, 1 / (VOCABULARY - 1)))
    assert spread < VOCABULARY + 4 * math.sqrt(2 * VOCABULARY), "uniform over the vocabulary"
    places = np.bincount(found.places % 128, minlength=128)[1:-1]
    assert chi_square(places, np.full(126, 1 / 126)) < 126 + 4 * math.sqrt(2 * 126), "uniform over the places"
    untouched = np.delete(np.arange(len(tokens)), found.places)
    assert (found.tokens[untouched] == tokens[untouched]).all()


@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.0, 0.2, 0.8), (0.0, 0.0, 1.0)])
def test_other_mixes_of_table_8(mix):
    _, found = masked(np.full(500, 100), Masking(mix=mix))
    seen = found.tokens[found.places]
    assert abs(float((seen == MASK).mean()) - mix[0]) < 0.02
    assert abs(float((seen == found.targets).mean()) - mix[1]) < 0.02


def test_at_least_one_token_is_predicted_and_at_most_so_many():
    _, found = masked(np.array([3, 4, 128, 512]), Masking(most=20))
    assert found.counts.tolist() == [1, 1, 19, 20]


def test_whole_words_are_masked_whole():
    lengths = np.full(400, 100)
    tokens, found = masked(lengths, Masking(whole_words=True))
    assert 13 < found.counts.mean() <= 15
    assert (found.counts <= 15).all()
    chosen = np.zeros(len(tokens), bool)
    chosen[found.places] = True
    goes_on = tokens >= VOCABULARY - CONTINUES
    for at in np.flatnonzero(goes_on[1:]) + 1:
        if tokens[at - 1] != CLS:
            assert chosen[at] == chosen[at - 1]
