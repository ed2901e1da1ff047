"""``TaggedWords``: sentences whose words have tags, each with the document around it, without padding.

Named entities as in Devlin et al. 2019, section 5.3: the first piece of a word stands for it, and a sentence is seen
with as much of its document as a sequence holds.

A sample is a document. Each of its sentences is predicted in a sequence ``[CLS] context sentence context [SEP]`` that
has as many tokens to its left as to its right, or more of what there is. Sentences that see the same share one
sequence: a document that fits into one is computed once. A batch is packed (:mod:`paperscale.data.packing`) and holds
besides, of W words, those of a document in their order::

    places     int64 [W], which of the T tokens is a word's first
    tag        int64 [W], the number of its tag among the set's classes
    first      bool [W], whether the word begins a sentence
    documents  what documents they are of, see :class:`Documents`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from paperscale.data.packing import Example, framed
from paperscale.data.rawtext import RawTextStream
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch

_FRAME = 2  # [CLS] and [SEP]
CONLL_2003 = ("O", *(f"{place}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for place in "BI"))
"""The tags of CoNLL-2003."""


class TaggedWords(RawTextStream):
    """Documents of sentences whose words have tags: CoNLL-2003.

    Args:
        path: a set of ``paperscale data prepare conll2003``.
        global_batch_size: documents of one optimizer step over all ranks; one of CoNLL-2003 has 15 sentences.
        length: tokens of a sequence at most.
        tokenizer: that of the pre-training, see :class:`~paperscale.data.rawtext.RawTextStream`. Names are better found
            by one that keeps capitals.
        stream: the further arguments of :class:`~paperscale.data.tasks.TaskStream`.
    """

    made_by = "`paperscale data prepare conll2003` makes"

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int = 2,
        length: int = 512,
        tokenizer: str | None = None,
        **stream: Any,
    ):
        super().__init__(path, global_batch_size, length, tokenizer, **stream)

    def read(self, shards: ShardSet, shard: int, row: int) -> Example:
        """Return a document.

        Raises:
            SampleFault: it cannot be read.
            ValueError: it lacks a field, or a tag is none of the set's classes.
        """
        content = self.content(shards, shard, row)
        number_of = {tag: number for number, tag in enumerate(shards.manifest.classes)}
        try:
            sentences = [sentence["words"] for sentence in content["sentences"]]
            tags = [number_of[tag] for sentence in content["sentences"] for tag in sentence["tags"]]
            fields = {"id": content["id"], "sizes": [len(words) for words in sentences], "tag": tags}
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no document of tagged words, or a tag is none of the classes ({error})") from error
        words = [word for sentence in sentences for word in sentence]
        if len(words) != len(tags):
            raise ValueError(f"it has {len(words)} words and {len(tags)} tags")
        return self._in_context(self.pieces(words), fields)

    def pieces(self, words: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each word: one at least, and no more than fit into a sequence."""
        unknown = [self.tokenizer().number("unknown")]
        return [(tokens or unknown)[: self.length - _FRAME] for tokens in self.tokenizer().encode(words)]

    def _in_context(self, pieces: list[list[int]], fields: dict[str, Any]) -> Example:
        """Return the sequences of a document."""
        tokens = np.array([token for word in pieces for token in word], np.int64)
        begins = [0, *accumulate(map(len, pieces))]
        found: dict[tuple[int, int], list[int]] = {}
        for begin, end in parts(fields["sizes"], begins, self.length - _FRAME):
            window = in_context(begins[begin], begins[end], len(tokens), self.length - _FRAME)
            found.setdefault(window, []).extend(1 - window[0] + at for at in begins[begin:end])
        both = [framed([tokens[slice(*window)]], *self.frame) for window in found or [(0, 0)]]
        places = [np.array(inside, np.int64) for inside in found.values()] or [np.empty(0, np.int64)]
        sequences, segments = ([pair[of] for pair in both] for of in range(2))
        return Example(sequences, segments, {**fields, "places": places})

    def joined(self, examples: Sequence[Example], batch: Batch) -> Batch:
        """Return what a batch of documents holds, see the module."""
        inside = [one for example in examples for one in example.fields["places"]]
        offsets = batch["offsets"].numpy()[:-1].astype(np.int64)
        sizes = [example.fields["sizes"] for example in examples]
        ends = np.cumsum([0, *(size for document in sizes for size in document)])
        first = np.zeros(int(ends[-1]) + 1, np.bool_)
        first[ends] = True
        return {
            "places": torch.from_numpy(np.concatenate(inside) + np.repeat(offsets, [len(one) for one in inside])),
            "tag": torch.tensor([tag for example in examples for tag in example.fields["tag"]], dtype=torch.int64),
            "first": torch.from_numpy(first[:-1]),
            "documents": Documents([example.fields["id"] for example in examples], sizes),
        }

    def _blank(self, length: int) -> Example:
        words = max(1, length - _FRAME)
        fields = {"id": "", "sizes": [words], "tag": [0] * words, "places": [np.arange(1, words + 1)]}
        return Example([np.zeros(length, np.int64)], [np.zeros(length, np.int64)], fields)


class Part(NamedTuple):
    """Words that are predicted in one sequence: the first, and the one behind the last."""

    begin: int
    end: int


class Documents:
    """The documents of a batch. It stays on the host, and nothing takes it apart, as it would a dictionary.

    Args:
        ids: of each.
        sizes: words of each sentence of each.
    """

    def __init__(self, ids: Sequence[str], sizes: Sequence[Sequence[int]]):
        self.ids, self.sizes = list(ids), [list(of) for of in sizes]

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.ids)

    def divided(self, values: Sequence[Any]) -> dict[str, list[list[Any]]]:
        """Return what is known of each word of the batch by document and sentence."""
        at = iter(values)
        return {
            identity: [[next(at) for _ in range(size)] for size in sizes]
            for identity, sizes in zip(self.ids, self.sizes, strict=True)
        }


def parts(sizes: Sequence[int], begins: Sequence[int], room: int) -> Iterator[Part]:
    """Yield the sentences of a document; one that is longer than a sequence in as many parts as that takes.

    Args:
        sizes: words of each sentence.
        begins: the first token of each word, and the tokens of all.
        room: tokens of a sequence at most; no word has more.
    """
    for first, stop in pairwise([0, *accumulate(sizes)]):
        begin = first
        for word in range(first, stop):
            if begins[word + 1] - begins[begin] > room:
                yield Part(begin, word)
                begin = word
        if begin < stop:
            yield Part(begin, stop)


def in_context(begin: int, end: int, tokens: int, room: int) -> tuple[int, int]:
    """Return the tokens around some of a document: as many to the left as to the right, or more of what there is.

    Args:
        begin: the first of the tokens.
        end: the one behind the last.
        tokens: of the document.
        room: tokens in all, at most.
    """
    spare = room - (end - begin)
    left = min(begin, spare // 2)
    right = min(tokens - end, spare - left)
    left = min(begin, spare - right)
    return begin - left, end + right
