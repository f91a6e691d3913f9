"""Resampling schemes: weights W (N,) in, N ancestors out, E[offspring of n] = N W_n for each of them.

Unbiased offspring counts keep E[Z-hat] = Z, also when the decision to resample looks at the weights so far
(Chopin and Papaspiliopoulos 2020, chapters 9 and 10). Adding a scheme is adding a function to `RESAMPLING`.
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
    """Return N independent ancestors; the highest variance, and the scheme of plain conditional SMC."""
    return _inverse_cdf(weights, np.sort(rng.random(weights.size)))


def stratified(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return one ancestor from each of N equal strata, each by a uniform of its own."""
    return _inverse_cdf(weights, (np.arange(weights.size) + rng.random(weights.size)) / weights.size)


def systematic(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return one ancestor from each of N equal strata, all by the same uniform."""
    return _inverse_cdf(weights, (np.arange(weights.size) + rng.random()) / weights.size)


def residual(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Return floor(N W_n) copies of each n, and the rest by multinomial draws from what was rounded off."""
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
    """Return ancestor 0 for particle 0, and N - 1 independent ones, from all N, for the others (theory.md 3.10).

    Not one of `RESAMPLING`: it is what `multinomial` becomes when the path of particle 0 is given.
    """
    return np.concatenate([[0], _inverse_cdf(weights, np.sort(rng.random(weights.size - 1)))])


RESAMPLING: dict[str, Scheme] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
}


def resampling_scheme(name: str) -> Scheme:
    """Return the scheme of that name, or say which there are."""
    if not isinstance(name, str) or name not in RESAMPLING:
        raise BayesKLRLError(f"Unknown resampling scheme {name!r}; choose one of {sorted(RESAMPLING)}.")
    return RESAMPLING[name]


def _inverse_cdf(weights: FloatArray, uniforms: FloatArray) -> IntArray:
    """Return the ancestor of each sorted uniform; a weight of 0 has no offspring, whatever rounding does."""
    cumulative = weights.cumsum()
    last = int(np.flatnonzero(weights)[-1])
    cumulative[last:] = 1.0
    return np.minimum(np.searchsorted(cumulative, uniforms, side="right"), last)
