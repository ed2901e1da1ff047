"""Attention over packed sequences: they lie one after the other, without padding, and none sees another.

Shapes: T tokens of all sequences together, N sequences, h heads, d the width of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_WASTE = 0.75
"""Sequences are computed together where the shortest has at least this share of the longest's tokens."""
_MANY = 4  # sequences of one length, from which on they are a group of their own
_FLASH = (torch.float16, torch.bfloat16)


class Group(NamedTuple):
    """Sequences of like length that are computed together: N of at most L tokens.

    Attributes:
        longest: L.
        tokens: which token is at each place: a slice where they lie one after the other and are of one length; else
            int64 [N, L], where a place behind a sequence's end has its last token.
        mask_N11L: which places are tokens, bool; ``None`` where all are.
        kept: the places that are tokens, int64; ``None`` where all are.
    """

    longest: int
    tokens: slice | Tensor
    mask_N11L: Tensor | None = None
    kept: Tensor | None = None


class Layout:
    """Where the sequences of a packed batch lie.

    Args:
        lengths: tokens of each sequence, known to the host.
        offsets: where each sequence begins, and where the last ends: int32 [N + 1], on the device.
    """

    def __init__(self, lengths: Sequence[int], offsets: Tensor):
        self.lengths, self.offsets = list(lengths), offsets
        self.longest = max(self.lengths)

    @property
    def first(self) -> Tensor:
        """Return the first token of each sequence, int32 [N]."""
        return self.offsets[:-1]

    @property
    def last(self) -> Tensor:
        """Return the last token of each sequence, int32 [N]."""
        return self.offsets[1:] - 1

    @cached_property
    def groups(self) -> tuple[list[Group], Tensor | None]:
        """Return the groups, and where in their order each token is, int64 [T]; ``None`` where that is the batch's."""
        ends = list(accumulate(self.lengths))
        groups, order = [], []
        for members in _alike(self.lengths):
            sizes = [self.lengths[member] for member in members]
            first, last = ends[members[0]] - sizes[0], ends[members[-1]]
            follow = members == list(range(members[0], members[0] + len(members)))
            if follow and sizes[0] == sizes[-1]:
                groups.append(Group(sizes[0], slice(first, last)))
            else:
                groups.append(_padded(torch.tensor(sizes), torch.tensor([ends[m] for m in members]), self._device))
            order += [at for member in members for at in range(ends[member] - self.lengths[member], ends[member])]
        if order == list(range(len(order))):
            return groups, None
        place_T = torch.empty(len(order), dtype=torch.int64)
        place_T[torch.tensor(order)] = torch.arange(len(order))
        return groups, place_T.to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.offsets.device


def _padded(size_N: Tensor, end_N: Tensor, device: torch.device) -> Group:
    """Return sequences of these sizes, which end there, as a group."""
    at_L = torch.arange(int(size_N.max()))
    inside_NL = at_L < size_N[:, None]
    token_NL = end_N[:, None] - size_N[:, None] + torch.minimum(at_L, size_N[:, None] - 1)
    if bool(inside_NL.all()):
        return Group(len(at_L), token_NL.to(device))
    kept = inside_NL.flatten().nonzero()[:, 0]
    return Group(len(at_L), token_NL.to(device), inside_NL[:, None, None].to(device), kept.to(device))


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of sequences in groups of like length, the longest first; many of one length are a group."""
    found: list[list[int]] = []
    counts = Counter(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        size = lengths[number]
        longest = lengths[found[-1][0]] if found else 0
        alone = counts[longest] >= _MANY or counts[size] >= _MANY
        if not found or size < _WASTE * longest or (alone and size != longest):
            found.append([])
        found[-1].append(number)
    return found


def attention(
    query_Thd: Tensor, key_Thd: Tensor, value_Thd: Tensor, layout: Layout, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V inside each sequence (Vaswani et al. 2017, equation 1), shape [T, h, d].

    16-bit tensors on CUDA go through the flash kernel for sequences of varying length. Elsewhere sequences of like
    length are computed together, and of equal length without a copy.

    Args:
        query_Thd: Q.
        key_Thd: K.
        value_Thd: V.
        layout: where the sequences lie.
        dropout: of the attention's probabilities.
        causal: whether a token sees those before it and itself alone.
    """
    if query_Thd.is_cuda and query_Thd.dtype in _FLASH:
        ends, longest = layout.offsets, layout.longest
        found = torch.ops.aten._flash_attention_forward(
            query_Thd, key_Thd, value_Thd, ends, ends, longest, longest, dropout, causal, False
        )
        return found[0]
    groups, place_T = layout.groups
    parts = [_of_group((query_Thd, key_Thd, value_Thd), group, dropout, causal) for group in groups]
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    return together if place_T is None else together[place_T]


def _of_group(tensors: tuple[Tensor, ...], group: Group, dropout: float, causal: bool) -> Tensor:
    """Return the attention of a group's tokens, shape [its tokens, h, d]."""
    if isinstance(group.tokens, slice):
        dense = [x[group.tokens].unflatten(0, (-1, group.longest)) for x in tensors]
    else:
        dense = [x[group.tokens] for x in tensors]
    found = _dense(*dense, group.mask_N11L, dropout, causal).flatten(0, 1)
    return found if group.kept is None else found[group.kept]


def _dense(
    query_NLhd: Tensor, key_NLhd: Tensor, value_NLhd: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    """Return attention over padded sequences, shape [N, L, h, d].

    What is behind a sequence's end is behind all its tokens: under a causal mask none of them sees it.
    """
    heads = [x.transpose(1, 2) for x in (query_NLhd, key_NLhd, value_NLhd)]
    mask = None if causal else mask
    found = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return found.transpose(1, 2)
