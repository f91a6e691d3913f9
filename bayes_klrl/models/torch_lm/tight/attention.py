"""Attention of the tight network: of many queries per head by torch's kernel, of one query over the parts of a cache.

    softmax(q k' scale) v

(Vaswani et al. 2017, section 3.2.1). R rows, H query heads, H / G key heads, S queries and L keys per head, d its size. The G
query heads that share a key head are treated as further queries, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Part", "attend", "attend_one", "attention_mask"]

Part: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of successive positions, each of shape (R, H / G, positions, d)."""


def attention_mask(num_queries: int, num_keys: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a mask of the keys that each query attends to, shape (R or 1, 1, queries, keys); None for all.

    A query on a padded position attends to itself. Its output is never used, but it must not be NaN.
    """
    if num_queries == 1 and padding is None:
        return None
    keys = torch.arange(num_keys, device=device)
    queries = keys[num_keys - num_queries :, None]
    if padding is None:
        return (keys <= queries)[None, None]
    real = keys >= padding[:, None, None, None]
    return ((keys <= queries) & real) | (keys == queries)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attended values (R S, H d) of queries (R, H, S, d), by torch's kernel."""
    num_rows, num_heads, num_queries, size = queries.shape
    groups = num_heads // keys.shape[1]
    if groups > 1:
        queries = queries.reshape(num_rows, -1, groups * num_queries, size)
        mask = None if mask is None else mask.repeat(1, 1, groups, 1)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    if groups > 1:
        attended = attended.reshape(num_rows, num_heads, num_queries, size)
    return attended.transpose(1, 2).reshape(num_rows * num_queries, num_heads * size)


def attend_one(queries: Tensor, parts: Sequence[Part], mask: Tensor | None, scale: float) -> Tensor:
    """Return the attended values (R, H d) of one query per head (R, H, 1, d) over the parts of a cache, on a CPU.

    All parts but the last are read by batched products, which is fast where each head's keys lie together without gaps. The
    last part grows; it is stored position by position, and read in this order.
    """
    *blocks, (keys, values) = parts
    num_rows, key_heads, num_recent, size = keys.shape
    queries = (queries * scale).reshape(num_rows * key_heads, -1, size)  # (R H / G, G, d)
    by_position = queries.shape[1] == 1
    if by_position:
        scores = (keys.permute(2, 0, 1, 3) * queries.view(num_rows, key_heads, size)).sum(-1).flatten(1)  # (L, R H)
        if not blocks and mask is None:
            return weighted(values, scores.softmax(0)).view(num_rows, -1)
        scores = scores.t().unsqueeze(1)
    else:
        scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2))
    earlier = [torch.bmm(queries, block.flatten(0, 1).transpose(1, 2)) for block, _ in blocks]
    joint = torch.cat([*earlier, scores], dim=-1)
    if mask is not None:
        joint = joint.view(num_rows, -1, joint.shape[-1]).masked_fill(~mask[:, 0], float("-inf")).view(joint.shape)
    weights = joint.softmax(-1)  # (R H / G, G, L)
    of_recent, first = weights[..., -num_recent:], 0
    attended = weighted(values, of_recent[:, 0].t()) if by_position else torch.bmm(of_recent, values.flatten(0, 1))
    for _, block in blocks:
        last = first + block.shape[2]
        attended = torch.baddbmm(attended, weights[..., first:last], block.flatten(0, 1))
        first = last
    return attended.view(num_rows, -1)


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of values (R, H, L, d) times weights (L, R H), shape (R H, 1, d), in the order of positions."""
    num_rows, num_heads, num_positions, size = values.shape
    by_position = weights.view(num_positions, num_rows, num_heads, 1)
    return (by_position * values.permute(2, 0, 1, 3)).sum(0).view(-1, 1, size)
