"""F1 of names in text, as ``conlleval`` of the CoNLL shared tasks counts them (Tjong Kim Sang and De Meulder 2003)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from paperscale.errors import UserError

OUTSIDE = "O"


class EntityF1(Metric):
    """Precision, recall and F1 of whole names: one is right where its first word, last word and kind are.

    A name begins at ``B-``; and at ``I-`` where no name of that kind goes on: after ``O``, after a name of another
    kind, or at the beginning of a sentence. So IOB1 and BIO are both counted, and tags that no scheme allows.

    Args:
        tags: ``O``, and ``B-`` or ``I-`` and a kind, by their numbers.

    Raises:
        UserError: a tag is none of these.
    """

    full_state_update = False
    correct: Tensor
    found: Tensor
    wanted: Tensor

    def __init__(self, tags: Sequence[str]):
        super().__init__()
        kinds = list(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))
        for tag in tags:
            if tag != OUTSIDE and (tag[:2] not in ("B-", "I-") or not tag[2:]):
                raise UserError(
                    f"model.tags: '{tag}' is neither {OUTSIDE} nor B- or I- and a kind; name the set's tags"
                )
        self.kinds = [0 if tag == OUTSIDE else 1 + kinds.index(tag[2:]) for tag in tags]
        self.begins = [tag.startswith("B-") for tag in tags]
        for name in ("correct", "found", "wanted"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, tag_W: Tensor, gold_W: Tensor, first_W: Tensor) -> None:
        """Add words, sentence after sentence.

        Args:
            tag_W: the numbers of the tags that were found, int64.
            gold_W: of the right ones.
            first_W: which words begin a sentence, bool.
        """
        kind_of, begins = (torch.tensor(of, device=tag_W.device) for of in (self.kinds, self.begins))
        found_W, wanted_W = (_ends(kind_of[tags], begins[tags], first_W) for tags in (tag_W, gold_W))
        same_W = (found_W == wanted_W) & (kind_of[tag_W] == kind_of[gold_W])
        self.correct += (same_W & (found_W >= 0)).sum()
        self.found += (found_W >= 0).sum()
        self.wanted += (wanted_W >= 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``f1``, ``precision`` and ``recall``, from 0 to 1."""
        precision = self.correct / self.found.clamp(min=1)
        recall = self.correct / self.wanted.clamp(min=1)
        both = (precision + recall).clamp(min=torch.finfo(precision.dtype).tiny)
        return {"f1": 2 * precision * recall / both, "precision": precision, "recall": recall}


def _ends(kind_W: Tensor, begins_W: Tensor, first_W: Tensor) -> Tensor:
    """Return, for each word with which a name begins, its last word; -1 for all others."""
    inside_W, goes_on_W = kind_W > 0, torch.zeros_like(first_W)
    goes_on_W[1:] = inside_W[1:] & (kind_W[1:] == kind_W[:-1]) & ~begins_W[1:] & ~first_W[1:]
    last_W = inside_W.clone()
    last_W[:-1] &= ~goes_on_W[1:]
    end_W = torch.full_like(kind_W, -1)
    end_W[inside_W & ~goes_on_W] = last_W.nonzero()[:, 0]  # as many, in the same order
    return end_W
