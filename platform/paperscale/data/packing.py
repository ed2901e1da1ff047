"""Batches of token sequences without padding: all tokens of a batch lie one after the other.

A packed batch of N sequences with T tokens together is a dictionary of::

    tokens    int64 [T]
    segment   int64 [T], which of a sequence's parts a token belongs to
    position  int64 [T], its place in its sequence
    offsets   int32 [N + 1], where each sequence begins, and where the last ends
    lengths   the tokens of each sequence, as a list on the host

A sample has one sequence or more: a question about a long passage has one for each window, a choice one for each
ending.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch, Places, ShardStream, Source
from paperscale.data.text import TokenStream

Tokens = NDArray[np.int64]


class Example(NamedTuple):
    """One sample.

    Attributes:
        sequences: tokens of each of its sequences.
        segments: the part that each token belongs to, for each sequence.
        fields: what else is known of it, by name: see :meth:`PackedStream.joined`.
    """

    sequences: Sequence[NDArray[Any]]
    segments: Sequence[NDArray[Any]]
    fields: dict[str, Any]


class Rows(list[Any]):
    """What has been made of each sample of a batch so far."""


class PackedStream(TokenStream):
    """A stream whose batches are packed. A subclass says what an example is, and how their fields are joined."""

    longest: int
    """Tokens of a sequence at most."""
    sequences_of_sample = 1
    """Sequences of a sample, for estimates."""
    threads_share_batches = False

    def default_threads(self) -> int:
        """Return no threads where the training itself is on the CPU.

        Examples are made in Python: a thread that makes them meanwhile holds the interpreter's lock and a core, and
        the training waits longer for these than the making takes.
        """
        return super().default_threads() if torch.accelerator.is_available() else 0

    def example(self, shards: ShardSet, shard: int, row: int, sample: int, epoch: int | None) -> Example:
        """Return a sample; the arguments are those of :meth:`ShardStream.fill`."""
        raise NotImplementedError

    def joined(self, examples: Sequence[Example], batch: Batch) -> Batch:
        """Return what a batch holds beside the tokens.

        Args:
            examples: its samples.
            batch: their packed tokens.
        """
        raise NotImplementedError

    def allocate_for(self, source: Source, places: Places, train: bool) -> Batch:
        """Return a place for each sample."""
        return {"rows": Rows([None] * len(places))}

    def fill(
        self, shards: ShardSet, batch: Batch, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        """Make one example."""
        batch["rows"][row] = self.example(shards, shard, row_in_shard, sample, epoch)

    fill_rows = ShardStream.fill_rows

    def clear(self, batch: Batch, row: int) -> None:
        """Make a row that could not be filled one that can be computed with."""
        batch["rows"][row] = self.nothing()

    def assembled(self, batch: Batch, kept: torch.Tensor | None) -> Batch:
        """Pack the examples, the longest first: attention then computes those of one length without a copy."""
        rows = range(len(batch["rows"])) if kept is None else kept.tolist()
        order = sorted(rows, key=lambda row: -sum(map(len, batch["rows"][row].sequences)))
        examples = [batch["rows"][row] for row in order]
        packed = pack(
            [tokens for example in examples for tokens in example.sequences],
            [segment for example in examples for segment in example.segments],
        )
        return {**packed, **self.joined(examples, packed), "sample": batch["sample"][order]}

    def nothing(self) -> Example:
        """Return what stands in a batch none of whose samples could be read; its weight is zero."""
        raise NotImplementedError

    def full_batch(self, samples: int) -> Batch:
        """Return a batch of examples of the greatest length, whose content means nothing."""
        longest = [self.full_example() for _ in range(samples)]
        batch = {"rows": Rows(longest), "sample": torch.zeros(samples, dtype=torch.int64)}
        return self.assembled(batch, None)

    def full_example(self) -> Example:
        """Return an example of the greatest length, whose content means nothing."""
        raise NotImplementedError


def pack(sequences: Sequence[ArrayLike], segments: Sequence[ArrayLike]) -> Batch:
    """Return sequences as a packed batch, see the module.

    Args:
        sequences: tokens of each.
        segments: the part that each token belongs to.
    """
    lengths = [len(np.asarray(tokens)) for tokens in sequences]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return {
        "tokens": _tensor(sequences),
        "segment": _tensor(segments),
        "position": torch.from_numpy(position),
        "offsets": torch.from_numpy(offsets.astype(np.int32)),
        "lengths": lengths,
    }


def _tensor(parts: Iterable[ArrayLike]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(part, np.int64) for part in parts]))


def framed(parts: Sequence[NDArray[Any]], begin: int, end: int) -> tuple[Tokens, Tokens]:
    """Return ``[CLS] A [SEP] B [SEP]`` and the part that each token belongs to (Devlin et al. 2019, figure 2).

    Args:
        parts: A, or A and B.
        begin: number of ``[CLS]``.
        end: number of ``[SEP]``.
    """
    tokens = np.empty(1 + sum(len(part) + 1 for part in parts), np.int64)
    segment = np.zeros(len(tokens), np.int64)
    tokens[0], at = begin, 1
    for number, part in enumerate(parts):
        tokens[at : at + len(part)] = part
        tokens[at + len(part)] = end
        segment[at : at + len(part) + 1] = number
        at += len(part) + 1
    return tokens, segment
