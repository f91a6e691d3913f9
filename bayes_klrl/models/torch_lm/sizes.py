"""What a forward pass of a transformer takes in memory, by its configuration alone.

    cache      2 layers kv_heads head_size                         numbers per token and row
    forward    8 hidden + 4 inner                                  numbers per token, of one layer at a time
    stored     layers (8 hidden + 4 kv_heads head_size + 4 inner)  numbers per token, for a backward pass

The last two count the tensors that torch keeps for a Llama in float32. They are compared with measured peaks in
tests/analysis/plan. A configuration that does not name its layers and heads, as that of a recurrent model, has no sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bayes_klrl.models.torch_lm.network import adapter_configs, base_model

__all__ = ["Sizes", "sizes_of"]

_COPIES = 1.5  # a cache that outgrows its room, or whose rows are chosen, is written anew before the old one goes
_ADAPTER = 1.5  # activations with an adapter on every linear layer, measured: its inputs and outputs are stored too


@dataclass(frozen=True)
class Sizes:
    """The numbers of a transformer's configuration that memory depends on.

    Parameters
    ----------
    num_layers, hidden_size, inner_size, vocab_size
        Layers, numbers per token between layers and inside a feed-forward layer, and tokens of the vocabulary.
    num_key_heads, head_size
        Heads of keys and values, and numbers per token and head.
    bytes_per_number
        Bytes of one number of an activation, 4 in float32.
    adapted
        Whether the layers have adapters.
    """

    num_layers: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    num_key_heads: int
    head_size: int
    bytes_per_number: int
    adapted: bool = False

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token of one row."""
        return 2 * self.num_layers * self.num_key_heads * self.head_size * self.bytes_per_number

    @property
    def forward_bytes(self) -> int:
        """Bytes of one token's activations while a layer is computed, without a gradient."""
        return (8 * self.hidden_size + 4 * self.inner_size) * self.bytes_per_number

    @property
    def stored_bytes(self) -> int:
        """Bytes of one token's activations that are stored for the backward pass."""
        keys = self.num_key_heads * self.head_size
        each = (8 * self.hidden_size + 4 * keys + 4 * self.inner_size) * self.bytes_per_number
        return self.num_layers * (int(_ADAPTER * each) if self.adapted else each)

    @property
    def checkpointed_bytes(self) -> int:
        """The same with gradient checkpointing: the input of each layer, and one layer that is computed again."""
        return self.num_layers * self.hidden_size * self.bytes_per_number + self.stored_bytes // self.num_layers

    @property
    def logit_bytes(self) -> int:
        """Bytes of one row's logits, in float32."""
        return 4 * self.vocab_size

    def row_bytes(self, num_tokens: int) -> int:
        """Return the bytes of a row of so many tokens in decoding, at its peak."""
        return int(_COPIES * self.cache_bytes * num_tokens)

    def prompt_bytes(self, num_tokens: int) -> int:
        """Return the bytes of reading a prompt of so many tokens."""
        return (self.cache_bytes + self.forward_bytes) * num_tokens

    def scoring_bytes(self, num_prompt: int, num_new: int, *, gradient: bool, recompute: bool = False) -> int:
        """Return the bytes of scoring a completion of so many tokens after a prompt, apart from the logits."""
        keys = 2 * self.num_key_heads * self.head_size * (num_prompt + num_new) * self.bytes_per_number
        if not gradient:
            return self.forward_bytes * num_new + 2 * keys
        if recompute:
            return self.checkpointed_bytes * num_new + 2 * keys
        return self.stored_bytes * num_new + self.num_layers * keys


def sizes_of(module: nn.Module) -> Sizes | None:
    """Return the sizes of a model; None if its configuration does not name them."""
    config: Any = base_model(module).config.get_text_config()
    hidden, heads, layers = (_int(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if hidden is None or heads is None or layers is None:
        return None
    inner = next(
        (found for name in ("intermediate_size", "n_inner", "ffn_dim", "d_ff") if (found := _int(config, name))), 0
    )
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    return Sizes(
        layers,
        hidden,
        inner or 4 * hidden,
        int(config.vocab_size),
        _int(config, "num_key_value_heads") or heads,
        _int(config, "head_dim") or hidden // heads,
        dtype.itemsize,
        bool(adapter_configs(module)),
    )


def _int(config: Any, name: str) -> int | None:
    """Return an entry of a configuration that is a positive number, else None."""
    try:
        found = getattr(config, name, None)
    except (
        Exception
    ):  # an entry that differs from layer to layer, such as gemma4's head_dim, has an error of its own kind
        return None
    return found if isinstance(found, int) and found > 0 else None
