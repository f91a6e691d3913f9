"""The forward of the GPT-2 and Llama families as pure functions of a parameter tree, for jit, grad and vmap alike.

    h <- h + attention(norm(h)),   h <- h + mlp(norm(h)),   logits = norm(h) W'

Prompts are padded on the left, with explicit positions. The keys and values of earlier positions are an input, those of new
positions an output. So prefill, decoding and scoring are one pure function; the decoding code writes the output to a buffer.

A parameter tree is {"outer": {name: array}, "layers": {name: array}}, with the names of the checkpoint without their prefixes.
The arrays of "layers" hold all layers, stacked, and `lax.scan` loops over them. Compiling then takes as long for 24 layers as
for one, and a step takes half the time of an unrolled loop over four layers (measured on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["ACTIVATIONS", "Architecture", "Cache", "Parameters", "Rope", "empty_cache", "hidden_states", "logits"]

NamedArrays: TypeAlias = Mapping[str, Any]
Parameters: TypeAlias = Mapping[str, Any]

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activation functions by their names in configurations."""

MASKED_SCORE = float(np.finfo(np.float32).min)
"""The attention score of a masked slot: its weight is exactly 0, and gradients are not NaN, as they could be with -inf."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the angle of pair i at position p is p theta^(-2i/d), reduced as `kind` says."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, size: int) -> np.ndarray:
        """Return the angle per position of each pair of a head's coordinates, shape (size / 2,), float32."""
        frequencies = 1.0 / self.theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        if self.kind == "llama3":  # low frequencies are divided, high ones kept, those between interpolated
            turns = self.original_length * frequencies / (2 * np.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(kept, 0.0, 1.0)
            frequencies = (1 - kept) * frequencies / self.factor + kept * frequencies
        return np.asarray(frequencies, dtype=np.float32)


@dataclass(frozen=True)
class Architecture:
    """The configuration of the forward; hashable, a static argument of every jitted function.

    `rope` is None for GPT-2, which has learned positions, LayerNorm and a plain MLP. With `head_norm` queries and keys
    are normalised head by head (Qwen3). The bias options are for the Llama family; GPT-2 has all biases. The layers that are
    True in `slides` attend to the last `window` tokens only, including the newest one.
    """

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_size: int
    context_length: int
    epsilon: float
    activation: str
    tied: bool
    rope: Rope | None = None
    head_norm: bool = False
    input_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    slides: tuple[bool, ...] = ()


class Cache(NamedTuple):
    """Keys and values of C positions, shape (layers, R, key heads, C, head size) each."""

    keys: Any
    values: Any


def empty_cache(architecture: Architecture, num_rows: int) -> Cache:
    """Return a cache without positions."""
    shape = (architecture.num_layers, num_rows, architecture.num_key_heads, 0, architecture.head_size)
    return Cache(jnp.zeros(shape, dtype=jnp.float32), jnp.zeros(shape, dtype=jnp.float32))


def hidden_states(
    architecture: Architecture, parameters: Parameters, tokens: Any, padding: Any, past: Cache, length: Any
) -> tuple[Any, Cache]:
    """Return the hidden states after the final norm, shape (R, S, D), and the new positions' keys and values.

    Parameters
    ----------
    architecture, parameters
        The model.
    tokens
        The new tokens, shape (R, S), for the slots from `length` on.
    padding
        The number of padded slots on the left of each row, shape (R,). A token's position is its slot minus this number.
    past
        The keys and values of earlier slots.
    length
        The number of slots of `past` in use; the others are masked.
    """
    slots = length + jnp.arange(tokens.shape[1])
    positions = jnp.clip(slots - padding[:, None], 0, architecture.context_length - 1)
    hidden = parameters["outer"]["tokens"][tokens]
    layer: Callable[..., tuple[Any, Cache]]
    rotation: tuple[Any, Any] | None
    if architecture.rope is None:
        hidden = hidden + parameters["outer"]["positions"][positions]
        layer, norm, rotation = gpt2_layer, layer_norm, None
    else:
        angles = positions[..., None, None] * architecture.rope.frequencies(architecture.head_size)
        layer, norm, rotation = llama_layer, rms_norm, (jnp.cos(angles), jnp.sin(angles))
    mask = visible(slots, padding, past.keys.shape[3], length)

    near = None if architecture.window is None else within(slots, past.keys.shape[3], architecture.window)

    def one_layer(hidden: Any, layer_inputs: tuple[NamedArrays, Cache, Any]) -> tuple[Any, Cache]:
        weights, stored, slides = layer_inputs
        seen = mask if near is None else mask & (near | ~slides)
        return layer(architecture, weights, hidden, rotation, stored, seen)

    slides = None if near is None else jnp.array(architecture.slides)
    hidden, new = lax.scan(one_layer, hidden, (parameters["layers"], past, slides))
    return norm(parameters["outer"], "final_norm", hidden, architecture.epsilon), new


def logits(architecture: Architecture, parameters: Parameters, features: Any) -> Any:
    """Return the next-token logits (..., V) of hidden states (..., D)."""
    outer = parameters["outer"]
    return product(features, outer["tokens" if architecture.tied else "head.weight"].T)


def visible(slots: Any, padding: Any, num_past: int, length: Any) -> Any:
    """Return a mask of the slots that each new token attends to, past ones first, shape (R, S, C + S).

    A token in a padded slot attends to itself. Its output is never used, but it must not be NaN.
    """
    earlier = jnp.arange(num_past)
    before = (earlier >= padding[:, None]) & (earlier < length)
    among = (slots <= slots[:, None]) & (slots >= padding[:, None, None]) | (slots == slots[:, None])
    before = jnp.broadcast_to(before[:, None], (len(padding), len(slots), num_past))
    return jnp.concatenate([before, among], axis=2)


def within(slots: Any, num_past: int, window: int) -> Any:
    """Return a mask of the slots less than `window` before each new token, past ones first, shape (S, C + S)."""
    all_slots = jnp.concatenate([jnp.arange(num_past), slots])
    return slots[:, None] - all_slots < window


def gpt2_layer(
    architecture: Architecture, weights: NamedArrays, hidden: Any, _rotation: Any, past: Cache, mask: Any
) -> tuple[Any, Cache]:
    """Return the output of one layer of GPT-2, whose matrices are stored (in, out), and its new keys and values."""
    inner = layer_norm(weights, "ln_1", hidden, architecture.epsilon)
    joint = product(inner, weights["attn.c_attn.weight"]) + weights["attn.c_attn.bias"]
    queries, keys, values = (split_heads(part, architecture.head_size) for part in jnp.split(joint, 3, axis=-1))
    attended, new = attend(queries, keys, values, past, mask)
    hidden = hidden + product(attended, weights["attn.c_proj.weight"]) + weights["attn.c_proj.bias"]
    inner = layer_norm(weights, "ln_2", hidden, architecture.epsilon)
    inner = product(inner, weights["mlp.c_fc.weight"]) + weights["mlp.c_fc.bias"]
    inner = ACTIVATIONS[architecture.activation](inner)
    return hidden + product(inner, weights["mlp.c_proj.weight"]) + weights["mlp.c_proj.bias"], new


def llama_layer(
    architecture: Architecture, weights: NamedArrays, hidden: Any, rotation: Any, past: Cache, mask: Any
) -> tuple[Any, Cache]:
    """Return the output of one layer of the Llama family, with matrices stored (out, in), and its new keys and values."""
    epsilon = architecture.epsilon
    inner = rms_norm(weights, "input_layernorm", hidden, epsilon)
    queries, keys, values = (
        split_heads(linear(weights, f"self_attn.{name}_proj", inner), architecture.head_size) for name in "qkv"
    )
    if architecture.head_norm:
        queries = rms_norm(weights, "self_attn.q_norm", queries, epsilon)
        keys = rms_norm(weights, "self_attn.k_norm", keys, epsilon)
    attended, new = attend(rotate(queries, *rotation), rotate(keys, *rotation), values, past, mask)
    hidden = hidden + linear(weights, "self_attn.o_proj", attended)
    inner = rms_norm(weights, "post_attention_layernorm", hidden, epsilon)
    gate = ACTIVATIONS[architecture.activation](linear(weights, "mlp.gate_proj", inner))
    return hidden + linear(weights, "mlp.down_proj", gate * linear(weights, "mlp.up_proj", inner)), new


def attend(queries: Any, keys: Any, values: Any, past: Cache, mask: Any) -> tuple[Any, Cache]:
    """Return softmax(q k' / sqrt d) v, shape (R, S, H d), and the new keys and values, shape (R, K, S, d).

    Queries are (R, S, H, d), keys and values (R, S, K, d); H / K query heads share a key head. Past and new positions
    are kept separate up to the softmax, which costs less than joining them.
    """
    num_rows, num_new, num_heads, size = queries.shape
    num_past, num_key_heads = past.keys.shape[2], keys.shape[2]
    new = Cache(keys.swapaxes(1, 2), values.swapaxes(1, 2))
    grouped = queries.reshape(num_rows, num_new, num_key_heads, num_heads // num_key_heads, size) * size**-0.5
    scores = [multiply("rskgd,rkcd->rkgsc", grouped, stored) for stored in (past.keys, new.keys)]
    joint = jnp.where(mask[:, None, None], jnp.concatenate(scores, axis=-1), MASKED_SCORE)
    weights = jax.nn.softmax(joint, axis=-1)
    attended = multiply("rkgsc,rkcd->rskgd", weights[..., :num_past], past.values)
    attended = attended + multiply("rkgsc,rkcd->rskgd", weights[..., num_past:], new.values)
    return attended.reshape(num_rows, num_new, num_heads * size), new


def split_heads(flat: Any, size: int) -> Any:
    """Return (R, S, H d) as (R, S, H, d)."""
    return flat.reshape(*flat.shape[:2], flat.shape[2] // size, size)


def rotate(heads: Any, cos: Any, sin: Any) -> Any:
    """Return the heads (R, S, H, d), rotated by their positions' angles; pair i is coordinates i and i + d/2."""
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def layer_norm(weights: NamedArrays, name: str, inputs: Any, epsilon: float) -> Any:
    """Return LayerNorm over the last axis."""
    centred = inputs - inputs.mean(-1, keepdims=True)
    scaled = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(weights: NamedArrays, name: str, inputs: Any, epsilon: float) -> Any:
    """Return RMSNorm over the last axis."""
    return inputs * lax.rsqrt(jnp.square(inputs).mean(-1, keepdims=True) + epsilon) * weights[f"{name}.weight"]


def linear(weights: NamedArrays, name: str, inputs: Any) -> Any:
    """Return the product with a matrix stored (out, in), plus its bias if it has one."""
    outputs = product(inputs, weights[f"{name}.weight"].T)
    return outputs + weights[f"{name}.bias"] if f"{name}.bias" in weights else outputs


def product(left: Any, right: Any) -> Any:
    """Return a matrix product in full float32 on every device; by default GPUs and TPUs round to fewer bits."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def multiply(subscripts: str, left: Any, right: Any) -> Any:
    """Return an Einstein summation in full float32."""
    return jnp.einsum(subscripts, left, right, precision=lax.Precision.HIGHEST)
