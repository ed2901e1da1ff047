"""DataModules of text: fixed blocks of packed documents, and documents in batches of like length.

``TokenBlocks`` gives dictionaries of int64 [batch, length]::

    tokens    the text, documents one after the other, no padding
    targets   the token that follows; -100 after a document's last (with ``next_token``)
    segment   0, 1, 2...: which of the row's documents a token belongs to, for block-diagonal attention
    position  0, 1, 2...: its place in that document, counted from the row's first token of it
    offsets   int32 [documents + 1], with ``segment``: where each of them begins in the batch, and where the last ends
    lengths   the tokens of each of them, as a list on the host

``TokenDocuments`` gives for each field, for example ``source`` and ``target``::

    source         int64 [batch, longest], padded
    source_length  int64 [batch]
    label          int64 [batch], where documents have labels

Both add ``sample`` and, in training, ``cursor``: see :mod:`paperscale.data.stream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paperscale.data.absent import SAMPLES, AbsentSet
from paperscale.data.batching import Batches, TokenBatches
from paperscale.data.faults import Skipped
from paperscale.data.order import Order
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch, Places, ShardStream, Source, at_least
from paperscale.data.tokenizer import FILE as TOKENIZER
from paperscale.data.tokenizer import Tokenizer
from paperscale.data.tokens import TokenSets
from paperscale.errors import UserError

_TOKENS, _BLOCKS = 1 << 25, 1 << 16  # of a window, at most

IGNORED = -100
"""Target of positions that have none, as ``cross_entropy`` ignores by default."""


class TokenStream(ShardStream):
    """What streams of token shards have in common."""

    _unit = "document"

    def __init__(self, path: str | list[str], global_batch_size: int, **stream: Any):
        super().__init__(path, global_batch_size, **stream)
        self._tokens = TokenSets()

    def source(self, stage: str) -> Source:
        """Return the samples of a stage; refuse sets of different vocabularies."""
        source = super().source(stage)
        vocabularies = {shards.path: shards.manifest.files.get(TOKENIZER) for shards in source.sets}
        if len(set(vocabularies.values())) > 1:
            raise UserError(
                f"the sets {', '.join(vocabularies)} have different tokenizers: their numbers mean different tokens; "
                "prepare them with the same one (`paperscale data prepare NAME --tokenizer SET/tokenizer.json`)"
            )
        return source

    @property
    def has_tokenizer(self) -> bool:
        """Return whether there is a tokenizer beside the shards."""
        return TOKENIZER in self.shards("train").manifest.files

    def tokenizer(self) -> Tokenizer:
        """Return the sets' tokenizer.

        Raises:
            UserError: there is none beside the shards.
        """
        folder = self.shards("train")
        if TOKENIZER not in folder.manifest.files:
            raise UserError(
                f"{folder.path} has no {TOKENIZER}; prepare it with `paperscale data prepare`, or attach the tokenizer "
                "with ShardWriter.attach"
            )
        return Tokenizer(bytes(folder.folder.read_file(TOKENIZER)).decode(), f"{folder.path}/{TOKENIZER}")

    def name_of(self, shards: ShardSet, shard: int, row_in_shard: int) -> str:
        """Return what to call a sample in a message: its place in the shard."""
        return f"{self._unit} {row_in_shard}"

    def fill_rows(self, source: Source, batch: Batch, rows: range, places: Places, train: bool) -> list[Skipped]:
        """Fill some rows of the batch, through arrays: a tensor takes longer to index than a text to copy."""
        return super().fill_rows(source, {k: tensor.numpy() for k, tensor in batch.items()}, rows, places, train)


class TokenBlocks(TokenStream):
    """Text in blocks of a fixed number of tokens, as language models are trained on (Radford et al. 2019, section 2.3).

    The documents of a split, laid end to end, are cut into blocks; a block is a sample. What is left after the last
    whole block, fewer tokens than one block, is not used.

    Args:
        path: token shards, as ``paperscale data prepare`` writes them of text.
        global_batch_size: blocks of one optimizer step over all ranks.
        length: tokens of a block.
        next_token: add ``targets``.
        segments: add ``segment``, ``position``, ``offsets`` and ``lengths``.
        window: blocks shuffled together; by default 65,536, or as many as hold 33 million tokens.
        num_threads: threads that read; 0, the default, reads in the training thread: handing blocks to another costs
            more than reading them.
        stream: the further arguments of :class:`~paperscale.data.stream.ShardStream`.
    """

    _unit = "block"

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int = 32,
        length: int = 512,
        next_token: bool = False,
        segments: bool = False,
        window: int | None = None,
        num_threads: int = 0,
        **stream: Any,
    ):
        at_least(1, length=length)
        window = min(_BLOCKS, max(1, _TOKENS // length)) if window is None else window
        super().__init__(path, global_batch_size, window=window, num_threads=num_threads, **stream)
        self.length, self.next_token, self.segments = length, next_token, segments

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "length": self.length}

    def units(self, shards: ShardSet) -> Sequence[int]:
        """Return how many blocks begin in each shard."""
        starts = self._tokens[shards].token_starts
        blocks = (int(starts[-1]) - int(self.next_token)) // self.length
        if not blocks:
            raise UserError(
                f"{shards.path}: split '{shards.split}' has {starts[-1]} tokens, fewer than one block of "
                f"data.length={self.length}; use shorter blocks"
            )
        return np.diff(np.minimum(-(-starts // self.length), blocks)).tolist()

    def place_of(self, shards: ShardSet, shard: int, unit: int) -> tuple[int, int]:
        """Return the chunk in which a block begins."""
        tokens = self._tokens[shards]
        return shard, tokens.chunk_with(shard, "tokens", tokens.block_starts(self.length)[shard] + unit * self.length)

    def stand_in(self, path: str, split: str, channels: int) -> ShardSet:
        """Return what stands for a missing set."""
        return AbsentSet(path, split, ("tokens.npy",), lengths={"tokens": SAMPLES * self.length})

    def allocate(self, count: int, train: bool) -> Batch:
        """Return the batch's tensors."""
        names = ["tokens"]
        names += ["targets"] if self.next_token else []
        names += ["segment", "position"] if self.segments else []
        return {name: torch.empty(count, self.length, dtype=torch.int64) for name in names}

    def fill(
        self, shards: ShardSet, batch: Batch, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        """Copy one block into the batch, given as arrays."""
        tokens = self._tokens[shards]
        start = tokens.block_starts(self.length)[shard] + row_in_shard * self.length
        if not self.next_token:
            tokens.copy_tokens(shard, start, batch["tokens"][row])
        else:
            block = np.empty(self.length + 1, np.int64)
            tokens.copy_tokens(shard, start, block)
            batch["tokens"][row], batch["targets"][row] = block[:-1], block[1:]
        if self.segments:
            self._mark(tokens.boundaries(shard, start, self.length), batch, row)

    def assembled(self, batch: Batch, kept: torch.Tensor | None) -> Batch:
        """Return the batch, with where its documents lie."""
        batch = super().assembled(batch, kept)
        if not self.segments:
            return batch
        begins = np.flatnonzero(batch["position"].numpy().ravel() == 0)
        offsets = np.append(begins, batch["position"].numel())
        return {**batch, "offsets": torch.from_numpy(offsets.astype(np.int32)), "lengths": np.diff(offsets).tolist()}

    def full_batch(self, samples: int) -> Batch | None:
        """Return blocks of one document each where documents are told apart; ``None`` where blocks are all alike."""
        if not self.segments:
            return None
        batch = {name: torch.zeros_like(tensor) for name, tensor in self.allocate(samples, True).items()}
        batch["position"] += torch.arange(self.length)
        return self.assembled({**batch, "sample": torch.zeros(samples, dtype=torch.int64)}, None)

    def _mark(self, ends: NDArray[np.int64], batch: dict[str, NDArray[np.int64]], row: int) -> None:
        """Number the documents of a row, and the places in each."""
        starts = np.concatenate([[0], ends[ends < self.length]])
        sizes = np.diff(starts, append=self.length)
        batch["segment"][row] = np.repeat(np.arange(len(starts)), sizes)
        batch["position"][row] = np.arange(self.length) - np.repeat(starts, sizes)
        if self.next_token:
            batch["targets"][row, ends - 1] = IGNORED


class TokenDocuments(TokenStream):
    """Documents of one or more sentences, padded to the longest of a batch: translation, inference, classification.

    Args:
        path: token shards of such documents.
        global_batch_size: documents of one optimizer step over all ranks, unless ``max_tokens`` is given.
        fields: name of each sentence of a document, for example ``[source, target]``; one name takes all sentences
            of a document together.
        max_tokens: tokens of a global batch on each field instead: documents of like length go together
            (Vaswani et al. 2017, section 5.1: 25,000). The mean of a loss is then over the last field's tokens.
        micro_tokens: with it, the tokens of one forward pass on one rank, exceeded by less than a document; the
            gradient is accumulated over as many passes as that takes.
        max_length: longer sentences are cut to this.
        pad: number of the padding token.
        stream: the further arguments of :class:`~paperscale.data.stream.ShardStream`.
    """

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int = 32,
        fields: list[str] | None = None,
        max_tokens: int | None = None,
        micro_tokens: int | None = None,
        max_length: int | None = None,
        pad: int = 0,
        **stream: Any,
    ):
        super().__init__(path, global_batch_size, **stream)
        self.fields = fields or ["tokens"]
        at_least(1, max_tokens=max_tokens, micro_tokens=micro_tokens, max_length=max_length)
        if micro_tokens is not None and max_tokens is None:
            raise UserError(
                "data.micro_tokens divides data.max_tokens: give that too, or data.micro_batch_size instead"
            )
        if self.batch_ramp and max_tokens is not None:
            raise UserError("data.batch_ramp is for batches of samples: leave out data.max_tokens or data.batch_ramp")
        self.max_tokens, self.micro_tokens, self.max_length, self.pad = max_tokens, micro_tokens, max_length, pad

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "max_tokens": self.max_tokens, "max_length": self.max_length}

    def accumulate(self, world_size: int) -> int:
        """Return the forward passes of one optimizer step."""
        if self.max_tokens is None:
            return super().accumulate(world_size)
        share = -(-self.max_tokens // world_size)
        return -(-share // (self.micro_tokens or share))

    def halved(self, world_size: int) -> dict[str, int] | None:
        """Return attributes that halve the tokens of a forward pass; ``None`` where that is no more than a sample."""
        if self.max_tokens is None:
            return super().halved(world_size)
        tokens = -(-self.max_tokens // (world_size * self.accumulate(world_size)))
        return {"micro_tokens": -(-tokens // 2)} if tokens > (self.max_length or 1) else None

    def units(self, shards: ShardSet) -> Sequence[int]:
        """Return the documents of each shard."""
        return self._tokens[shards].sizes("documents")

    def place_of(self, shards: ShardSet, shard: int, unit: int) -> tuple[int, int]:
        """Return the chunk that holds a document."""
        return shard, self._tokens[shards].chunk_with(shard, "documents", unit)

    def batches(self, source: Source, order: Order) -> tuple[Order, Batches]:
        """Return the global batches: of a fixed size, or by tokens."""
        if self.max_tokens is None:
            return super().batches(source, order)
        bucketed = TokenBatches(
            order, partial(self.lengths, source), self.max_tokens, seed=self.seed, window=self.window
        )
        return bucketed, bucketed

    def stand_in(self, path: str, split: str, channels: int) -> ShardSet:
        """Return what stands for a missing set: labelled documents of the greatest length."""
        if self.max_length is None:
            raise UserError(
                f"no shards at {path}, and data.max_length does not say how long its documents are; set it, for "
                "example data.max_length=128, or make them with `paperscale data prepare`"
            )
        lengths = {"tokens": SAMPLES * self.max_length, "documents": SAMPLES}
        return AbsentSet(path, split, ("tokens.npy", "labels.npy"), lengths=lengths)

    def lengths(self, source: Source, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of each field, int64 [samples, fields]."""
        if any(isinstance(shards, AbsentSet) for shards in source.sets):
            return np.full((len(samples), len(self.fields)), self.max_length or 1)
        sets, shards, rows = source.locate(samples)
        found = np.empty((len(samples), len(self.fields)), np.int64)
        damaged = 1 if self.on_fault == "skip" else None  # they are skipped when they are to be read
        for of in np.unique(sets).tolist():
            tokens = self._tokens[source.sets[of]]
            for shard in np.unique(shards[sets == of]).tolist():
                here = np.flatnonzero((sets == of) & (shards == shard))
                found[here] = tokens.sentence_lengths(shard, rows[here], len(self.fields), damaged)
        return found if self.max_length is None else np.minimum(found, self.max_length)

    def _labelled(self, source: Source) -> bool:
        """Return whether documents have labels.

        Raises:
            UserError: those of some sets do, and those of others do not.
        """
        kinds = {shards.path: "labels.npy" in shards.fields() for shards in source.sets}
        if len(set(kinds.values())) > 1:
            without = [path for path, labelled in kinds.items() if not labelled]
            raise UserError(f"the documents of {', '.join(without)} have no labels, others have; train on one kind")
        return all(kinds.values())

    def allocate_for(self, source: Source, places: Places, train: bool) -> Batch:
        """Return tensors as long as the longest sentence of each field."""
        longest = self.lengths(source, places.samples).max(0).tolist()
        batch: Batch = {}
        for name, size in zip(self.fields, longest, strict=True):
            batch[name] = torch.full((len(places), size), self.pad)
            batch[f"{name}_length"] = torch.zeros(len(places), dtype=torch.int64)
        if self._labelled(source):
            batch["label"] = torch.zeros(len(places), dtype=torch.int64)
        return batch

    def fill(
        self, shards: ShardSet, batch: Batch, row: int, shard: int, row_in_shard: int, sample: int, epoch: int | None
    ) -> None:
        """Copy one document into the batch, given as arrays."""
        sentences, label = self._tokens[shards].document(shard, row_in_shard)
        if len(self.fields) == 1:
            sentences = [np.concatenate(sentences)]
        for name, sentence in zip(self.fields, sentences, strict=True):
            size = min(len(sentence), batch[name].shape[1])
            batch[name][row, :size] = sentence[:size]
            batch[f"{name}_length"][row] = size
        if label is not None:
            batch["label"][row] = label
