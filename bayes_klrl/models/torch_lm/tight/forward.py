"""A fast forward pass for the GPT-2 and Llama families: the model's own modules, our own loop and cache.

The modules of the model are called with their own weights, so LoRA adapters work unmerged and gradients flow. On a small
model Hugging Face's `generate` spends most of its time on masks that are rebuilt at every step, caches that grow by
concatenation and wrapped outputs; here these are left out. Prompts are padded on the left, with explicit positions, and
batches without padding have no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_klrl.models.memory import length_groups
from bayes_klrl.models.torch_lm.general.blocks import recomputed
from bayes_klrl.models.torch_lm.network import left_padded
from bayes_klrl.models.torch_lm.tight.families import Family, Layer, family_of
from bayes_klrl.typing import IntArray, TokenIds

__all__ = ["TightNetwork", "tight_network"]

GROWTH = 32
"""Number of positions added to a full buffer: one copy costs little compared to GROWTH attention steps over it."""

SHORT = 96
"""Up to this number of positions, keys and values are stored position by position, and attention is a sum in this order,
which takes two thirds of the time of torch's kernel. Beyond it, torch's kernel on storage head by head is faster."""


@dataclass(eq=False)
class Buffer:
    """Each layer's keys and values, shape (2, R, heads, capacity, head size); the first `filled` positions are in use."""

    layers: list[Tensor]
    filled: int


@dataclass(frozen=True, eq=False)
class Cache:
    """The first `length` positions of a buffer. Caches share buffers; a write to a position in use makes a copy first."""

    buffer: Buffer
    length: int
    padding: Tensor | None  # (R,) number of unused positions on the left; None if no row has any

    def writable(self) -> Buffer:
        """Return a buffer with these positions and a free one after them: the present buffer, or a copy."""
        full = self.buffer.layers[0].shape[3] == self.length
        if self.buffer.filled == self.length and not full:
            return self.buffer
        return Buffer([with_room(stored[..., : self.length, :]) for stored in self.buffer.layers], self.length)


def with_room(stored: Tensor) -> Tensor:
    """Return a copy of one layer's keys and values with free positions at the end."""
    length = stored.shape[3]
    copy = empty_layer(stored, stored.shape[1], length + GROWTH)
    copy[..., :length, :] = stored
    return copy


def picked(stored: Tensor, length: int, rows: Tensor, room: int = GROWTH) -> Tensor:
    """Return a copy of some rows of one layer's first `length` positions, with `room` free positions at the end."""
    copy = empty_layer(stored, len(rows), length + room)
    # in the order (position, row, head, size) of short buffers, so that whole positions are copied at once
    for source, target in zip(stored.permute(0, 3, 1, 2, 4), copy.permute(0, 3, 1, 2, 4), strict=True):
        torch.index_select(source[:length], 1, rows, out=target[:length])
    return copy


def empty_layer(like: Tensor, num_rows: int, capacity: int) -> Tensor:
    """Return empty storage for keys and values, (2, R, heads, capacity, size); position by position if it is short."""
    _, _, num_heads, _, size = like.shape
    if capacity <= SHORT:
        return like.new_empty((2, capacity, num_rows, num_heads, size)).permute(0, 2, 3, 1, 4)
    return like.new_empty((2, num_rows, num_heads, capacity, size))


class Memory(Protocol):
    """The keys and values of earlier positions."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values (R, heads, positions, head size), the given ones last."""


@dataclass(frozen=True, eq=False)
class WrittenMemory:
    """Decoding: new keys and values are written into a buffer in place."""

    buffer: Buffer
    length: int

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        stored_keys, stored_values = self.buffer.layers[layer][..., :end, :].unbind(0)
        stored_keys[:, :, self.length :] = keys
        stored_values[:, :, self.length :] = values
        return stored_keys, stored_values


@dataclass(frozen=True, eq=False)
class NewMemory:
    """Prompts: there is nothing before them. The keys and values of each layer are kept for what follows."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.kept.setdefault(layer, (keys, values))  # a layer that is computed again keeps nothing
        return keys, values


@dataclass(frozen=True, eq=False)
class JoinedMemory:
    """Scoring: new keys and values are concatenated to those of each row's prompt, so that gradients flow through both."""

    past: NewMemory
    owners: Tensor  # (R,) the prompt of each row

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        past_keys, past_values = (each.index_select(0, self.owners) for each in self.past.kept[layer])
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)


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
    """Return softmax(q k' scale) v of queries (R, H, S, d), keys and values (R, H / G, L, d), shape (R S, H d).

    The G query heads that share a key head are treated as further queries, so keys and values are never repeated.
    """
    num_rows, num_heads, num_queries, size = queries.shape
    groups = num_heads // keys.shape[1]
    if num_queries == 1 and groups == 1 and keys.shape[2] <= SHORT:
        return stream(queries, keys, values, mask, scale)
    if groups > 1:
        queries = queries.reshape(num_rows, -1, groups * num_queries, size)
        mask = None if mask is None else mask.repeat(1, 1, groups, 1)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    if groups > 1:
        attended = attended.reshape(num_rows, num_heads, num_queries, size)
    return attended.transpose(1, 2).reshape(num_rows * num_queries, num_heads * size)


def stream(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the same as `attend` for one query per head, by products and sums in the order of storage."""
    keys, values = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)  # (L, R, H, d), the order of storage
    scores = (keys * queries[:, :, 0]).sum(-1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0].permute(2, 0, 1), float("-inf"))
    return (scores.softmax(0).unsqueeze(-1) * values).sum(0).flatten(1)


class TightNetwork:
    """See `Network`. The features are the hidden states after the final norm.

    With `recompute` the activations inside each layer are computed again in the backward pass of `features`.
    """

    def __init__(self, family: Family, vocab_size: int, *, recompute: bool = False) -> None:
        self.family, self.vocab_size, self.width = family, vocab_size, family.width
        self.recompute = recompute

    @torch.no_grad()
    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, Cache]:
        """See `Network.prefill`. Prompts of very different lengths are read in batches of like length."""
        groups = length_groups([len(prompt) for prompt in prompts])
        if len(groups) == 1:
            return self._read(prompts)
        return joined_rows([self._read([prompts[p] for p in group]) for group in groups], np.concatenate(groups))

    def _read(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, Cache]:
        """Return the features after each prompt and the cache, from one padded batch."""
        tokens, padding = self._padded(prompts)
        memory = NewMemory()
        hidden = self._forward(tokens, 0, padding, memory)
        length = tokens.shape[1]
        layers = [torch.stack(pair) for pair in memory.kept.values()]
        return hidden[:, -1], Cache(Buffer(layers, length), length, padding)

    @torch.no_grad()
    def step(self, cache: Cache, tokens: Tensor) -> tuple[Tensor, Cache]:
        """See `Network.step`."""
        buffer, length = cache.writable(), cache.length
        buffer.filled = length + 1  # in use from here on, even if the forward below fails
        hidden = self._forward(tokens[:, None], length, cache.padding, WrittenMemory(buffer, length))
        return hidden[:, -1], Cache(buffer, length + 1, cache.padding)

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        """See `Network.select`."""
        return self.select_with_room(cache, rows, GROWTH)

    def select_with_room(self, cache: Cache, rows: Tensor, room: int) -> Cache:
        """Return the cache of the given rows, with room for so many more tokens."""
        layers = [picked(stored, cache.length, rows, room) for stored in cache.buffer.layers]
        padding = None if cache.padding is None else cache.padding[rows]
        return Cache(Buffer(layers, cache.length), cache.length, padding)

    def features(self, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
        """See `Network.features`. Each prompt is read once, then all its completions are read in one forward pass."""
        prompt_tokens, padding = self._padded(prompts)
        prefix = NewMemory()
        first = self._forward(prompt_tokens, 0, padding, prefix)[:, -1:].index_select(0, owners)
        if tokens.shape[1] == 1:
            return first
        padding = None if padding is None else padding[owners]
        rest = self._forward(tokens[:, :-1], prompt_tokens.shape[1], padding, JoinedMemory(prefix, owners))
        return torch.cat([first, rest], dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """See `Network.logits`."""
        return self.family.head(features).float()

    def _padded(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, Tensor | None]:
        tokens, padding = left_padded(prompts, self.family.device)
        return tokens, padding if len(set(map(len, prompts))) > 1 else None

    def _forward(self, tokens: Tensor, start: int, padding: Tensor | None, memory: Memory) -> Tensor:
        """Return the hidden states of `tokens` (R, S), whose positions start at `start`, shape (R, S, D)."""
        family, num_new = self.family, tokens.shape[1]
        positions = torch.arange(start, start + num_new, device=tokens.device)[None]
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        mask = attention_mask(num_new, start + num_new, padding, tokens.device)
        hidden, rotation = family.embed(tokens, positions)
        by_row = hidden.shape[:2]
        hidden = hidden.flatten(0, 1)

        def after(index: int, layer: Layer, hidden: Tensor) -> Tensor:
            """Return the hidden states after a layer."""
            queries, keys, values = (by_head(part, *by_row) for part in layer.heads(hidden, rotation))
            keys, values = memory.extend(index, keys, values)
            return layer.finish(hidden, attend(queries, keys, values, mask, layer.scale))

        again = self.recompute and torch.is_grad_enabled()
        for index, layer in enumerate(family.layers):
            hidden = recomputed(after, index, layer, hidden) if again else after(index, layer, hidden)
        return family.final_norm(hidden).view(*by_row, -1)


def joined_rows(parts: Sequence[tuple[Tensor, Cache]], order: IntArray) -> tuple[Tensor, Cache]:
    """Return features and caches of several batches as those of one; `order` holds the place of each of their rows.

    Shorter caches are padded on the left, as the prompts of one batch are.
    """
    length = max(cache.length for _, cache in parts)
    features = torch.cat([features for features, _ in parts])
    # zeros: numbers that are masked must not be NaN
    layers = [empty_layer(stored, len(features), length).zero_() for stored in parts[0][1].buffer.layers]
    first, paddings = 0, []
    for own, cache in parts:
        for whole, stored in zip(layers, cache.buffer.layers, strict=True):
            whole[:, first : first + len(own), :, length - cache.length :] = stored[..., : cache.length, :]
        padding = torch.zeros(len(own), dtype=torch.long, device=own.device) if cache.padding is None else cache.padding
        paddings.append(padding + length - cache.length)
        first += len(own)
    place = torch.as_tensor(order.argsort(), device=features.device)
    joint = [torch.index_select(stored, 1, place) for stored in layers]
    return features[place], Cache(Buffer(joint, length), length, torch.cat(paddings)[place])


def by_head(flat: Tensor, num_rows: int, num_new: int) -> Tensor:
    """Return heads (R S, H, d) as (R, H, S, d)."""
    if num_new == 1:
        return flat.unsqueeze(2)
    return flat.view(num_rows, num_new, *flat.shape[1:]).transpose(1, 2)


def tight_network(module: nn.Module, vocab_size: int) -> TightNetwork | None:
    """Return the tight network of a model; None if its architecture or configuration is not on the allow-list."""
    family = family_of(module)
    return None if family is None else TightNetwork(family, vocab_size)
