"""The jitted functions of `JaxLM`; R rows, S tokens, C slots, D hidden size, V vocabulary.

They are not methods of a model: the architecture is a static argument and the weights are arguments. So models of one
architecture, such as a prior and its guide, share the compiled functions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bayes_klrl.models.jax_lm.forward import Architecture, Cache, Parameters, empty_cache, hidden_states, logits

__all__ = [
    "advanced",
    "bucket",
    "gather_rows",
    "next_log_probs",
    "position_log_probs",
    "prefill",
    "score",
    "step",
    "token_features",
]


def bucket(count: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `count` and `least`.

    Examples
    --------
    >>> [bucket(count) for count in (1, 2, 3, 8, 9)]
    [1, 2, 4, 8, 16]
    """
    return 1 << (max(count, least) - 1).bit_length()


@partial(jax.jit, static_argnums=0)
def prefill(architecture: Architecture, parameters: Parameters, tokens: Any, padding: Any) -> tuple[Any, Cache]:
    """Return the features after left-padded prompts (R, S), shape (R, D), and the cache of their S slots."""
    hidden, cache = hidden_states(architecture, parameters, tokens, padding, empty_cache(architecture, len(tokens)), 0)
    return hidden[:, -1], cache


def advanced(
    architecture: Architecture, parameters: Parameters, cache: Cache, tokens: Any, padding: Any, length: Any
) -> tuple[Any, Cache]:
    """Return the features after one more token per row, and the cache with slot `length` written in place."""
    hidden, new = hidden_states(architecture, parameters, tokens[:, None], padding, cache, length)
    zero = jnp.zeros_like(length)  # of the same integer type, also with `jax_enable_x64`
    where = (zero, zero, zero, length, zero)
    written = [lax.dynamic_update_slice(old, added, where) for old, added in zip(cache, new, strict=True)]
    return hidden[:, 0], Cache(*written)


step = jax.jit(advanced, static_argnums=0, donate_argnums=2)
"""`advanced`, compiled; the buffers of the given cache are donated."""


@partial(jax.jit, static_argnums=0)
def next_log_probs(architecture: Architecture, parameters: Parameters, features: Any, temperature: Any) -> Any:
    """Return log softmax(logits / temperature), shape (R, V)."""
    return jax.nn.log_softmax(logits(architecture, parameters, features) / temperature)


@partial(jax.jit, static_argnums=3)
def gather_rows(features: Any, cache: Cache, rows: Any, capacity: int) -> tuple[Any, Cache]:
    """Return a copy of some rows, with `capacity` slots."""
    num_slots = min(capacity, cache.keys.shape[3])
    free = ((0, 0), (0, 0), (0, 0), (0, capacity - num_slots), (0, 0))
    copies = [jnp.pad(stored[..., :num_slots, :].take(rows, axis=1), free) for stored in cache]
    return features.take(rows, axis=0), Cache(*copies)


@partial(jax.jit, static_argnums=0)
def score(
    architecture: Architecture,
    parameters: Parameters,
    prompts: Any,
    padding: Any,
    owners: Any,
    tokens: Any,
    lengths: Any,
    temperature: Any,
) -> Any:
    """Return the log-prob of every token, shape (R, T), 0 past each row's length.

    Each prompt is read once, then all its completions are read in one forward pass.

    Parameters
    ----------
    architecture, parameters, temperature
        The model.
    prompts, padding
        Left-padded prompts, shape (P, S), and the number of padded slots of each, shape (P,).
    owners
        Index of the prompt that each row continues, shape (R,).
    tokens, lengths
        The completions, shape (R, T), and their lengths, shape (R,).
    """
    hidden = read_from(architecture, parameters, prompts, padding, owners, tokens)
    scaled = logits(architecture, parameters, hidden) / temperature
    drawn = jnp.take_along_axis(scaled, tokens[..., None], axis=2)[..., 0] - jax.nn.logsumexp(scaled, axis=2)
    return jnp.where(inside(tokens, lengths), drawn, 0.0)


@partial(jax.jit, static_argnums=0)
def position_log_probs(
    architecture: Architecture,
    parameters: Parameters,
    prompts: Any,
    padding: Any,
    owners: Any,
    tokens: Any,
    lengths: Any,
    temperature: Any,
) -> Any:
    """Return log p(. | c, x_<t) at every position, shape (R, T, V), 0 past each row's length; see `score`."""
    hidden = read_from(architecture, parameters, prompts, padding, owners, tokens)
    log_probs = jax.nn.log_softmax(logits(architecture, parameters, hidden) / temperature)
    return jnp.where(inside(tokens, lengths)[..., None], log_probs, 0.0)


@partial(jax.jit, static_argnums=0)
def token_features(
    architecture: Architecture,
    parameters: Parameters,
    prompts: Any,
    padding: Any,
    owners: Any,
    tokens: Any,
    lengths: Any,
    _temperature: Any,
) -> Any:
    """Return the hidden state that predicts every token, shape (R, T, D), 0 past each row's length; see `score`."""
    hidden = read_from(architecture, parameters, prompts, padding, owners, tokens)
    return jnp.where(inside(tokens, lengths)[..., None], hidden, 0.0)


def read_from(
    architecture: Architecture, parameters: Parameters, prompts: Any, padding: Any, owners: Any, tokens: Any
) -> Any:
    """Return the hidden state before every token, shape (R, T, D)."""
    first, cache = prefill(architecture, parameters, prompts, padding)
    past = Cache(*(stored.take(owners, axis=1) for stored in cache))
    rest, _ = hidden_states(architecture, parameters, tokens[:, :-1], padding[owners], past, prompts.shape[1])
    return jnp.concatenate([first[owners][:, None], rest], axis=1)


def inside(tokens: Any, lengths: Any) -> Any:
    """Return True for positions inside a completion's length, shape (R, T)."""
    return jnp.arange(tokens.shape[1]) < lengths[:, None]
