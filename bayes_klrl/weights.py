"""Log-space importance weights: their mean, their effective sample size, and diagnostics of both.

All functions act on the last axis, compute in NumPy float64, accept -inf as a legal log-weight (likelihood 0) and never write
into the caller's arrays. W denotes normalised weights, sum(W) = 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray, IntArray

__all__ = [
    "check_log_weights",
    "effective_sample_size",
    "grouped_ess",
    "log_evidence_se",
    "logmeanexp",
    "logsumexp",
    "normalised",
    "psis",
]


def check_log_weights(log_weights: ArrayLike) -> FloatArray:
    """Return the log-weights as float64, refusing NaN and +inf, which no likelihood can have."""
    log_w = np.asarray(log_weights, dtype=np.float64)
    if np.isnan(log_w).any() or np.isposinf(log_w).any():
        bad = log_w[np.isnan(log_w) | np.isposinf(log_w)][0]
        raise BayesKLRLError(
            f"Log-weights must be finite or -inf; got {bad}. A likelihood of 0 is -inf; a NaN comes from an "
            "error in the computation before."
        )
    return log_w


def logsumexp(log_weights: ArrayLike) -> FloatArray:
    """Return log sum_n exp(log w_n) over the last axis; -inf where every weight is 0.

    Examples
    --------
    >>> bool(np.isclose(logsumexp([np.log(0.25), np.log(0.5), -np.inf]), np.log(0.75)))
    True
    """
    log_w = check_log_weights(log_weights)
    top = log_w.max(axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: FloatArray = np.log(np.exp(log_w - shift).sum(axis=-1)) + shift[..., 0]
    return total


def logmeanexp(log_weights: ArrayLike) -> FloatArray:
    """Return log (1/N) sum_n exp(log w_n): the importance-sampling estimate of the log evidence."""
    log_w = np.asarray(log_weights, dtype=np.float64)
    result: FloatArray = logsumexp(log_w) - np.log(log_w.shape[-1])
    return result


def normalised(log_weights: ArrayLike) -> FloatArray:
    """Return W = w / sum(w) over the last axis.

    Raises
    ------
    BayesKLRLError
        If every log-weight of a row is -inf, so that the sum is 0.
    """
    log_w = check_log_weights(log_weights)
    total = logsumexp(log_w)
    if np.isneginf(total).any():
        raise BayesKLRLError(
            "All log-weights are -inf: no draw has positive likelihood. Draw more, use a proposal that knows the "
            "constraint, or relax the constraint to log(eps)."
        )
    weights: FloatArray = np.exp(log_w - total[..., None])
    return weights


def effective_sample_size(log_weights: ArrayLike) -> FloatArray:
    """Return Kish's effective sample size 1 / sum(W^2), in 0..N; 0 where every weight is 0.

    Examples
    --------
    >>> float(effective_sample_size([0.0, 0.0, -np.inf, -np.inf]))
    2.0
    """
    log_w = check_log_weights(log_weights)
    with np.errstate(invalid="ignore"):
        ess = np.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w))
    result: FloatArray = np.where(np.isnan(ess), 0.0, ess)
    return result


def grouped_ess(log_weights: FloatArray, groups: IntArray) -> float:
    """Return 1 / sum_g (sum_{n in g} W_n)^2, the effective number of independent ancestors.

    After resampling, draws that descend from one particle are copies of each other up to their last tokens. Kish's number is
    N of N right after resampling; this one counts families instead of draws, and so is not too optimistic.

    Parameters
    ----------
    log_weights
        Unnormalised log-weights, shape (N,).
    groups
        The family that each draw belongs to, integers below N, shape (N,).
    """
    if np.isneginf(log_weights).all():
        return 0.0
    mass = np.bincount(groups, weights=normalised(log_weights))
    return float(1.0 / np.square(mass).sum())


def log_evidence_se(ess: ArrayLike, num_draws: int, num_resampled: ArrayLike = 0) -> FloatArray:
    """Return the standard error of log Z-hat by the delta method.

    Lee and Whiteley (2018, eq. 9), read with E the families by first ancestor and k the number of resamplings:

        Var(Z-hat / Z) ~ 1 - (N / (N - 1))^(k + 1) (1 - sum_E (sum_{n in E} W_n)^2),

    which for k = 0 is the importance-sampling formula (1 / ESS - 1 / N) N / (N - 1). The estimate can be negative; then the
    formula with k = 0, which is never smaller, replaces it.

    Parameters
    ----------
    ess
        Effective sample size; counted by families where particles were resampled (`grouped_ess`).
    num_draws
        N, the number of draws.
    num_resampled
        k, the number of resamplings by multinomial draws. Other schemes add so little noise that k = 0 is closer for them.

    Returns
    -------
    The standard error in nats, same shape as `ess`; infinite where ess is 0, NaN for a single draw.
    """
    ess = np.asarray(ess, dtype=np.float64)
    if num_draws < 2:
        return np.full(ess.shape, np.nan)
    with np.errstate(divide="ignore"):
        ratio, between = num_draws / (num_draws - 1), 1.0 - 1.0 / ess
        uncorrected = 1.0 - ratio * between
        variance = 1.0 - ratio ** (np.asarray(num_resampled, dtype=np.float64) + 1) * between
    se: FloatArray = np.sqrt(np.maximum(np.where(variance > 0, variance, uncorrected), 0.0))
    return se


def psis(log_weights: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return Pareto-smoothed normalised log-weights and the tail shape k (Vehtari et al. 2024).

    The largest M = ceil(min(N / 5, 3 sqrt(N))) weights are replaced by the expected order statistics of a generalised
    Pareto law fitted to them. k < 0.5 is good, k < 0.7 usable. Always read k together with the effective sample size: k
    looks good for bounded rewards at ESS/N = 0.005, and it cannot see a mode that was never drawn. Smoothed weights are
    biased: do not use them for certificates.

    Parameters
    ----------
    log_weights
        Unnormalised log-weights, shape (..., N). Weights of 0 (-inf) stay 0 and do not enter the fit.

    Returns
    -------
    Smoothed log-weights, shape (..., N), whose logsumexp is 0; and k, shape (...,). k is -inf where the largest weight fills
    the whole tail (constant weights, the best case), and NaN where there is no tail to fit: for fewer than 21 positive
    weights, or fewer than 5 distinct ones in the tail.
    """
    log_w = check_log_weights(log_weights)
    smoothed = np.empty_like(log_w)
    shape = np.empty(log_w.shape[:-1])
    for index in np.ndindex(*log_w.shape[:-1]):
        smoothed[index], shape[index] = _psis_row(log_w[index])
    return smoothed, shape


def _psis_row(log_w: FloatArray) -> tuple[FloatArray, float]:
    """Smooth one row, shape (N,)."""
    total = logsumexp(log_w)
    if np.isneginf(total):
        return log_w.copy(), np.nan
    smoothed = log_w - total
    positive = np.flatnonzero(np.isfinite(smoothed))
    spread = smoothed[positive].max() - smoothed[positive].min()
    if spread < 1e-12:
        return smoothed, -np.inf
    num_tail = int(np.ceil(min(0.2 * positive.size, 3 * np.sqrt(positive.size))))
    if num_tail < 5:
        return smoothed, np.nan
    order = positive[np.argsort(smoothed[positive], kind="stable")]
    cutoff, top = smoothed[order[-num_tail - 1]], smoothed[order[-1]]
    exceedances = np.exp(smoothed[order] - top) - np.exp(cutoff - top)
    tail, exceedances = order[exceedances > 0], exceedances[exceedances > 0]
    if not tail.size:  # the largest weight fills the whole tail
        return smoothed, -np.inf
    if np.unique(exceedances).size < 5:  # a reward with few levels has no Pareto tail: its k would be arbitrary
        return smoothed, np.nan
    k, sigma = _fit_generalised_pareto(exceedances)
    quantiles = (np.arange(tail.size) + 0.5) / tail.size
    with np.errstate(over="ignore"):  # a very heavy tail: capped at the largest weight below
        expected = sigma * (np.expm1(-k * np.log1p(-quantiles)) / k if k != 0 else -np.log1p(-quantiles))
    smoothed[tail] = np.minimum(np.log(expected + np.exp(cutoff - top)) + top, top)
    return smoothed - logsumexp(smoothed), k


def _fit_generalised_pareto(exceedances: FloatArray) -> tuple[float, float]:
    """Return (k, sigma) of a generalised Pareto law by Zhang and Stephens (2009), k shrunk to 0.5 as in PSIS.

    `exceedances` are sorted and positive, shape (M,).
    """
    num = exceedances.size
    num_grid = 30 + int(np.sqrt(num))
    quartile = exceedances[int(num / 4 + 0.5) - 1]
    grid = 1 / exceedances[-1] + (1 - np.sqrt(num_grid / (np.arange(1, num_grid + 1) - 0.5))) / (3 * quartile)
    k_grid = np.log1p(-grid[:, None] * exceedances).mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_lik = num * (np.log(-grid / k_grid) - k_grid - 1)
    log_lik = np.where(np.isnan(log_lik), -np.inf, log_lik)
    theta = float(np.exp(log_lik - logsumexp(log_lik)) @ grid)
    k = float(np.log1p(-theta * exceedances).mean())
    sigma = -k / theta
    return (num * k + 10 * 0.5) / (num + 10), sigma
