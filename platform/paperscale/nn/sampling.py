"""Drawing tokens from a language model's logits.

Shapes: N sequences, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paperscale.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: the logits are divided by the temperature, then the unlikely tokens left out.

    Attributes:
        temperature: below 1 prefers likely tokens; 0 takes the most likely.
        top_k: draw from this many of the most likely tokens (Radford et al. 2019, section 3.6; Fan et al. 2018);
            ``None`` for all.
        top_p: draw from the fewest of the most likely tokens that have this probability together, the nucleus
            (Holtzman et al. 2020, equation 2); 1 for all.
        seed: of the numbers that are drawn.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: give a number of at least 0; 0 takes the most likely")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: give a number of tokens of at least 1, or leave it out for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: give a probability above 0 and at most 1; 1 is all tokens")

    def kept(self, logits_NV: Tensor) -> Tensor:
        """Return the logits over the temperature, of what is left out minus infinity: float64 [N, V].

        Args:
            logits_NV: of the next token of each sequence.
        """
        logits_NV = logits_NV.double()
        logits_NV = (logits_NV - logits_NV.amax(1, keepdim=True)) / (self.temperature or 1.0)
        most = 1 if self.temperature == 0 else self.top_k
        if most is not None and most < logits_NV.shape[1]:
            out_NV = torch.ones_like(logits_NV, dtype=torch.bool).scatter(1, logits_NV.topk(most).indices, False)
            logits_NV = logits_NV.masked_fill(out_NV, float("-inf"))
        if self.top_p < 1:
            p_NV, token_NV = logits_NV.softmax(1).sort(descending=True)
            before_NV = p_NV.cumsum(1) - p_NV  # zero before the first, which is always kept
            out_NV = torch.zeros_like(p_NV, dtype=torch.bool).scatter(1, token_NV, before_NV >= self.top_p)
            logits_NV = logits_NV.masked_fill(out_NV, float("-inf"))
        return logits_NV

    def draw(self, logits_NV: Tensor, number_NV: Tensor) -> Tensor:
        """Return a token of each sequence, int64 [N].

        The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954; Maddison et al. 2014), and
        logits that differ by a rounding give the same token nearly always, as an inverted distribution would not.

        Args:
            logits_NV: of the next token of each sequence.
            number_NV: uniform in [0, 1), float64.
        """
        return (self.kept(logits_NV) - (-number_NV.log()).log()).argmax(1)
