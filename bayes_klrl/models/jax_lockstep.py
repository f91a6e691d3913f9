"""Independent completions drawn on the device: the step loop of `models/decoding.py` without its way to the host.

A step of that loop goes to the device and back for its log-probs; for small models the way costs more than the step.
Here a `lax.while_loop` draws until every row has ended, or half of them: then the others go on in a smaller batch. It
takes the same uniforms and draws the same tokens, up to rounding: it cumulates in float32, the host in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bayes_klrl.models.jax_decoding import Kinds, Rows, Weights, emitted, is_eos, next_token
from bayes_klrl.models.jax_rows import LEAST, left_padded, padded_to
from bayes_klrl.models.jax_steps import bucket, gather_rows, prefill
from bayes_klrl.typing import FloatArray, IntArray, TokenIds

__all__ = ["lockstep"]

GROWTH = 128
"""Buffers of up to as many slots are made at once, longer ones are doubled as they fill."""


def lockstep(
    kinds: Kinds, weights: Weights, prompts: Sequence[TokenIds], num_draws: int, uniforms: FloatArray
) -> tuple[IntArray, FloatArray, int]:
    """Return completions of the first model (R, T), their log-probs under each (models, R), and the rows x tokens read.

    Parameters
    ----------
    kinds, weights
        The models, which share one vocabulary.
    prompts
        P prompts.
    num_draws
        N; there are R = P * N rows, prompt by prompt.
    uniforms
        From [0, 1), shape (T, R).
    """
    num_tokens, num_rows = uniforms.shape
    rows, padding, first, log_probs = begun(kinds, weights, prompts, num_draws, uniforms[0], num_tokens)
    tokens = np.full((num_tokens, num_rows), min(kinds.eos_token_ids, default=0), dtype=np.int64)
    tokens[0] = first
    index = np.arange(num_rows)  # the row that each row of the batch is, those that only fill its bucket left out
    done, rows_read, length = 1, 0, bucket(max(map(len, prompts)), LEAST)
    while done < num_tokens and (going := ~np.asarray(rows.finished)[: len(index)]).any():
        taken = length + done - 1
        if bucket(int(going.sum()), LEAST) < len(padding) or taken == capacity_of(rows):
            kept = np.flatnonzero(going)
            rows, padding = narrowed(rows, padding, kept, capacity(taken, length + num_tokens - 1))
            index = index[kept]
        columns = np.zeros((bucket(num_tokens, LEAST), len(padding)), dtype=np.float32)
        columns[: num_tokens - done, : len(index)] = uniforms[done:, index]
        most = min(num_tokens - done, capacity_of(rows) - taken)
        enough = len(padding) // 2 if len(padding) > LEAST else 0
        rows, drawn, scores, count = draw_until(
            kinds, weights, rows, padding, columns, np.int32(taken), np.int32(most), np.int32(enough)
        )
        num_steps = int(count)
        tokens[done : done + num_steps, index] = np.asarray(drawn)[:num_steps, : len(index)]
        log_probs[:, index] += np.asarray(scores, dtype=np.float64)[:num_steps, :, : len(index)].sum(axis=0)
        rows_read += num_steps * len(index)
        done += num_steps
    return tokens.T, log_probs, len(kinds.architectures) * (rows_read + sum(map(len, prompts)))


def begun(
    kinds: Kinds, weights: Weights, prompts: Sequence[TokenIds], num_draws: int, uniforms: FloatArray, num_tokens: int
) -> tuple[Rows, np.ndarray, IntArray, FloatArray]:
    """Return a batch of all rows, its padding, the first token of each row and its log-probs (models, R)."""
    num_rows = len(prompts) * num_draws
    tokens, padding = left_padded(prompts, bucket(len(prompts)))
    size, length = bucket(num_rows, LEAST), tokens.shape[1]
    owners = padded_to(np.arange(len(prompts)).repeat(num_draws), size)
    features, caches = [], []
    for architecture, parameters in zip(kinds.architectures, weights.parameters, strict=True):
        of_prompts, cache = prefill(architecture, parameters, tokens, padding)
        repeated, cache = gather_rows(of_prompts, cache, owners, capacity(length, length + num_tokens - 1))
        features.append(repeated)
        caches.append(cache)
    column = np.zeros(size, dtype=np.float32)
    column[:num_rows] = uniforms
    fill = np.arange(size) >= num_rows
    first, finished, scores = draw_first(kinds, weights, features, fill, column)
    log_probs = np.asarray(scores, dtype=np.float64)[:, :num_rows]
    return Rows(tuple(caches), first, finished), padding[owners], np.asarray(first)[:num_rows], log_probs


def capacity(taken: int, needed: int) -> int:
    """Return how many slots a buffer has with one more than `taken` in use, of which `needed` will be."""
    rounded = -(-needed // LEAST) * LEAST  # prompts are rounded up already: powers of two would be a third too long
    return min(rounded, bucket(taken + 1, GROWTH))


def capacity_of(rows: Rows) -> int:
    """Return how many slots the rows have."""
    return int(rows.caches[0].keys.shape[3])


def narrowed(rows: Rows, padding: np.ndarray, kept: IntArray, num_slots: int) -> tuple[Rows, np.ndarray]:
    """Return a batch of the rows that are kept, with so many slots, and its padding."""
    size = bucket(len(kept), LEAST)
    picked = padded_to(kept, size)
    caches = []
    for cache in rows.caches:
        newest, copied = gather_rows(rows.newest, cache, picked, num_slots)
        caches.append(copied)
    return Rows(tuple(caches), newest, np.arange(size) >= len(kept)), padding[picked]


@partial(jax.jit, static_argnums=0)
def draw_first(
    kinds: Kinds, weights: Weights, features: Sequence[Any], fill: Any, uniforms: Any
) -> tuple[Any, Any, Any]:
    """Return the first tokens (R,), which rows have ended by them, and their log-probs (models, R)."""
    tokens, log_probs = emitted(kinds, weights, features, fill, uniforms)
    return tokens, fill | is_eos(tokens, kinds.eos_token_ids), log_probs


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def draw_until(
    kinds: Kinds, weights: Weights, rows: Rows, padding: Any, uniforms: Any, taken: Any, most: Any, enough: Any
) -> tuple[Rows, Any, Any, Any]:
    """Return the rows after `most` more tokens, or once no more than `enough` of them go on.

    Parameters
    ----------
    kinds, weights, rows, padding
        The models and the R rows; the caches are given away.
    uniforms
        Shape (T, R), T >= most.
    taken
        How many slots of the caches are in use.
    most, enough
        When to stop.

    Returns
    -------
    The rows, the tokens (T, R), their log-probs (T, models, R), and how many of the T there are.
    """

    def not_yet(carried: Any) -> Any:
        count, rows, _, _ = carried
        return (count < most) & ((~rows.finished).sum() > enough)

    def one_more(carried: Any) -> Any:
        count, rows, tokens, log_probs = carried
        rows, (newest, scores) = next_token(kinds, weights, rows, padding, uniforms[count], taken + count)
        return count + 1, rows, tokens.at[count].set(newest), log_probs.at[count].set(scores)

    tokens = jnp.zeros(uniforms.shape, dtype=jnp.int32)
    log_probs = jnp.zeros((len(uniforms), len(kinds.architectures), uniforms.shape[1]), dtype=jnp.float32)
    count, rows, tokens, log_probs = lax.while_loop(not_yet, one_more, (jnp.zeros_like(most), rows, tokens, log_probs))
    return rows, tokens, log_probs, count
