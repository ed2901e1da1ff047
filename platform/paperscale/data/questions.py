"""``Questions``: passages in which answers are marked (Devlin et al. 2019, sections 4.2 and 4.3), without padding.

A sample is a question. A passage is cut into windows that overlap, and each is one sequence, ``[CLS] question [SEP]
window [SEP]``; those of a question follow each other. A batch of Q questions is packed into T tokens of N windows
(:mod:`paperscale.data.packing`) and holds besides::

    question  int64 [N], which of the batch's questions a window is of
    share     float32 [N], 1 / (windows of its question)
    answer    int64 [N, 2], the answer's first and last token, counted from the window's [CLS]; 0 and 0, which is [CLS],
              where it is not in the window whole
    passage   bool [T], which tokens are of the passage
    widest    bool [T], which of these have more context here than in any other window
    asked     the questions' texts, see :class:`Asked`
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from paperscale.data.packing import Example, Tokens, framed
from paperscale.data.rawtext import RawTextStream
from paperscale.data.shards import ShardSet
from paperscale.data.stream import Batch, at_least

_FRAME = 3  # [CLS], [SEP] and [SEP]
_LENGTH_COUNTS = 0.01
"""What a token of a window's length adds to its context, as in the original: of equals, the longer window is taken."""


class Questions(RawTextStream):
    """Questions about passages: SQuAD 1.1 and 2.0.

    Args:
        path: a set of ``paperscale data prepare squad-1.1``, ``squad-2.0`` or ``squad-1000``.
        global_batch_size: questions of one optimizer step over all ranks.
        length: tokens of a sequence at most.
        tokenizer: that of the pre-training, see :class:`~paperscale.data.rawtext.RawTextStream`.
        stride: tokens from a window's beginning to the next one's.
        question_length: tokens of a question at most, and no more than half of what a sequence holds; the rest is cut
            off.
        stream: the further arguments of :class:`~paperscale.data.tasks.TaskStream`.
    """

    made_by = "`paperscale data prepare squad-1.1` makes"
    sequences_of_sample = 2  # a few passages have more, most have one

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int = 32,
        length: int = 384,
        tokenizer: str | None = None,
        stride: int = 128,
        question_length: int = 64,
        **stream: Any,
    ):
        super().__init__(path, global_batch_size, length, tokenizer, **stream)
        at_least(1, stride=stride, question_length=question_length)
        self.stride, self.question_length = stride, min(question_length, (length - _FRAME) // 2)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "stride": self.stride, "question_length": self.question_length}

    def read(self, shards: ShardSet, shard: int, row: int) -> Example:
        """Return a question.

        Raises:
            SampleFault: it cannot be read.
            ValueError: it lacks a field.
        """
        content = self.content(shards, shard, row)
        try:
            golds = [] if content.get("impossible") else [(a["text"], int(a["start"])) for a in content["answers"]]
            question, passage, identity = content["question"], content["passage"], content["id"]
            (asked, _), (tokens, characters) = self.tokenizer().encode_in_place([question, passage])
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no question about a passage ({error})") from error
        answer = _covering(characters, golds[0][1], len(golds[0][0])) if golds else None
        fields = {"id": identity, "passage": passage, "answers": [text for text, _ in golds]}
        return self._windowed(asked[: self.question_length], tokens, characters, answer, fields)

    def _windowed(
        self,
        question: Tokens,
        tokens: Tokens,
        characters: NDArray[np.int64],
        answer: tuple[int, int] | None,
        fields: dict[str, Any],
    ) -> Example:
        """Return the sequences of a question."""
        found = windows(len(tokens), self.length - _FRAME - len(question), self.stride)
        widest_in = of_widest_context(found, len(tokens))
        sequences, segments, answers, widest = [], [], [], []
        before = len(question) + 2
        for number, (first, stop) in enumerate(found.tolist()):
            sequence, segment = framed([question, tokens[first:stop]], *self.frame)
            sequences.append(sequence)
            segments.append(segment)
            whole = answer is not None and first <= answer[0] and answer[1] < stop
            answers.append([before - first + place for place in answer] if answer is not None and whole else [0, 0])
            widest.append(widest_in[first:stop] == number)
        inside = [Inside(before, characters[first:stop]) for first, stop in found.tolist()]
        return Example(sequences, segments, {**fields, "answer": answers, "widest": widest, "inside": inside})

    def joined(self, examples: Sequence[Example], batch: Batch) -> Batch:
        """Return what a batch of questions holds, see the module."""
        counts = [len(example.sequences) for example in examples]
        inside = [one for example in examples for one in example.fields["inside"]]
        widest = [one for example in examples for one in example.fields["widest"]]
        of_passage, of_widest = (np.zeros(int(batch["offsets"][-1]), np.bool_) for _ in range(2))
        for start, one, flags in zip(batch["offsets"].tolist()[:-1], inside, widest, strict=True):
            first = start + one.first
            of_passage[first : first + len(flags)] = True
            of_widest[first : first + len(flags)] = flags
        return {
            "question": torch.arange(len(examples)).repeat_interleave(torch.tensor(counts)),
            "share": torch.from_numpy(np.repeat(1 / np.array(counts, np.float32), counts)),
            "answer": torch.tensor([one for example in examples for one in example.fields["answer"]]),
            "passage": torch.from_numpy(of_passage),
            "widest": torch.from_numpy(of_widest),
            "asked": Asked([example.fields for example in examples], counts, inside),
        }

    def _blank(self, length: int) -> Example:
        blank = [np.zeros(length, np.int64)] * self.sequences_of_sample
        inside = [Inside(length - 1, np.empty((0, 2), np.int64))] * len(blank)
        none = {"answer": [[0, 0]] * len(blank), "widest": [np.empty(0, np.bool_)] * len(blank)}
        return Example(blank, blank, {"id": "", "passage": "", "answers": [], "inside": inside, **none})


class Inside(NamedTuple):
    """The passage in a window.

    Attributes:
        first: its first token, counted from the window's ``[CLS]``.
        characters: of the passage, that each of its tokens stands for: int64 [tokens, 2], from and to.
    """

    first: int
    characters: NDArray[np.int64]


class Asked:
    """The questions of a batch as text. It stays on the host, and nothing takes it apart, as it would a dictionary.

    Args:
        questions: ``id``, ``passage`` and ``answers`` of each; no answers where there is none in the passage.
        counts: windows of each.
        inside: the passage in each window.
    """

    def __init__(self, questions: Sequence[dict[str, Any]], counts: Sequence[int], inside: Sequence[Inside]):
        self.ids: list[str] = [question["id"] for question in questions]
        self.passages: list[str] = [question["passage"] for question in questions]
        self.answers: list[list[str]] = [question["answers"] for question in questions]
        self.first_window = [0, *accumulate(counts)]
        self.inside = list(inside)

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.ids)

    def text(self, question: int, window: int, first: int, last: int) -> str:
        """Return what a span says.

        Args:
            question: its number.
            window: its number in the batch.
            first: the span's first token, counted from the window's ``[CLS]``.
            last: its last.
        """
        before, characters = self.inside[window]
        start, stop = characters[first - before, 0], characters[last - before, 1]
        return self.passages[question][start:stop]


def windows(tokens: int, room: int, stride: int) -> NDArray[np.int64]:
    """Return the windows of a passage, first token and the one behind the last: int64 [windows, 2].

    Args:
        tokens: of the passage.
        room: tokens of a window at most.
        stride: tokens from a window's beginning to the next one's; no more than ``room`` where that is less.
    """
    step = min(stride, room)
    count = 1 + max(0, -(-(tokens - room) // step))
    first = np.arange(count) * step
    return np.stack([first, np.minimum(first + room, tokens)], axis=1)


def of_widest_context(found: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """Return in which window each token of a passage has the most context, int64 [tokens].

    Context is the lesser of the tokens to its left and to its right; what a window's length adds, and that the first
    of equals is taken, is the original's ``_check_is_max_context``.

    Args:
        found: the windows.
        tokens: of the passage.
    """
    first, stop = found[:, :1], found[:, 1:]
    place = np.arange(tokens)
    context = np.minimum(place - first, stop - 1 - place)
    score = np.where(context < 0, -1.0, context + _LENGTH_COUNTS * (stop - first))
    return score.argmax(axis=0)


def _covering(characters: NDArray[np.int64], start: int, length: int) -> tuple[int, int] | None:
    """Return the first and the last token that stand for any of some characters, ``None`` where none does."""
    inside = np.flatnonzero((characters[:, 1] > start) & (characters[:, 0] < start + length))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None
