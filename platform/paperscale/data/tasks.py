"""What BERT is fine-tuned on (Devlin et al. 2019, section 4 and figure 4): sentences, pairs, choices; without padding.

Batches are packed, see :mod:`paperscale.data.packing`, and hold besides::

    label   int64 [samples]; float32 where labels are scores

A sentence or a pair is one sequence, ``[CLS] A [SEP]`` or ``[CLS] A [SEP] B [SEP]``; a choice between C endings is C
sequences that follow each other, ``[CLS] context [SEP] ending [SEP]``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paperscale.data.absent import SAMPLES, AbsentSet
from paperscale.data.packing import Example, PackedStream, framed
from paperscale.data.random import permutation
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch, at_least
from paperscale.errors import UserError

_SUBSET = 20  # key of the choice of a few samples
_LEAST = 8
_NO_LABEL = "it has no label: train and test on splits whose labels are public"


class TaskStream(PackedStream):
    """What streams for fine-tuning have in common.

    Args:
        path: a set prepared with the tokenizer of the pre-training (``paperscale data prepare NAME --tokenizer``).
        global_batch_size: samples of one optimizer step over all ranks.
        length: tokens of a sequence at most; the rest is cut off, of a pair always from the longer one.
        train_samples: train on so many samples alone, which ``subset`` chooses: fine-tuning with few labels.
        subset: which of the ways to choose them; by default the stream's seed.
        stream: the further arguments of :class:`~paperscale.data.stream.ShardStream`.
    """

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int = 32,
        length: int = 128,
        train_samples: int | None = None,
        subset: int | None = None,
        **stream: Any,
    ):
        super().__init__(path, global_batch_size, **stream)
        at_least(_LEAST, length=length)
        at_least(1, train_samples=train_samples)
        self.longest = self.length = length
        self.train_samples = train_samples
        self.subset = self.seed if subset is None else subset
        self._chosen: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "length": self.length, "train_samples": self.train_samples}

    @cached_property
    def frame(self) -> tuple[int, int]:
        """Return the numbers of ``[CLS]`` and ``[SEP]``."""
        tokenizer = self.tokenizer()
        return tokenizer.number("begin"), tokenizer.number("end")

    def whole_units(self, shards: ShardSet) -> Sequence[int]:
        """Return the samples of each shard of a set."""
        return self._tokens[shards].sizes("documents")

    def units(self, shards: ShardSet) -> Sequence[int]:
        """Return the samples of each shard, or those that are chosen as of the first one."""
        if isinstance(shards, AbsentSet):
            return [SAMPLES]
        sizes = self.whole_units(shards)
        if self.train_samples is None or shards.split != self.splits["train"]:
            return sizes
        if self.train_samples > sum(sizes):
            raise UserError(
                f"data.train_samples={self.train_samples}: {shards.path} has {sum(sizes)} in '{shards.split}'; use at "
                "most these, or leave it out"
            )
        return [self.train_samples, *([0] * (len(sizes) - 1))]

    def check(self) -> None:
        """Look at every shard.

        Raises:
            UserError: as of :meth:`ShardStream.check`, or fewer samples are there than are to be trained on.
        """
        super().check()
        self.units(self.shards("train"))

    def example(self, shards: ShardSet, shard: int, row: int, sample: int, epoch: int | None) -> Example:
        """Return a sample, where it is one of a few that of the choice."""
        if self.train_samples is not None and shards.split == self.splits["train"]:
            shard, row = self._of_subset(shards, row)
        return self.read(shards, shard, row)

    def _of_subset(self, shards: ShardSet, number: int) -> tuple[int, int]:
        if id(shards) not in self._chosen:
            ends = np.cumsum(self.whole_units(shards))
            self._chosen[id(shards)] = ends, permutation(int(ends[-1]), self.subset, _SUBSET)[: self.train_samples]
        ends, samples = self._chosen[id(shards)]
        chosen = int(samples[number])
        shard = int(ends.searchsorted(chosen, side="right"))
        return shard, chosen - (int(ends[shard - 1]) if shard else 0)

    def place_of(self, shards: ShardSet, shard: int, unit: int) -> tuple[int, int]:
        """Return the row that is read for a sample, where it is one of a few that of the choice."""
        if self.train_samples is not None and shards.split == self.splits["train"]:
            shard, unit = self._of_subset(shards, unit)
        return shard, self.row_of(shards, shard, unit)

    def row_of(self, shards: ShardSet, shard: int, sample: int) -> int:
        """Return the row of a shard that holds a sample: the chunk of its document."""
        return self._tokens[shards].chunk_with(shard, "documents", sample)

    def read(self, shards: ShardSet, shard: int, row: int) -> Example:
        """Return a sample of a shard.

        Raises:
            SampleFault: it cannot be read.
            ValueError: it is not such a sample.
        """
        raise NotImplementedError

    def stand_in(self, path: str, split: str, channels: int) -> ShardSet:
        """Return what stands for a missing set."""
        lengths = {"tokens": SAMPLES * self.length, "documents": SAMPLES}
        return AbsentSet(path, split, ("tokens.npy", "labels.npy"), lengths=lengths)

    def joined(self, examples: Sequence[Example], batch: Batch) -> Batch:
        """Return the labels."""
        return {"label": torch.tensor([example.fields["label"] for example in examples])}

    def nothing(self) -> Example:
        """Return what stands in a batch none of whose samples could be read; its weight is zero."""
        return self._blank(3)

    def full_example(self) -> Example:
        """Return an example of the greatest length, whose content means nothing."""
        return self._blank(self.length)

    def _blank(self, length: int) -> Example:
        blank = [np.zeros(length, np.int64)] * self.sequences_of_sample
        return Example(blank, blank, {"label": 0})

    def framed(self, *parts: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``[CLS] A [SEP] B [SEP]``, cut to the length, and the part that each token belongs to."""
        return framed(cut([*parts], self.length - 1 - len(parts)), *self.frame)


class LabelledText(TaskStream):
    """Sentences or pairs of sentences with a class, or with a score from 0 to 5 (STS-B).

    The arguments are those of :class:`TaskStream`.
    """

    def __init__(self, path: str | list[str], global_batch_size: int = 32, length: int = 128, **stream: Any):
        super().__init__(path, global_batch_size, length, **stream)

    def whole_units(self, shards: ShardSet) -> Sequence[int]:
        """Return the samples of each shard of a set."""
        return shards.sizes if self._has_scores(shards) else super().whole_units(shards)

    def row_of(self, shards: ShardSet, shard: int, sample: int) -> int:
        """Return the row of a shard that holds a sample."""
        return sample if self._has_scores(shards) else super().row_of(shards, shard, sample)

    def _has_scores(self, shards: ShardSet) -> bool:
        return "json" in shards.fields()

    def read(self, shards: ShardSet, shard: int, row: int) -> Example:
        """Return a sample of a shard.

        Raises:
            SampleFault: it cannot be read.
            ValueError: it has no label.
        """
        if self._has_scores(shards):
            content = json.loads(bytes(shards.read(shard, row, ("json",))["json"]))
            parts, label = [np.array(tokens) for tokens in content["tokens"]], content["score"]
        else:
            parts, label = self._tokens[shards].document(shard, row)
        if label is None:
            raise ValueError(_NO_LABEL)
        tokens, segment = self.framed(*parts)
        return Example([tokens], [segment], {"label": label})


class Choices(TaskStream):
    """A context and its possible endings, of which one is right: SWAG, HellaSwag.

    Args:
        path: token shards of documents whose first sentence is the context, and the others the endings.
        global_batch_size: contexts of one optimizer step over all ranks.
        length: tokens of a sequence at most.
        choices: endings of each context.
        stream: the further arguments of :class:`TaskStream`.
    """

    def __init__(
        self, path: str | list[str], global_batch_size: int = 16, length: int = 128, choices: int = 4, **stream: Any
    ):
        super().__init__(path, global_batch_size, length, **stream)
        at_least(2, choices=choices)
        self.choices = self.sequences_of_sample = choices

    def read(self, shards: ShardSet, shard: int, row: int) -> Example:
        """Return a sample of a shard.

        Raises:
            SampleFault: it cannot be read.
            UserError: it has another number of endings.
            ValueError: it has no label.
        """
        (context, *endings), label = self._tokens[shards].document(shard, row)
        if len(endings) != self.choices:
            raise UserError(
                f"{shards.path}: a document has {len(endings)} endings, and data.choices={self.choices}; set that, or "
                "use a set of choices such as swag"
            )
        if label is None:
            raise ValueError(_NO_LABEL)
        pairs = [self.framed(context, ending) for ending in endings]
        return Example([tokens for tokens, _ in pairs], [segment for _, segment in pairs], {"label": label})


def cut(parts: list[NDArray[Any]], room: int) -> list[NDArray[Any]]:
    """Cut parts at their ends to ``room`` tokens together, one at a time from the longest."""
    lengths = [len(part) for part in parts]
    while (excess := sum(lengths) - room) > 0:
        longest = max(lengths)
        at = max(number for number, length in enumerate(lengths) if length == longest)
        others = [length for number, length in enumerate(lengths) if number != at]
        lengths[at] -= min(excess, max(1, longest - max(others, default=0)))
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
