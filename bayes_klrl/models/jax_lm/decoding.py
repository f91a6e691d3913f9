"""Drawing and scoring completions inside one traced program; P prompts, N draws, T tokens, R = P * N rows, V vocabulary.

These are the steps of `JaxLM` as pure functions of parameter trees, uniforms and tokens, all of which may be traced. So they
can be part of a user's own `jax.jit`, `jax.grad` or NumPyro program. Shapes are not rounded up: every new shape is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bayes_klrl.models.jax_lm.forward import Architecture, Cache, Parameters, logits
from bayes_klrl.models.jax_lm.steps import advanced, prefill

__all__ = [
    "PaddedPrompts",
    "Reading",
    "Rows",
    "StaticModels",
    "Weights",
    "draw_tokens",
    "emitted",
    "is_eos",
    "lengths_of",
    "next_token",
    "read_tokens",
    "sample_tokens",
]

Reading: TypeAlias = Callable[..., Any]
"""`score`, `position_log_probs` or `token_features` of `bayes_klrl.models.jax_lm.steps`."""


class PaddedPrompts(NamedTuple):
    """P prompts as rows padded on the left: tokens (P, S), and the number of padded slots of each, (P,). A pytree."""

    tokens: Any
    padding: Any


class StaticModels(NamedTuple):
    """The static part of models that read the same tokens; the first one draws. Hashable, for `jax.jit`."""

    architectures: tuple[Architecture, ...]
    eos_token_ids: tuple[int, ...]


class Weights(NamedTuple):
    """The parameters and the temperature of each of the models. A pytree."""

    parameters: tuple[Parameters, ...]
    temperatures: tuple[Any, ...]


class Rows(NamedTuple):
    """R unfinished completions: each model's cache without the newest tokens, these tokens (R,), and which rows ended (R,)."""

    caches: tuple[Cache, ...]
    newest: Any
    finished: Any


@partial(jax.jit, static_argnums=0)
def sample_tokens(static: StaticModels, weights: Weights, prompts: PaddedPrompts, uniforms: Any) -> tuple[Any, Any]:
    """Return completions of the first model, shape (P, N, T), and their log-probs under each, (models, P, N, T).

    It is one `lax.scan` over tokens, which writes keys and values into buffers in place. Positions past EOS hold the lowest
    EOS id (0 if there is none) and log-probs of 0. Nothing is computed after the last token, and no gradient flows through.

    Parameters
    ----------
    static, weights
        The models, which share one vocabulary.
    prompts
        The P prompts.
    uniforms
        Uniform random numbers in [0, 1), shape (P, N, T).
    """
    weights, uniforms = lax.stop_gradient((weights, uniforms))
    num_prompts, num_draws, num_tokens = uniforms.shape
    owners = jnp.arange(num_prompts).repeat(num_draws)
    columns = uniforms.reshape(-1, num_tokens).T.astype(jnp.float32)
    padding = prompts.padding[owners]
    read = [prefill(*model, *prompts) for model in zip(static.architectures, weights.parameters, strict=True)]
    caches = tuple(with_room(cache, owners, num_tokens - 1) for _, cache in read)
    none_finished = jnp.zeros(len(owners), dtype=bool)
    first, scores = emitted(static, weights, [features[owners] for features, _ in read], none_finished, columns[0])

    def one_token(rows: Rows, inputs: tuple[Any, Any]) -> tuple[Rows, tuple[Any, Any]]:
        return next_token(static, weights, rows, padding, *inputs)

    slots = jnp.arange(num_tokens - 1, dtype=jnp.int32) + prompts.tokens.shape[1]
    start = Rows(caches, first, is_eos(first, static.eos_token_ids))
    _, (rest, more) = lax.scan(one_token, start, (columns[1:], slots))
    tokens = jnp.concatenate([first[None], rest]).T.reshape(uniforms.shape)
    log_probs = jnp.concatenate([scores[None], more]).transpose(1, 2, 0)
    return tokens, log_probs.reshape(len(static.architectures), *uniforms.shape)


def next_token(
    static: StaticModels, weights: Weights, rows: Rows, padding: Any, uniforms: Any, slot: Any
) -> tuple[Rows, tuple[Any, Any]]:
    """Return the rows with one more token, the tokens (R,), and their log-probs (models, R)."""
    steps = [
        advanced(architecture, parameters, cache, rows.newest, padding, slot)
        for architecture, parameters, cache in zip(static.architectures, weights.parameters, rows.caches, strict=True)
    ]
    tokens, log_probs = emitted(static, weights, [features for features, _ in steps], rows.finished, uniforms)
    finished = rows.finished | is_eos(tokens, static.eos_token_ids)
    return Rows(tuple(cache for _, cache in steps), tokens, finished), (tokens, log_probs)


def emitted(
    static: StaticModels, weights: Weights, features: Sequence[Any], finished: Any, uniforms: Any
) -> tuple[Any, Any]:
    """Return the tokens drawn from features, (R,), and their log-probs (models, R); EOS and 0 in finished rows."""
    log_probs = [
        jax.nn.log_softmax(logits(architecture, parameters, states) / temperature)
        for architecture, parameters, temperature, states in zip(static.architectures, *weights, features, strict=True)
    ]
    filler = min(static.eos_token_ids, default=0)
    tokens = jnp.where(finished, filler, draw_tokens(log_probs[0], uniforms))
    taken = jnp.stack([jnp.take_along_axis(array, tokens[:, None], axis=1)[:, 0] for array in log_probs])
    return tokens, jnp.where(finished, 0.0, taken)


def with_room(cache: Cache, owners: Any, num_free: int) -> Cache:
    """Return the rows `owners` of a cache with free slots at the end."""
    free = ((0, 0), (0, 0), (0, 0), (0, num_free), (0, 0))
    return Cache(*(jnp.pad(stored.take(owners, axis=1), free) for stored in cache))


def draw_tokens(log_probs: Any, uniforms: Any) -> Any:
    """Return tokens drawn by inverse CDF, as `arrays.draw_tokens` does but in float32: shapes (R, V) and (R,) to (R,).

    A block of about sqrt(V) tokens is drawn first, then a token within it. This takes half the time of cumulative sums over
    all tokens, and sums of fewer terms are more accurate. A token of probability 0 is never drawn.
    """
    num_rows, num_tokens = log_probs.shape
    width = 1 << (num_tokens.bit_length() + 1) // 2
    num_blocks = -(-num_tokens // width)
    free = ((0, 0), (0, num_blocks * width - num_tokens))
    blocks = jnp.pad(jnp.exp(log_probs), free).reshape(num_rows, num_blocks, width)
    sums = blocks.sum(axis=2)
    block, rest = first_beyond(sums, uniforms * sums.sum(axis=1))
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * width + first_beyond(within, rest)[0]).astype(jnp.int32)


def first_beyond(weights: Any, targets: Any) -> tuple[Any, Any]:
    """Return the index of the first positive weight at which the cumulative sum exceeds the target, and the remainder.

    The remainder is the target minus the sum of the weights before this one. Rounding may make sums that are computed in
    parallel decrease: without the guards here an index of weight 0 might come first, or no sum might exceed a target close to
    the total.
    """
    sums, positive = jnp.cumsum(weights, axis=1), weights > 0
    total = jnp.where(positive, sums, 0.0).max(axis=1)
    targets = jnp.minimum(targets, total * (1.0 - float(np.finfo(np.float32).eps)))
    index = jnp.argmax((sums > targets[:, None]) & positive, axis=1)
    before = jnp.take_along_axis(sums - weights, index[:, None], axis=1)[:, 0]
    return index, jnp.maximum(targets - before, 0.0)


def is_eos(tokens: Any, eos_token_ids: Sequence[int]) -> Any:
    """Return True for tokens that end a completion."""
    return jnp.isin(tokens, jnp.array(eos_token_ids, dtype=jnp.int32))


def lengths_of(tokens: Any, eos_token_ids: Sequence[int]) -> Any:
    """Return each row's number of tokens up to its first EOS, like `completion_lengths`, for traced tokens (..., T)."""
    ends = is_eos(tokens, eos_token_ids)
    return jnp.where(ends.any(axis=-1), ends.argmax(axis=-1) + 1, tokens.shape[-1])


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def read_tokens(
    reading: Reading,
    rows_at_once: int,
    architecture: Architecture,
    eos_token_ids: tuple[int, ...],
    parameters: Parameters,
    temperature: Any,
    prompts: PaddedPrompts,
    tokens: Any,
) -> Any:
    """Return the output of a reading for every token of given completions, shape (P, N, T, ...), 0 past the first EOS.

    Differentiable in the parameters. More rows than `rows_at_once` are read in chunks of (some prompts) x (some draws);
    for the backward pass only the inputs of a chunk are stored.
    """
    num_prompts, num_draws, num_tokens = tokens.shape
    lengths = lengths_of(tokens, eos_token_ids)
    legal = jnp.where(jnp.arange(num_tokens) < lengths[..., None], tokens, 0).astype(jnp.int32)

    def read(chunk: PaddedPrompts, own: Any, counted: Any) -> Any:
        owners = jnp.arange(own.shape[0]).repeat(own.shape[1])
        flat = own.reshape(-1, num_tokens), counted.reshape(-1)
        found = reading(architecture, parameters, *chunk, owners, *flat, temperature)
        return found.reshape(*own.shape, *found.shape[2:])

    num_draw_chunks, draws_each = even_chunks(num_draws, rows_at_once)
    num_prompt_chunks, prompts_each = even_chunks(num_prompts, rows_at_once // draws_each)
    if num_draw_chunks * num_prompt_chunks == 1:
        return read(prompts, legal, lengths)

    # if there are several chunks of draws, each has one prompt, so the chunks are always in order
    def chunks(array: Any) -> Any:
        """Return (P, N, ...) as (chunks, prompts per chunk, draws per chunk, ...), filled up with zeros."""
        missing = num_prompt_chunks * prompts_each - num_prompts, num_draw_chunks * draws_each - num_draws
        filled = jnp.pad(array, [(0, missing[0]), (0, missing[1]), *[(0, 0)] * (array.ndim - 2)])
        return filled.reshape(-1, prompts_each, draws_each, *array.shape[2:])

    def chunks_of_prompts(array: Any) -> Any:
        return chunks(jnp.broadcast_to(array[:, None], (num_prompts, num_draws, *array.shape[1:])))[:, :, 0]

    read_again = jax.checkpoint(lambda inputs: read(*inputs))
    each = PaddedPrompts(*map(chunks_of_prompts, prompts))
    found = lax.map(read_again, (each, chunks(legal), chunks(lengths)))
    joint = found.reshape(num_prompt_chunks * prompts_each, num_draw_chunks * draws_each, *found.shape[3:])
    return joint[:num_prompts, :num_draws]


def even_chunks(count: int, most: int) -> tuple[int, int]:
    """Return the number of chunks of at most `most` items for `count` items, and the number of items per chunk.

    Examples
    --------
    >>> even_chunks(10, 4), even_chunks(3, 4)
    ((3, 4), (1, 3))
    """
    num_chunks = -(-max(count, 1) // max(most, 1))
    return num_chunks, -(-max(count, 1) // num_chunks)
