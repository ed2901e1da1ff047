"""Attention over packed sequences: they lie one after the other, without padding, and none sees another.

Shapes: T tokens of all sequences together, N sequences, S tokens of a sequence at most, h heads, d the width of a head.
"""

from __future__ import annotations

import functools
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
    if query_Thd.is_cuda and query_Thd.dtype in _FLASH and query_Thd.shape[2] % 8 == 0 and _has_flash(query_Thd.device):
        ends, longest = layout.offsets, layout.longest
        found = torch.ops.aten._flash_attention_forward(
            query_Thd, key_Thd, value_Thd, ends, ends, longest, longest, dropout, causal, False
        )
        return found[0]
    return _in_groups((query_Thd, key_Thd, value_Thd), layout, dropout, causal)


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Return whether a GPU is one that the flash kernel is made for: Ampere and later, or AMD's."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.disable  # it would be compiled anew for the lengths of each batch
def _in_groups(tensors: tuple[Tensor, Tensor, Tensor], layout: Layout, dropout: float, causal: bool) -> Tensor:
    groups, place_T = layout.groups
    parts = [_of_group(tensors, group, dropout, causal) for group in groups]
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    return together if place_T is None else together[place_T]


def _of_group(tensors: tuple[Tensor, Tensor, Tensor], group: Group, dropout: float, causal: bool) -> Tensor:
    """Return the attention of a group's tokens, shape [its tokens, h, d]."""
    if isinstance(group.tokens, slice):
        dense = [x[group.tokens].unflatten(0, (-1, group.longest)) for x in tensors]
    else:
        dense = [x[group.tokens] for x in tensors]
    query, key, value = dense
    found = _dense(query, key, value, group.mask_N11L, dropout, causal).flatten(0, 1)
    return found if group.kept is None else found[group.kept]


def _dense(
    query_NLhd: Tensor, key_NLhd: Tensor, value_NLhd: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    """Return attention over padded sequences, shape [N, L, h, d].

    What is behind a sequence's end is behind all its tokens: under a causal mask none of them sees it.
    """
    query, key, value = (x.transpose(1, 2) for x in (query_NLhd, key_NLhd, value_NLhd))
    mask = None if causal else mask
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return found.transpose(1, 2)


class Cache:
    """Keys and values that a left-to-right layer has computed, so that later tokens need not compute them again.

    The first call brings the beginnings of all sequences, of any lengths; each later one a token of each sequence.

    Args:
        size: S.
    """

    def __init__(self, size: int):
        self.size = size
        self.length_N: Tensor | None = None
        """Tokens of each sequence so far, int64."""
        self.longest = 0

    def attend(self, query_Thd: Tensor, key_Thd: Tensor, value_Thd: Tensor, layout: Layout) -> Tensor:
        """Return the attention of new tokens over those before them and themselves, shape [T, h, d].

        Args:
            query_Thd: Q of the new tokens.
            key_Thd: K.
            value_Thd: V.
            layout: where they lie.
        """
        if self.length_N is None:
            self._begin(key_Thd, value_Thd, layout)
            return attention(query_Thd, key_Thd, value_Thd, layout, causal=True)
        row_N = torch.arange(len(self.length_N), device=key_Thd.device)
        self.key_NShd[row_N, self.length_N], self.value_NShd[row_N, self.length_N] = key_Thd, value_Thd
        self.longest += 1
        seen_NS = torch.arange(self.longest, device=key_Thd.device) <= self.length_N[:, None]
        self.length_N = self.length_N + 1
        key_NShd, value_NShd = self.key_NShd[:, : self.longest], self.value_NShd[:, : self.longest]
        return _dense(query_Thd[:, None], key_NShd, value_NShd, seen_NS[:, None, None], 0.0, causal=False)[:, 0]

    def _begin(self, key_Thd: Tensor, value_Thd: Tensor, layout: Layout) -> None:
        """Keep the beginning of each sequence."""
        length_N = layout.offsets.diff().long()
        row_T = torch.arange(len(length_N), device=key_Thd.device).repeat_interleave(length_N)
        place_T = torch.arange(len(key_Thd), device=key_Thd.device) - layout.first.long()[row_T]
        shape = (len(length_N), self.size, *key_Thd.shape[1:])
        self.key_NShd, self.value_NShd = key_Thd.new_zeros(shape), value_Thd.new_zeros(shape)
        self.key_NShd[row_T, place_T], self.value_NShd[row_T, place_T] = key_Thd, value_Thd
        self.length_N, self.longest = length_N, layout.longest
