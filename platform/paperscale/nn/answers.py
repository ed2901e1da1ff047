"""Scores of answers to questions, as the official scripts of SQuAD count them.

``evaluate-v1.1.py`` of Rajpurkar et al. 2016 and ``evaluate-v2.0.py`` of Rajpurkar et al. 2018 agree but for answers
without a word: of two such, v2.0 says that they have all words in common, v1.1 that they have none.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return an answer without what is not compared: case, punctuation of ASCII, English articles, extra space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if two answers are the same, normalised, else 0."""
    return float(normalized(answer) == normalized(gold))


def f1_of_words(answer: str, gold: str, empty_agree: bool) -> float:
    """Return the F1 of the words that two answers have in common, from 0 to 1.

    Args:
        answer: what is scored.
        gold: the right one.
        empty_agree: whether two answers without a word agree (v2.0) or not (v1.1).
    """
    found, wanted = normalized(answer).split(), normalized(gold).split()
    if empty_agree and not (found and wanted):
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


class AnswerScores(Metric):
    """Exact match and F1 of answers, each the best over a question's right answers: shares of 1 over all questions.

    With ``no_answer`` a question may have none: an answer is given unless its score for having none exceeds that of the
    best span by more than the threshold. The best thresholds are found as ``find_best_thresh`` does, over the best
    spans of all questions.

    Args:
        no_answer: count as v2.0 does, instead of as v1.1.
        threshold: above which no answer is given.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, no_answer: bool = False, threshold: float = 0.0):
        super().__init__()
        self.no_answer, self.threshold = no_answer, threshold
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, answers: Sequence[str], golds: Sequence[Sequence[str]], differences: Sequence[float]) -> None:
        """Add questions.

        Args:
            answers: the best span of each, whether or not it is given in the end.
            golds: the right answers of each, none where there is none.
            differences: score for having no answer, less the best span's, of each.
        """
        rows = [self._row(*question) for question in zip(answers, golds, differences, strict=True)]
        self.rows.append(torch.tensor(rows, dtype=torch.float64, device=self.device).view(-1, 6))

    def _row(self, answer: str, golds: Sequence[str], difference: float) -> tuple[float, ...]:
        """Return a question's scores with its best span, and with no answer; its difference; what kind it is."""
        right = [gold for gold in golds if normalized(gold)] if self.no_answer else golds
        right = right or [""]
        exact = max(exact_match(answer, gold) for gold in right)
        f1 = max(f1_of_words(answer, gold, self.no_answer) for gold in right)
        without = max(exact_match("", gold) for gold in right)
        return exact, f1, without, difference, float(bool(golds)), float(bool(answer))

    def compute(self) -> dict[str, Tensor]:
        """Return ``exact_match`` and ``f1``.

        With ``no_answer`` also those of questions that have an answer, the share of the others that are given none, and
        what the best thresholds would give.
        """
        exact, f1, without, difference, has, says = dim_zero_cat(self.rows).unbind(1)
        if not self.no_answer:
            return {"exact_match": exact.mean(), "f1": f1.mean()}
        given = difference <= self.threshold
        exact_now, f1_now = (torch.where(given, score, without) for score in (exact, f1))
        answered = has.bool()
        found = {
            "exact_match": exact_now.mean(),
            "f1": f1_now.mean(),
            "answerable_exact_match": exact_now[answered].mean(),
            "answerable_f1": f1_now[answered].mean(),
            "unanswerable_accuracy": exact_now[~answered].mean(),
        }
        for name, score in (("exact_match", exact), ("f1", f1)):
            best, threshold = _best_threshold(score, difference, answered, says.bool())
            found |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
        return {name: value.nan_to_num(0.0) for name, value in found.items()}  # of no such questions


def _best_threshold(score: Tensor, difference: Tensor, answered: Tensor, says: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best mean score over all thresholds, and the threshold; 0 where it is best to answer nothing.

    From the question that surely has an answer to the one that surely has none: a right answer gains its score, an
    answer to a question that has none loses 1.
    """
    order = difference.argsort(stable=True)
    gain = torch.where(answered, score, -says.to(score.dtype))[order]
    nothing = (~answered).sum().to(score.dtype)
    totals = nothing + gain.cumsum(0)
    best = totals.max()
    if best <= nothing:
        return nothing / len(score), torch.zeros_like(nothing)
    first = (totals == best).nonzero()[0, 0]
    return best / len(score), difference[order][first]
