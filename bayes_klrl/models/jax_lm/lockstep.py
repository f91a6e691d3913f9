"""Drawing the rest of independent completions in a loop on the device, instead of the step loop of `models/decoding.py`.

Every step of that loop transfers log-probs from the device to the host; for small models the transfer takes longer than the
step. Here a `lax.while_loop` draws until every row has ended, or half of them; then the others continue in a smaller batch. It
uses the same uniforms and draws the same tokens, up to rounding: it sums probabilities in float32, the host in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bayes_klrl.models.jax_lm.decoding import Rows, StaticModels, Weights, next_token
from bayes_klrl.models.jax_lm.forward import Cache
from bayes_klrl.models.jax_lm.rows import MIN_BUCKET, JaxState, padded_to
from bayes_klrl.models.jax_lm.steps import bucket, gather_rows
from bayes_klrl.models.token_ids import check_length
from bayes_klrl.typing import Array, FloatArray, IntArray

__all__ = ["JaxLockstep"]

GROWTH = 128
"""A buffer of up to this number of slots gets its full size at once; a longer one is doubled whenever it is full."""

MAX_SHARING = 4
"""The step loop computes a prefix once for all rows that share it. This loop takes over if at most this number of rows, on
average, share a prefix."""

CHEAP_STEP = 2**24
"""Up to this number of rows x parameters a step takes no longer than its transfer to the host, and sharing saves nothing."""


@dataclass(frozen=True, eq=False)
class JaxLockstep:
    """See `Lockstep`."""

    static: StaticModels
    weights: Weights

    def is_faster(self, num_rows: int, num_prefixes: int) -> bool:
        """See `Lockstep`."""
        num_parameters = sum(array.size for array in jax.tree.leaves(self.weights.parameters))
        return num_rows <= MAX_SHARING * num_prefixes or num_rows * num_parameters <= CHEAP_STEP

    def __call__(
        self, states: Sequence[JaxState], state_rows: IntArray, newest: IntArray, uniforms: FloatArray
    ) -> tuple[IntArray, FloatArray, int]:
        """See `Lockstep`."""
        num_tokens, num_rows = uniforms.shape
        for architecture in self.static.architectures:
            check_length(int(states[0].num_tokens[state_rows].max()) + num_tokens, architecture.context_length)
        taken = start = states[0].length
        needed = start + num_tokens
        index = np.arange(num_rows)  # original row of each row of the batch, without those that only fill its bucket
        caches = [state.buffer.arrays for state in states]
        rows, padding = batch(caches, newest, states[0].padding, state_rows, capacity(taken, needed))
        tokens = np.zeros((num_tokens, num_rows), dtype=np.int64)
        log_probs, model_tokens = np.zeros((len(caches), num_rows)), 0
        while taken < needed and (going := ~np.asarray(rows.finished)[: len(index)]).any():
            if bucket(int(going.sum()), MIN_BUCKET) < len(padding) or taken == capacity_of(rows):
                kept = np.flatnonzero(going)
                newest = np.asarray(rows.newest)[kept]
                rows, padding = batch(rows.caches, newest, padding, kept, capacity(taken, needed))
                index = index[kept]
            steps = slice(taken - start, min(needed, capacity_of(rows)) - start)
            drawn, scores, rows = self.drawn(rows, padding, uniforms[steps, index], num_tokens, taken)
            steps = slice(steps.start, steps.start + len(drawn))
            tokens[steps, index] = drawn
            log_probs[:, index] += scores
            model_tokens += len(caches) * drawn.size
            taken += len(drawn)
        return tokens.T, log_probs, model_tokens

    def drawn(
        self, rows: Rows, padding: np.ndarray, uniforms: FloatArray, num_tokens: int, taken: int
    ) -> tuple[IntArray, FloatArray, Rows]:
        """Return at most as many more tokens as uniforms for the M rows, and the sums of their log-probs, (models, M)."""
        most, num_rows = uniforms.shape
        columns = np.zeros((bucket(num_tokens, MIN_BUCKET), len(padding)), dtype=np.float32)
        columns[:most, :num_rows] = uniforms
        few = len(padding) // 2 if len(padding) > MIN_BUCKET else 0
        limits = np.int32(taken), np.int32(most), np.int32(few)
        rows, tokens, log_probs, count = draw_until(self.static, self.weights, rows, padding, columns, *limits)
        num_steps = int(count)
        scores = np.asarray(log_probs, dtype=np.float64)[:num_steps, :, :num_rows].sum(axis=0)
        return np.asarray(tokens)[:num_steps, :num_rows], scores, rows


def capacity(taken: int, needed: int) -> int:
    """Return the number of slots of a buffer of which `taken` are in use and `needed` will be in the end."""
    rounded = (
        -(-needed // MIN_BUCKET) * MIN_BUCKET
    )  # prompts are rounded up already: powers of two would be a third too long
    return min(rounded, bucket(taken + 1, GROWTH))


def capacity_of(rows: Rows) -> int:
    """Return the number of slots of the rows' caches."""
    return int(rows.caches[0].keys.shape[3])


def batch(
    caches: Sequence[Cache], newest: Array, padding: np.ndarray, chosen: IntArray, num_slots: int
) -> tuple[Rows, np.ndarray]:
    """Return a batch of chosen rows of the caches, with `num_slots` slots, and its padding; `newest` belongs to these rows."""
    size = bucket(len(chosen), MIN_BUCKET)
    picked = padded_to(chosen, size)
    copies = tuple(gather_rows(picked, cache, picked, num_slots)[1] for cache in caches)
    return Rows(copies, padded_to(newest, size), np.arange(size) >= len(chosen)), padding[picked]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def draw_until(
    static: StaticModels, weights: Weights, rows: Rows, padding: Any, uniforms: Any, taken: Any, most: Any, few: Any
) -> tuple[Rows, Any, Any, Any]:
    """Return the rows after `most` more tokens, or as soon as at most `few` of them are unfinished.

    Parameters
    ----------
    static, weights, rows, padding
        The models, the R rows and their padding; the buffers of the caches are donated.
    uniforms
        Uniform random numbers in [0, 1), shape (T, R), T >= most.
    taken
        Number of slots of the caches in use.
    most
        Largest number of tokens to draw.
    few
        Number of unfinished rows at which to stop.

    Returns
    -------
    The rows, the tokens (T, R), their log-probs (T, models, R), and the number of tokens drawn, at most T.
    """

    def not_yet(carried: Any) -> Any:
        count, rows, _, _ = carried
        return (count < most) & ((~rows.finished).sum() > few)

    def one_more(carried: Any) -> Any:
        count, rows, tokens, log_probs = carried
        rows, (newest, scores) = next_token(static, weights, rows, padding, uniforms[count], taken + count)
        return count + 1, rows, tokens.at[count].set(newest), log_probs.at[count].set(scores)

    tokens = jnp.zeros(uniforms.shape, dtype=jnp.int32)
    log_probs = jnp.zeros((len(uniforms), len(static.architectures), uniforms.shape[1]), dtype=jnp.float32)
    count, rows, tokens, log_probs = lax.while_loop(not_yet, one_more, (jnp.zeros_like(most), rows, tokens, log_probs))
    return rows, tokens, log_probs, count
