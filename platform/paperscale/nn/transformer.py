"""Parts of Transformers over packed sequences.

Shapes: T tokens of all sequences together, H the width, V the vocabulary, M rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from paperscale.errors import UserError
from paperscale.nn.attention import Cache, Layout, attention
from paperscale.nn.losses import Entropies, linear_cross_entropy


class SelfAttention(nn.Module):
    """Multi-head self-attention inside each sequence (Vaswani et al. 2017, section 3.2.2).

    Args:
        width: H.
        heads: each of width H / heads.
        dropout: of the attention's probabilities.
        causal: whether a token sees those before it and itself alone.

    Raises:
        UserError: the width cannot be divided over the heads.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = False):
        super().__init__()
        if width % heads:
            raise UserError(f"a width of {width} cannot be divided over {heads} heads; use a multiple of {heads}")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x_TH: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Return the attended values, shape [T, H].

        Args:
            x_TH: the tokens.
            layout: where their sequences lie.
            cache: of the tokens before them, to which they are added; where the sequences are made token by token.
        """
        q, k, v = (part(x_TH).unflatten(1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        if cache is not None:
            return self.output(cache.attend(q, k, v, layout).flatten(1))
        dropout = self.dropout if self.training else 0.0
        return self.output(attention(q, k, v, layout, dropout, self.causal).flatten(1))


class Vocabulary(nn.Module):
    """The output layer of a language model: the token embeddings again, and perhaps a bias of its own.

    Args:
        embedding: whose weights are shared (Press & Wolf 2017).
        bias: whether each token has a bias.
    """

    def __init__(self, embedding: nn.Embedding, bias: bool = True):
        super().__init__()
        self.weight = embedding.weight
        self.bias = nn.Parameter(embedding.weight.new_zeros(embedding.num_embeddings)) if bias else None

    def forward(self, hidden_MH: Tensor, target_M: Tensor | None = None, share_M: Tensor | None = None) -> Any:
        """Return the cross-entropies of targets, without ever holding all logits; without targets, the logits [M, V].

        Args:
            hidden_MH: what the layer is applied to.
            target_M: the right token of each row.
            share_M: the weight of each row in the loss.
        """
        if target_M is None or share_M is None:
            return F.linear(hidden_MH, self.weight, self.bias)
        found: Entropies = linear_cross_entropy(hidden_MH, self.weight, self.bias, target_M, share_M)
        return found


class Perplexity(MeanMetric):
    """The exponential of a mean cross-entropy in nats."""

    def compute(self) -> Tensor:
        """Return e to the mean."""
        return super().compute().exp()


class BitsPerToken(MeanMetric):
    """A mean cross-entropy in nats, in bits."""

    def compute(self) -> Tensor:
        """Return the mean in bits."""
        return super().compute() / math.log(2)


class BitsPerByte(Metric):
    """The bits that a text is given in, over its bytes: it does not depend on the tokens that it is cut into."""

    nats: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "bytes"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, nats_M: Tensor, bytes_M: Tensor) -> None:
        """Add tokens.

        Args:
            nats_M: the cross-entropy of each.
            bytes_M: of the text that each stands for; 0 of a token that is no text, such as the end of a document.
        """
        self.nats += nats_M.sum()
        self.bytes += bytes_M.sum()

    def compute(self) -> Tensor:
        """Return the bits of a byte."""
        return self.nats / math.log(2) / self.bytes


def truncated_normal(module: nn.Module, std: float) -> None:
    """Draw matrices from a normal distribution cut off at two standard deviations; biases are 0, norms the identity."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
