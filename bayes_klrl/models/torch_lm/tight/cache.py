"""Keys and values of earlier positions: where they are stored while completions grow, and how a layer gets at them.

While completions grow on a CPU, reading keys and values takes most of a step, and how they lie in memory decides how long it
takes. New positions are stored position by position in a short buffer. A full buffer becomes a *block*, in which the positions
of each head lie together without gaps; blocks are never written again. Products over such blocks take half the time of sums in
the order of storage, and a third of products over storage with free positions in between.

On other devices, and in half precision, where torch's kernel computes attention with more precision than products in halves
have, there are no blocks: all positions are in one buffer, head by head, which is copied to a larger one when it is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from bayes_klrl.models.torch_lm.tight import pool
from bayes_klrl.models.torch_lm.tight.attention import Part

__all__ = ["Cache", "JoinedMemory", "Memory", "NewMemory", "WrittenMemory"]

BLOCK = 48
"""Number of positions of a full buffer on a CPU."""

GROWTH = 32
"""Number of positions added to a full buffer elsewhere: one copy costs little compared to GROWTH steps over it."""

Layers: TypeAlias = list[Tensor]
"""The keys and values of each layer, shape (2, R, heads, positions, size)."""


@dataclass(eq=False)
class Buffer:
    """Each layer's keys and values, shape (2, R, heads, capacity, size); the first `filled` positions are in use."""

    layers: Layers
    filled: int

    @property
    def capacity(self) -> int:
        """Number of positions, used or free."""
        return self.layers[0].shape[3]


@dataclass(frozen=True, eq=False)
class Cache:
    """Some blocks, and the first `recent` positions of a buffer.

    Caches share blocks and buffers; a write to a position in use makes a copy of the buffer first.
    """

    blocks: tuple[Layers, ...]
    buffer: Buffer
    recent: int
    padding: Tensor | None  # (R,) number of unused positions on the left; None if no row has any

    @classmethod
    def of(cls, layers: Layers, padding: Tensor | None) -> Cache:
        """Return the cache with these positions, of which each head's lie together."""
        length = layers[0].shape[3]
        if not has_blocks(layers[0]):
            return cls((), Buffer(layers, length), length, padding)
        if length >= BLOCK:
            return cls((layers,), Buffer([empty_layer(stored, BLOCK) for stored in layers], 0), 0, padding)
        return cls((), Buffer([with_capacity(stored, BLOCK) for stored in layers], length), length, padding)

    @property
    def length(self) -> int:
        """Number of positions."""
        return sum(block[0].shape[3] for block in self.blocks) + self.recent

    def whole(self) -> Layers:
        """Return the keys and values of all positions, each layer in one tensor."""
        parts = [*self.blocks, [stored[..., : self.recent, :] for stored in self.buffer.layers]]
        return [torch.cat(of_layer, dim=3) for of_layer in zip(*parts, strict=True)]

    def writable(self) -> Cache:
        """Return a cache of these positions whose buffer has a free position after them: this one, or a new one."""
        layers, recent = self.buffer.layers, self.recent
        if recent < self.buffer.capacity:
            if self.buffer.filled == recent:
                return self
            copies = [with_capacity(stored[..., :recent, :], self.buffer.capacity) for stored in layers]
            return replace(self, buffer=Buffer(copies, recent))
        if has_blocks(layers[0]):
            block = [together(stored) for stored in layers]
            empty = Buffer([empty_layer(stored, BLOCK) for stored in layers], 0)
            return replace(self, blocks=(*self.blocks, block), buffer=empty, recent=0)
        return replace(self, buffer=Buffer([with_capacity(stored, recent + GROWTH) for stored in layers], recent))

    def select(self, rows: Tensor, room: int = GROWTH) -> Cache:
        """Return the cache of some rows; without blocks, it has room for so many more positions."""
        blocks = tuple([chosen_rows(stored, rows) for stored in block] for block in self.blocks)
        capacity = self.buffer.capacity if has_blocks(self.buffer.layers[0]) else self.recent + room
        layers = [picked(stored, self.recent, rows, capacity) for stored in self.buffer.layers]
        padding = None if self.padding is None else self.padding[rows]
        return Cache(blocks, Buffer(layers, self.recent), self.recent, padding)


def has_blocks(stored: Tensor) -> bool:
    """Return whether keys and values of this device and precision are stored in blocks."""
    return stored.device.type == "cpu" and stored.dtype in (torch.float32, torch.float64)


def empty_layer(like: Tensor, capacity: int, num_rows: int | None = None) -> Tensor:
    """Return an empty buffer for one layer, (2, R, heads, capacity, size); on a CPU it is stored position by position."""
    _, rows, num_heads, _, size = like.shape
    num_rows = rows if num_rows is None else num_rows
    if has_blocks(like):
        return pool.empty((2, capacity, num_rows, num_heads, size), like).permute(0, 2, 3, 1, 4)
    return like.new_empty((2, num_rows, num_heads, capacity, size))


def together(stored: Tensor) -> Tensor:
    """Return a copy of one layer's positions, in which those of each head lie together."""
    return pool.empty(stored.shape, stored).copy_(stored)


def chosen_rows(stored: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of some rows of one layer of a block."""
    shape = (2, len(rows), *stored.shape[2:])
    return torch.index_select(stored, 1, rows, out=pool.empty(shape, stored))


def with_capacity(stored: Tensor, capacity: int) -> Tensor:
    """Return a buffer of a capacity that begins with these positions of one layer."""
    copy = empty_layer(stored, capacity)
    copy[..., : stored.shape[3], :] = stored
    return copy


def picked(stored: Tensor, length: int, rows: Tensor, capacity: int) -> Tensor:
    """Return a buffer of a capacity with some rows of one layer's first `length` positions."""
    copy = empty_layer(stored, capacity, len(rows))
    # in the order (position, row, head, size) of a buffer on a CPU, so that whole positions are copied at once
    for source, target in zip(stored.permute(0, 3, 1, 2, 4), copy.permute(0, 3, 1, 2, 4), strict=True):
        torch.index_select(source[:length], 1, rows, out=target[:length])
    return copy


class Memory(Protocol):
    """The keys and values of earlier positions, as a layer sees them."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> Sequence[Part]:
        """Return one layer's keys and values in parts, the given ones (R, heads, positions, size) last."""


@dataclass(frozen=True, eq=False)
class WrittenMemory:
    """Decoding: new keys and values are written into a cache's buffer in place."""

    cache: Cache

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> Sequence[Part]:
        """See `Memory`."""
        start = self.cache.recent
        stored_keys, stored_values = self.cache.buffer.layers[layer][..., : start + keys.shape[2], :].unbind(0)
        stored_keys[:, :, start:] = keys
        stored_values[:, :, start:] = values
        parts = [(block[layer][0], block[layer][1]) for block in self.cache.blocks]
        return [*parts, (stored_keys, stored_values)]


@dataclass(frozen=True, eq=False)
class NewMemory:
    """Prompts: there is nothing before them. The keys and values of each layer are kept for what follows."""

    kept: dict[int, Part] = field(default_factory=dict)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> Sequence[Part]:
        """See `Memory`."""
        self.kept.setdefault(layer, (keys, values))  # a layer that is computed again keeps nothing
        return [(keys, values)]


@dataclass(frozen=True, eq=False)
class JoinedMemory:
    """Scoring: new keys and values are concatenated to those of each row's prompt, so that gradients flow through both."""

    past: NewMemory
    owners: Tensor  # (R,) the prompt of each row

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> Sequence[Part]:
        """See `Memory`."""
        past_keys, past_values = (each.index_select(0, self.owners) for each in self.past.kept[layer])
        return [(torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2))]
