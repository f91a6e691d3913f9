"""Bounds on log Z that hold with a stated probability, from independent unbiased estimates of Z.

Let Z-hat_1, ..., Z-hat_M >= 0 be independent with mean Z, as those of SMC are. For any lambda in [0, 1]

    W(z) = prod_i (1 - lambda + lambda Z-hat_i / z)   has mean 1 at z = Z,

so by Markov's inequality P(W(Z) >= 1 / delta) <= delta, and the z at which W crosses 1 / delta is a lower bound on Z that
fails with probability at most delta, without assumptions on variance, normality or M. It is a bet against z (Waudby-Smith
and Ramdas 2023, section 4). lambda = 1 is the estimates' product, mean log Z-hat - log(1 / delta) / M (theory.md 3.11), best
when they hardly vary; a small lambda bets on their mean and tolerates runs with Z-hat = 0. A mixture over lambda also has mean
1: half of its weight is on lambda = 1, the rest on a grid. Conditional SMC has E[1 / Z-hat] <= 1 / Z, and the same bet on
1 / Z gives the upper bound.
"""

from __future__ import annotations

import math

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import logsumexp

__all__ = ["evidence_lower_bound", "evidence_upper_bound", "mean_lower_bound", "mean_upper_bound"]

_STAKES = np.array([1.0, 0.9, 0.75, 0.5, 0.3, 0.15, 0.05, 0.015])
_LOG_PRIOR = np.log(np.array([0.5, *[0.5 / 7] * 7]))
_HALVINGS = 40  # of an interval of a few nats: to 1e-11 nats, rounded down


def evidence_lower_bound(log_estimates: FloatArray, delta: float) -> FloatArray:
    """Return a lower bound on log Z of each prompt that holds with probability at least 1 - delta, shape (P,).

    Parameters
    ----------
    log_estimates
        log Z-hat of M independent runs, E[Z-hat] = Z, shape (P, M); -inf if all particles of a run have weight 0.
    delta
        Probability of failure for each prompt, in (0, 1).

    Examples
    --------
    For runs without variance the bound is less than log(2 / delta) / M = 0.092 below them:

    >>> bool(evidence_lower_bound(np.full((1, 40), 3.0), 0.05)[0] > 3 - np.log(2 / 0.05) / 40)
    True
    """
    estimates = _checked(log_estimates, delta)
    bounds = np.full(len(estimates), -np.inf)
    alive = np.isfinite(estimates).any(axis=1)
    bounds[alive] = _crossings(estimates[alive], math.log(1 / delta))
    return bounds


def evidence_upper_bound(log_estimates: FloatArray, delta: float) -> FloatArray:
    """Return an upper bound on log Z of each prompt that holds with probability at least 1 - delta, shape (P,).

    Parameters
    ----------
    log_estimates
        log Z-hat of M independent runs of conditional SMC, E[1 / Z-hat] <= 1 / Z, shape (P, M).
    delta
        Probability of failure for each prompt, in (0, 1).
    """
    return -evidence_lower_bound(-np.asarray(log_estimates, dtype=np.float64), delta)


def mean_lower_bound(log_estimates: FloatArray, delta: float) -> float:
    """Return a lower bound on the mean of log Z over prompts that holds with probability at least 1 - delta.

    It is the better of two bounds at delta / 2 each: the product of all estimates of all prompts,
    mean log Z-hat - log(2 / delta) / (P M), and the mean of the prompts' own bounds.
    """
    estimates = _checked(log_estimates, delta)
    product = float(estimates.mean()) - math.log(2 / delta) / estimates.size
    return max(product, float(evidence_lower_bound(estimates, delta / 2 / len(estimates)).mean()))


def mean_upper_bound(log_estimates: FloatArray, delta: float) -> float:
    """Return an upper bound on the mean of log Z over prompts that holds with probability at least 1 - delta."""
    return -mean_lower_bound(-np.asarray(log_estimates, dtype=np.float64), delta)


def _checked(log_estimates: FloatArray, delta: float) -> FloatArray:
    """Return the estimates as float64 (P, M), after checking shape, values and delta."""
    estimates = np.asarray(log_estimates, dtype=np.float64)
    if estimates.ndim != 2 or estimates.shape[1] < 1:
        raise BayesKLRLError(f"Bounds need estimates of shape (P, M) with at least one run; got {estimates.shape}.")
    if np.isnan(estimates).any() or np.isposinf(estimates).any():
        raise BayesKLRLError("Estimates of log Z must be finite, or -inf for a run whose particles all have weight 0.")
    if not 0 < delta < 1:
        raise BayesKLRLError(f"The probability of failure must lie between 0 and 1; got {delta!r}.")
    return estimates


def _crossings(estimates: FloatArray, target: float) -> FloatArray:
    """Return the largest log z of each row with log W(z) >= target, rounded down, for estimates (P, M)."""
    high = estimates.max(axis=1)  # here W <= 1
    step = np.ones(len(high))
    while (short := _log_wealth(estimates, high - step) < target).any():
        step[short] *= 2
    low: FloatArray = high - step
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        reached = _log_wealth(estimates, middle) >= target
        low, high = np.where(reached, middle, low), np.where(reached, high, middle)
    return low


def _log_wealth(estimates: FloatArray, log_z: FloatArray) -> FloatArray:
    """Return the log of the mixture of bets against each row's z, shape (P,)."""
    with np.errstate(divide="ignore"):
        kept, staked = np.log1p(-_STAKES)[:, None], np.log(_STAKES)[:, None]
    gains = (estimates - log_z[:, None])[:, None]  # (P, 1, M)
    wealth: FloatArray = np.logaddexp(kept, staked + gains).sum(axis=2)
    return logsumexp(_LOG_PRIOR + wealth)
