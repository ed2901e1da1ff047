"""Which tokens a masked language model has to predict, and what it sees in their place (Devlin et al. 2019, A.1).

Pure functions of (seed, epoch, sample): what is drawn does not depend on ranks, workers or history.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paperscale.data.random import uniform
from paperscale.data.tokenizer import Tokenizer
from paperscale.errors import UserError

_ORDER, _KIND, _TOKEN = 1, 2, 3  # what is drawn for each token
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Masking(NamedTuple):
    """How tokens are masked.

    Attributes:
        rate: share of a sequence's tokens, special ones counted, that are predicted.
        mix: shares of these that are replaced by the mask, kept as they are, and replaced by a random token.
        whole_words: all pieces of a word or none.
        most: predictions of a sequence at most.
    """

    rate: float = 0.15
    mix: tuple[float, ...] = (0.8, 0.1, 0.1)
    whole_words: bool = False
    most: int | None = None

    def check(self) -> None:
        """Refuse what is no share.

        Raises:
            UserError: names the argument.
        """
        if not 0 < self.rate < 1:
            raise UserError(f"data.mask_rate={self.rate}: give a share between 0 and 1, such as 0.15")
        if len(self.mix) != 3 or min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-6:
            raise UserError(
                f"data.mask_mix={list(self.mix)}: give three shares, [mask, same, random], which add up to 1, such as "
                "[0.8, 0.1, 0.1]"
            )

    def predictions(self, lengths: Ints) -> Ints:
        """Return the predictions of sequences of so many tokens: at least one."""
        wanted = np.maximum(1, np.round(self.rate * lengths).astype(np.int64))
        return wanted if self.most is None else np.minimum(wanted, self.most)


class Vocabulary(NamedTuple):
    """What masking knows of a tokenizer.

    Attributes:
        size: number of tokens.
        begin: ``[CLS]``.
        end: ``[SEP]``.
        mask: ``[MASK]``.
        continues: which tokens go on with the word before them, bool [size].
    """

    size: int
    begin: int
    end: int
    mask: int
    continues: Bools

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Return a tokenizer's.

        Raises:
            UserError: it has no token for one of the roles.
        """
        begin, end, masked = (tokenizer.number(role) for role in ("begin", "end", "mask"))
        return cls(tokenizer.vocab_size, begin, end, masked, tokenizer.continues())


class Masked(NamedTuple):
    """Masked sequences, one after the other.

    Attributes:
        tokens: what the model sees, int64 [T].
        places: which of them it predicts, int64 [M].
        targets: what was there, int64 [M].
        counts: predictions of each sequence, int64 [N].
    """

    tokens: Ints
    places: Ints
    targets: Ints
    counts: Ints


def mask(
    tokens: Ints, lengths: Ints, how: Masking, vocabulary: Vocabulary, seed: int, epochs: Ints, samples: Ints
) -> Masked:
    """Mask sequences that lie one after the other.

    Args:
        tokens: int64 [T].
        lengths: of the sequences, int64 [N].
        how: how much, and with what.
        vocabulary: of the tokens.
        seed: of the draws, with what follows.
        epochs: of each sequence, int64 [N].
        samples: number of each sequence, int64 [N].
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    free = (tokens != vocabulary.begin) & (tokens != vocabulary.end)
    chosen = np.flatnonzero(
        _chosen(tokens, row, place, free, how.predictions(lengths), how, vocabulary, seed, epochs, samples)
    )
    keys = (seed, epochs[row[chosen]], samples[row[chosen]])
    kind = uniform(*keys, _KIND, place[chosen])
    instead = (uniform(*keys, _TOKEN, place[chosen]) * vocabulary.size).astype(np.int64)
    seen = tokens.copy()
    masked, same = kind < how.mix[0], kind < how.mix[0] + how.mix[1]
    seen[chosen] = np.where(masked, vocabulary.mask, np.where(same, tokens[chosen], instead))
    return Masked(seen, chosen, tokens[chosen], np.bincount(row[chosen], minlength=len(lengths)))


def _chosen(
    tokens: Ints,
    row: Ints,
    place: Ints,
    free: Bools,
    wanted: Ints,
    how: Masking,
    vocabulary: Vocabulary,
    seed: int,
    epochs: Ints,
    samples: Ints,
) -> Bools:
    """Return which tokens are predicted: the first ones of each sequence in a random order, special ones left out."""
    if how.whole_words:
        place = _word_starts(tokens, place, free, vocabulary)
    turn = uniform(seed, epochs[row], samples[row], _ORDER, place)
    candidates = np.flatnonzero(free)
    order = candidates[np.argsort(row[candidates] + turn[candidates], kind="stable")]
    if how.whole_words:
        return _whole_words(order, row, place, wanted)
    rows = row[order]
    first = np.searchsorted(rows, np.arange(len(wanted)))
    chosen = np.zeros(len(tokens), np.bool_)
    chosen[order[np.arange(len(order)) - first[rows] < wanted[rows]]] = True
    return chosen


def _word_starts(tokens: Ints, place: Ints, free: Bools, vocabulary: Vocabulary) -> Ints:
    """Return, for each token, the place of the first piece of its word."""
    starts = ~vocabulary.continues[tokens] | ~free
    starts[1:] |= ~free[:-1]
    starts[0] = True
    number = np.cumsum(starts) - 1
    return place[np.flatnonzero(starts)[number]]


def _whole_words(order: Ints, row: Ints, word: Ints, wanted: Ints) -> Bools:
    """Take words in their order; one whose pieces would be too many is passed over, as in the original code."""
    chosen = np.zeros(len(row), np.bool_)
    left = wanted.tolist()
    same = (row[order][1:] == row[order][:-1]) & (word[order][1:] == word[order][:-1])
    for pieces in np.split(order, np.flatnonzero(~same) + 1) if len(order) else ():
        of = int(row[pieces[0]])
        if len(pieces) <= left[of]:
            chosen[pieces] = True
            left[of] -= len(pieces)
    return chosen
