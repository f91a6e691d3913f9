"""Resampling schemes: weights W (N,) in, N ancestors out, E[offspring of n] = N W_n for each of them.

Unbiased offspring counts keep E[Z-hat] = Z, also when the decision to resample looks at the weights so far
(Chopin and Papaspiliopoulos 2020, chapters 9 and 10). To add a scheme, add a function to `RESAMPLING`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray, IntArray

__all__ = [
    "RESAMPLING",
    "conditional_multinomial",
    "multinomial",
    "resampling_scheme",
    "residual",
    "stratified",
    "systematic",
]

Scheme = Callable[[FloatArray, np.random.Generator], IntArray]


def multinomial(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return N independent ancestors. It has the highest variance of all schemes, and is the one of plain conditional SMC."""
    return _inverse_cdf(weights, np.sort(rng.random(weights.size)))


def stratified(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return one ancestor from each of N equal strata, drawn with N independent uniforms."""
    return _inverse_cdf(weights, (np.arange(weights.size) + rng.random(weights.size)) / weights.size)


def systematic(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return one ancestor from each of N equal strata, drawn with one uniform that all strata share."""
    return _inverse_cdf(weights, (np.arange(weights.size) + rng.random()) / weights.size)


def residual(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return floor(N W_n) copies of each n, and fill up to N by multinomial draws from the remainders N W_n - floor(N W_n)."""
    num = weights.size
    copies = np.floor(num * weights).astype(np.int64)
    kept = np.repeat(np.arange(num), copies)
    num_left = num - kept.size
    if num_left == 0:
        return kept
    left = np.maximum(num * weights - copies, 0.0)
    drawn = _inverse_cdf(left / left.sum(), np.sort(rng.random(num_left)))
    return np.concatenate([kept, drawn])


def conditional_multinomial(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return ancestor 0 for particle 0, and independent ancestors, from all N, for the N - 1 others (theory.md 3.10).

    It is not in `RESAMPLING`: it is `multinomial` given that the path of particle 0 is fixed.
    """
    return np.concatenate([[0], _inverse_cdf(weights, np.sort(rng.random(weights.size - 1)))])


RESAMPLING: dict[str, Scheme] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
}


def resampling_scheme(name: str) -> Scheme:
    """Return the resampling scheme of that name; an unknown name is refused, and the error lists those that exist."""
    if not isinstance(name, str) or name not in RESAMPLING:
        raise BayesKLRLError(f"Unknown resampling scheme {name!r}; choose one of {sorted(RESAMPLING)}.")
    return RESAMPLING[name]


def _inverse_cdf(weights: FloatArray, uniforms: FloatArray) -> IntArray:
    """Return the ancestor of each sorted uniform; a particle of weight 0 has no offspring, even with rounding."""
    cumulative = weights.cumsum()
    last = int(np.flatnonzero(weights)[-1])
    cumulative[last:] = 1.0
    return np.minimum(np.searchsorted(cumulative, uniforms, side="right"), last)
