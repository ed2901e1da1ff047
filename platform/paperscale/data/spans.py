"""Spans: the runs of whole sentences that a language model is pre-trained on (Devlin et al. 2019, appendix A.2).

A document's sentences are taken in order until they have at least so many tokens; the next span begins after them. What
is left at a document's end is a shorter span. So every sentence is in one span, and no span is of two documents.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paperscale.data.kept import kept_array
from paperscale.data.tokens import TokenSet

_KEPT = 1024  # chunks whose spans are kept


class Span(NamedTuple):
    """Sentences ``first`` to ``stop`` of a chunk, which are of one document.

    Attributes:
        chunk: number of the chunk in its shard.
        document: number of the document in its chunk.
        first: first sentence.
        stop: sentence after the last.
    """

    chunk: int
    document: int
    first: int
    stop: int


class Spans:
    """The spans of a split, by shard and number in it.

    Args:
        tokens: the split.
        target: tokens that a span has at least, if its document does.
        keep: whether to keep the numbers of spans beside the shards, where that can be.
    """

    def __init__(self, tokens: TokenSet, target: int, keep: bool = False):
        self.tokens, self.target = tokens, target
        hashes = "".join(shard.sha256 for shard in tokens.shards.shards)
        of = hashlib.sha256(f"{hashes} {target}".encode()).hexdigest()[:16]
        path = tokens.shards.path
        counts = kept_array(Path(path) / f"spans-{of}.npy", keep and "://" not in path, self._count)
        ends = np.cumsum([0, *(tokens.shards.sizes)])
        self._starts = [[0, *np.cumsum(counts[a:b]).tolist()] for a, b in itertools.pairwise(ends.tolist())]
        self._found: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def _count(self) -> NDArray[np.int64]:
        """Return the spans of each chunk of all shards."""
        places = [(shard, row) for shard, size in enumerate(self.tokens.shards.sizes) for row in range(size)]
        return np.array([len(spans_of(*self.tokens.ends(*place), self.target)) - 1 for place in places], np.int64)

    @property
    def sizes(self) -> list[int]:
        """Return the spans of each shard."""
        return [starts[-1] for starts in self._starts]

    def chunk_with(self, shard: int, number: int) -> int:
        """Return the chunk that holds a span."""
        return bisect_right(self._starts[shard], number) - 1

    def __getitem__(self, place: tuple[int, int]) -> Span:
        """Return span number ``place[1]`` of shard ``place[0]``.

        Raises:
            SampleFault: its chunk cannot be read or is damaged.
        """
        shard, number = place
        row = self.chunk_with(shard, number)
        starts = self._starts[shard]
        firsts, documents = self._spans(shard, row)
        inside = number - starts[row]
        return Span(row, int(documents[inside]), int(firsts[inside]), int(firsts[inside + 1]))

    def _spans(self, shard: int, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        found = self._found.get((shard, row))
        if found is None:
            ends, sentences = self.tokens.ends(shard, row)
            firsts = spans_of(ends, sentences, self.target)
            documents = ends.searchsorted(firsts[:-1], side="right")
            if len(self._found) >= _KEPT:
                self._found = {}
            found = self._found[shard, row] = firsts, documents
        return found


def spans_of(documents: NDArray[np.int64], sentences: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """Return the first sentence of each span of a chunk, and the number of its sentences.

    Args:
        documents: the sentence after each document's last.
        sentences: the token after each sentence's last.
        target: tokens that a span has at least, if its document does.
    """
    starts = np.concatenate([[0], sentences[:-1]])
    full = sentences.searchsorted(starts + target) + 1
    end = documents[documents.searchsorted(np.arange(len(sentences)), side="right")]
    following = np.minimum(full, end).tolist()
    firsts, at = [], 0
    while at < len(following):
        firsts.append(at)
        at = following[at]
    return np.array([*firsts, len(following)], np.int64)
