"""``SegmentPairs``: what BERT is pre-trained on (Devlin et al. 2019, sections 3.1 and A.2), without padding.

A sample is a span of a document (:mod:`paperscale.data.spans`) and gives one sequence ``[CLS] A [SEP] B [SEP]``.
A batch is packed (:mod:`paperscale.data.packing`) and holds besides, of M tokens to predict::

    places   int64 [M], which of the T tokens are predicted
    targets  int64 [M], what they are
    share    float32 [M], 1 / (predictions of the token's sequence): the loss is the mean over sequences of the mean
             over a sequence's predictions, which does not depend on how a global batch is divided
    label    int64 [N], 1 where B does not follow A, with ``next_sentence``
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paperscale.data.absent import SAMPLES, AbsentSet
from paperscale.data.faults import SampleFault, Skipped
from paperscale.data.masking import Masking, Vocabulary, mask
from paperscale.data.packing import Example, PackedStream, Rows, framed
from paperscale.data.random import hash64, uniform
from paperscale.data.shards import ShardSet
from paperscale.data.spans import Span, Spans
from paperscale.data.stream import Batch, Places, Source, at_least
from paperscale.errors import UserError, nearest

NEXT_SENTENCE = ("random", "order", "none")
OBJECTIVES = ("masked", "left-to-right")
_PAIR, _CUT = 10, 11  # what is drawn for each sample
_SHORT, _TARGET, _SPLIT, _OTHER, _DOCUMENT, _SENTENCE, _DRAWS = range(7)
_EVALUATION = -1  # epoch of the draws in validation and test: always the same
_LEAST = 8
_BITS = 64


class SegmentPairs(PackedStream):
    """Pairs of segments with masked tokens.

    Args:
        path: token shards of documents with sentences, as ``paperscale data prepare`` writes them of text with a
            tokenizer that has ``[CLS]``, ``[SEP]`` and ``[MASK]``.
        global_batch_size: sequences of one optimizer step over all ranks.
        length: tokens of a sequence at most, special ones counted.
        next_sentence: ``random``: B follows A in half of the pairs, in the others it is of another document of the same
            shard; ``order``: A and B are in their order in half of the pairs (Lan et al. 2020, section 3.1); ``none``:
            one segment.
        objective: ``masked``, or ``left-to-right``: nothing is masked, each token's target is the one that follows
            (section 5.1, LTR).
        mask_rate: share of a sequence's tokens that are predicted.
        mask_mix: shares of these that are replaced by ``[MASK]``, left as they are, and replaced by a random token.
        whole_words: mask all pieces of a word or none.
        max_predictions: of a sequence; 20 at length 128 in the original.
        short_sequences: share of the sequences that are cut to a random length.
        duplicates: how often a span is masked and paired in another way before that repeats, as in the original (10);
            ``null``, the default: anew in each epoch.
        stream: the further arguments of :class:`~paperscale.data.stream.ShardStream`.

    Raises:
        UserError: an argument is none of its choices or out of range.
    """

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int = 256,
        length: int = 128,
        next_sentence: str = "random",
        objective: str = "masked",
        mask_rate: float = 0.15,
        mask_mix: Sequence[float] = (0.8, 0.1, 0.1),
        whole_words: bool = False,
        max_predictions: int | None = None,
        short_sequences: float = 0.1,
        duplicates: int | None = None,
        **stream: Any,
    ):
        super().__init__(path, global_batch_size, **stream)
        at_least(_LEAST, length=length)
        at_least(1, duplicates=duplicates, max_predictions=max_predictions)
        _choose("next_sentence", next_sentence, NEXT_SENTENCE)
        _choose("objective", objective, OBJECTIVES)
        if not 0 <= short_sequences <= 1:
            raise UserError(f"data.short_sequences={short_sequences}: give a share from 0 to 1, such as 0.1")
        self.longest = self.length = length
        self.next_sentence, self.objective = next_sentence, objective
        self.masking = Masking(mask_rate, tuple(mask_mix), whole_words, max_predictions)
        self.masking.check()
        self.short_sequences, self.duplicates = short_sequences, duplicates
        self._spans: dict[int, Spans] = {}
        self._coins = -(-self.room // _BITS)  # words of 64 bits: one for each token that a segment may lose

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "length": self.length, "next_sentence": self.next_sentence}

    @property
    def room(self) -> int:
        """Return the tokens of a sequence that are not special."""
        return self.length - (2 if self.next_sentence == "none" else 3)

    def spans(self, shards: ShardSet) -> Spans:
        """Return the spans of a split."""
        found = self._spans.get(id(shards))
        if found is None or found.tokens.shards is not shards:
            found = Spans(self._tokens[shards], self.room, keep=self._rank()[0] == 0)
            self._spans[id(shards)] = found
        return found

    def units(self, shards: ShardSet) -> Sequence[int]:
        """Return the spans of each shard.

        Raises:
            UserError: a shard has a single document, so that none of another document can be found.
        """
        if isinstance(shards, AbsentSet):
            return [SAMPLES]
        single = [s.name for s in shards.shards if s.lengths.get("documents", 2) < 2]
        if single and self.next_sentence == "random":
            raise UserError(
                f"{shards.path}: shard {single[0]} of '{shards.split}' holds a single document, and "
                "data.next_sentence=random pairs documents of a shard; use data.next_sentence=order or none, or write "
                "larger shards"
            )
        return self.spans(shards).sizes

    def place_of(self, shards: ShardSet, shard: int, unit: int) -> tuple[int, int]:
        """Return the chunk that holds a span."""
        return shard, self.spans(shards).chunk_with(shard, unit)

    def stand_in(self, path: str, split: str, channels: int) -> ShardSet:
        """Return what stands for a missing set."""
        return AbsentSet(path, split, ("tokens.npy",), lengths={"tokens": SAMPLES * self.length})

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Return what masking knows of the sets' tokenizer.

        Raises:
            UserError: there is none, or it is not made for this.
        """
        return Vocabulary.of(self.tokenizer())

    # -- from spans to sequences -----------------------------------------------------------------------------

    def fill_rows(self, source: Source, batch: Batch, rows: range, places: Places, train: bool) -> list[Skipped]:
        """Make the sequences of some rows, and mask them together."""
        epochs = np.full(len(rows), _EVALUATION) if not train else places.epochs[rows.start : rows.stop]
        if train and self.duplicates:
            epochs = epochs % self.duplicates
        samples = places.samples[rows.start : rows.stop]
        keys = self.seed, epochs[:, None], samples[:, None]
        draws = uniform(*keys, _PAIR, np.arange(_DRAWS)).tolist()
        coins = hash64(*keys, _CUT, np.arange(2 * self._coins)).tolist()
        made, skipped = [], []
        for at, (row, of, shard, inside, sample, _) in enumerate(places.of(rows)):
            shards = source.sets[of]
            try:
                made.append((at, row, *self._pair(shards, shard, inside, draws[at], coins[at])))
            except SampleFault as fault:
                if self.on_fault == "fail":
                    raise
                skipped.append(Skipped(sample, fault.what))
        if made:
            self._mask(batch["rows"], made, epochs, samples)
        return skipped

    def _mask(self, rows: Rows, made: list[tuple[Any, ...]], epochs: NDArray[np.int64], samples: Any) -> None:
        framed_ = [framed(parts, self.vocabulary.begin, self.vocabulary.end) for _, _, parts, _ in made]
        lengths = np.array([len(tokens) for tokens, _ in framed_])
        ends = np.cumsum(lengths)
        tokens = np.concatenate([tokens for tokens, _ in framed_])
        if self.objective == "masked":
            at = np.array([at for at, *_ in made])
            found = mask(tokens, lengths, self.masking, self.vocabulary, self.seed, epochs[at], samples[at])
            seen, cut = _split(found.tokens, ends), np.cumsum(found.counts)
            inside = found.places - np.repeat(ends - lengths, found.counts)
            places, targets = _split(inside, cut), _split(found.targets, cut)
        else:
            seen = _split(tokens, ends)
            places, targets = [np.arange(len(t) - 1) for t in seen], [t[1:] for t in seen]
        for (_, row, _, label), tokens_, (_, segment), place, target in zip(
            made, seen, framed_, places, targets, strict=True
        ):
            rows[row] = Example([tokens_], [segment], {"places": place, "targets": target, "label": label})

    def _pair(
        self, shards: ShardSet, shard: int, number: int, draws: list[float], coins: list[int]
    ) -> tuple[list[NDArray[Any]], int]:
        """Return the segments of a sequence, and whether B does not follow A (or stands before it)."""
        span = self.spans(shards)[shard, number]
        chunk = self._tokens[shards].chunk(shard, span.chunk)
        target = self.room
        if draws[_SHORT] < self.short_sequences:
            target = 2 + int(draws[_TARGET] * (self.room - 1))
        if self.next_sentence == "none":
            return self._cut([chunk.between(span.first, span.stop)], target, coins), 0
        split = span.first + 1 + int(draws[_SPLIT] * max(0, span.stop - span.first - 1))
        first, rest = chunk.between(span.first, split), chunk.between(split, span.stop)
        if self.next_sentence == "order":
            pair = self._cut([first, rest] if len(rest) else _halves(first), target, coins)
            swapped = draws[_OTHER] < 0.5
            return (pair[::-1] if swapped else pair), int(swapped)
        other = draws[_OTHER] < 0.5 or not len(rest)
        if other:
            rest = self._of_another_document(shards, shard, span, target - len(first), draws)
        return self._cut([first, rest], target, coins), int(other)

    def _of_another_document(
        self, shards: ShardSet, shard: int, span: Span, wanted: int, draws: list[float]
    ) -> NDArray[Any]:
        """Return sentences from a random one on, of a random other document of the shard."""
        tokens = self._tokens[shards]
        starts = tokens.chunk_starts(shard, "documents")
        own = starts[span.chunk] + span.document
        number = int(draws[_DOCUMENT] * (starts[-1] - 1))
        for step in range(starts[-1] - 1):  # an empty document is passed over
            candidate = (number + step) % (starts[-1] - 1)
            chunk, first, stop = tokens.sentences_of(shard, candidate + (candidate >= own))
            if first < stop:
                break
        first += int(draws[_SENTENCE] * (stop - first))
        return chunk.between(first, min(stop, chunk.sentence_with(first, wanted) + 1))

    def _cut(self, parts: list[NDArray[Any]], target: int, coins: list[int]) -> list[NDArray[Any]]:
        """Cut segments to ``target`` tokens together: always of the longer one, at its beginning or its end.

        A coin is thrown for each token that is cut off. Of a segment that loses more than there are coins, the rest
        goes in equal shares.
        """
        removed = _removed([len(part) for part in parts], target)
        for number, count in enumerate(removed):
            if count:
                thrown = min(count, _BITS * self._coins)
                front = _heads(coins[number * self._coins :], thrown) + (count - thrown) // 2
                parts[number] = parts[number][front : len(parts[number]) - (count - front)]
        return parts

    # -- batches ---------------------------------------------------------------------------------------------

    def joined(self, examples: Sequence[Example], batch: Batch) -> Batch:
        """Return what is predicted, see the module."""
        counts = np.array([len(example.fields["places"]) for example in examples])
        places = np.concatenate([example.fields["places"] for example in examples])
        share = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
        found = {
            "places": torch.from_numpy(places + np.repeat(batch["offsets"].numpy()[:-1].astype(np.int64), counts)),
            "targets": torch.from_numpy(np.concatenate([example.fields["targets"] for example in examples])),
            "share": torch.from_numpy(share),
        }
        if self.next_sentence != "none":
            found["label"] = torch.tensor([example.fields["label"] for example in examples])
        return found

    def nothing(self) -> Example:
        """Return what stands in a batch none of whose samples could be read; its weight is zero."""
        tokens, segment = framed([np.zeros(1)], self.vocabulary.begin, self.vocabulary.end)
        return Example([tokens], [segment], {"places": np.array([1]), "targets": np.array([0]), "label": 0})

    def full_example(self) -> Example:
        """Return an example of the greatest length, whose content means nothing."""
        masked = int(self.masking.predictions(np.array([self.length]))[0])
        count = masked if self.objective == "masked" else self.length - 1
        fields = {"places": np.arange(count), "targets": np.zeros(count, np.int64), "label": 0}
        return Example([np.zeros(self.length, np.int64)], [np.zeros(self.length, np.int64)], fields)


def _removed(lengths: list[int], target: int) -> list[int]:
    """Return how many tokens each segment loses, one at a time from the longer one, the second if they are equal."""
    excess = sum(lengths) - target
    if excess <= 0:
        return [0] * len(lengths)
    if len(lengths) == 1:
        return [excess]
    first, second = lengths
    alone = min(excess, abs(first - second))
    rest = excess - alone
    shares = [rest // 2, rest - rest // 2]
    shares[0 if first > second else 1] += alone
    return shares


def _halves(sentence: NDArray[Any]) -> list[NDArray[Any]]:
    """Return a single sentence as two parts: its order can still be told."""
    middle = (len(sentence) + 1) // 2
    return [sentence[:middle], sentence[middle:]]


def _heads(words: Sequence[int], count: int) -> int:
    """Return how many of the first ``count`` bits of words of 64 are set."""
    whole, rest = divmod(count, _BITS)
    last = (words[whole] & ((1 << rest) - 1)).bit_count() if rest else 0
    return sum(word.bit_count() for word in words[:whole]) + last


def _split(values: NDArray[Any], ends: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return the parts of an array that end there."""
    return [values[start:end] for start, end in pairwise([0, *ends.tolist()])]


def _choose(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"data.{name}={value}: choose {', '.join(choices)}{nearest(value, choices)}")
