"""A fast forward pass for the GPT-2 and Llama families: the model's own modules, our own loop and cache.

The modules of the model are called with their own weights, so LoRA adapters work unmerged and gradients flow. On a small
model Hugging Face's `generate` spends most of its time on masks that are rebuilt at every step, caches that grow by
concatenation and wrapped outputs; here these are left out. Prompts are padded on the left, with explicit positions, and
batches without padding have no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_klrl.models.memory import length_groups
from bayes_klrl.models.torch_lm.general.blocks import recomputed
from bayes_klrl.models.torch_lm.network import left_padded
from bayes_klrl.models.torch_lm.tight.attention import attend, attend_one, attention_mask
from bayes_klrl.models.torch_lm.tight.cache import Cache, JoinedMemory, Memory, NewMemory, WrittenMemory, has_blocks
from bayes_klrl.models.torch_lm.tight.families import Family, Layer, family_of
from bayes_klrl.typing import IntArray, TokenIds

__all__ = ["TightNetwork", "tight_network"]


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
        return hidden[:, -1], Cache.of([torch.stack(pair) for pair in memory.kept.values()], padding)

    @torch.no_grad()
    def step(self, cache: Cache, tokens: Tensor) -> tuple[Tensor, Cache]:
        """See `Network.step`."""
        cache = cache.writable()
        cache.buffer.filled = cache.recent + 1  # in use from here on, even if the forward below fails
        hidden = self._forward(tokens[:, None], cache.length, cache.padding, WrittenMemory(cache))
        return hidden[:, -1], replace(cache, recent=cache.recent + 1)

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        """See `Network.select`."""
        return cache.select(rows)

    def select_with_room(self, cache: Cache, rows: Tensor, room: int) -> Cache:
        """Return the cache of the given rows, with room for so many more tokens where the cache is one buffer."""
        return cache.select(rows, room)

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
            parts = memory.extend(index, keys, values)
            if isinstance(memory, WrittenMemory) and has_blocks(keys):
                return layer.finish(hidden, attend_one(queries, parts, mask, layer.scale))
            ((keys, values),) = parts
            return layer.finish(hidden, attend(queries, keys, values, mask, layer.scale))

        again = self.recompute and torch.is_grad_enabled()
        for index, layer in enumerate(family.layers):
            hidden = recomputed(after, index, layer, hidden) if again else after(index, layer, hidden)
        return family.final_norm(hidden).view(*by_row, -1)


def joined_rows(parts: Sequence[tuple[Tensor, Cache]], order: IntArray) -> tuple[Tensor, Cache]:
    """Return features and caches of several batches as those of one; `order` holds the place of each of their rows.

    Shorter caches are padded on the left, as the prompts of one batch are.
    """
    wholes = [cache.whole() for _, cache in parts]
    length = max(cache.length for _, cache in parts)
    features = torch.cat([features for features, _ in parts])
    paddings = []
    for own, cache in parts:
        padding = torch.zeros(len(own), dtype=torch.long, device=own.device) if cache.padding is None else cache.padding
        paddings.append(padding + length - cache.length)
    place = torch.as_tensor(order.argsort(), device=features.device)
    # zeros: numbers that are masked must not be NaN
    joint = [
        torch.cat([F.pad(stored, (0, 0, length - stored.shape[3], 0)) for stored in of_layer], dim=1)
        for of_layer in zip(*wholes, strict=True)
    ]
    layers = [stored.index_select(1, place) for stored in joint]
    return features[place], Cache.of(layers, torch.cat(paddings)[place])


def by_head(flat: Tensor, num_rows: int, num_new: int) -> Tensor:
    """Return heads (R S, H, d) as (R, H, S, d)."""
    if num_new == 1:
        return flat.unsqueeze(2)
    return flat.view(num_rows, num_new, *flat.shape[1:]).transpose(1, 2)


def tight_network(module: nn.Module, vocab_size: int) -> TightNetwork | None:
    """Return the tight network of a model; None if its architecture or configuration is not on the allow-list."""
    family = family_of(module)
    return None if family is None else TightNetwork(family, vocab_size)
