"""The exact distribution of best-of-n by order statistics: its density, its KL from the prior and its win rate, with ties.

Let the prior give mass m_l to the completions of equal reward at level l, and mass F_l to rewards up to that level. The best
of n draws is at level l with probability F_l^n - F_{l-1}^n, and within a level it follows the prior, so
(theory.md 6.5; Beirami et al. 2024)

    p_n(x) = p0(x) / m_l (F_l^n - F_{l-1}^n),   KL(p_n || p0) = sum_l (F_l^n - F_{l-1}^n) log ((F_l^n - F_{l-1}^n) / m_l)

If rewards never tie, the sum becomes the integral of n F^(n-1) log(n F^(n-1)) over F from 0 to 1, which is
log n - (n - 1) / n. This value is an upper bound in every case.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray

__all__ = ["best_of_n_kl", "best_of_n_kl_bound", "best_of_n_log_probs", "best_of_n_win_rate"]

_OfLevels = Callable[[FloatArray, np.ndarray, int], float]


def best_of_n_kl_bound(n: int) -> float:
    """Return the bound log n - (n - 1) / n on the KL in nats, attained if rewards never tie."""
    check_count("n", n)
    return float(np.log(n) - (n - 1) / n)


def best_of_n_kl(reward: ArrayLike, n: int, log_prior: ArrayLike | None = None) -> FloatArray:
    """Return KL(best-of-n || prior) in nats over the last axis of `reward`.

    Parameters
    ----------
    reward
        Rewards, shape (..., M): of every completion if `log_prior` is given, and the result is exact; otherwise of M draws
        from the prior, and the result is an estimate in which each level's mass is its share of the draws.
    n
        Number of candidates.
    log_prior
        log p0 of every completion, in the shape of `reward`.

    Returns
    -------
    The KL in nats, in the shape of `reward` without its last axis.

    Notes
    -----
    A reward that occurs once among M draws says nothing about ties. Such draws are treated as a continuum, for which the
    integral is known, so that rewards without ties give the bound exactly. If some of them belong to rare levels the estimate
    is too high, but never above the bound; it tends to the exact value as M grows.

    Examples
    --------
    >>> float(best_of_n_kl([0.0, 1.0], 2, np.log([0.5, 0.5])).round(4))
    0.1308
    >>> bool(np.isclose(best_of_n_kl([0.3, 0.1, 0.2], 8), best_of_n_kl_bound(8)))
    True
    """
    check_count("n", n)
    return _over_rows(_kl_of_levels, reward, n, log_prior)


def best_of_n_win_rate(reward: ArrayLike, n: int, log_prior: ArrayLike | None = None) -> FloatArray:
    """Return the probability that the best of n beats one prior draw, ties counted half: n / (n + 1) if rewards never tie.

    Parameters
    ----------
    reward, n, log_prior
        Rewards, number of candidates and prior log-probabilities, as in `best_of_n_kl`.
    """
    check_count("n", n)
    return _over_rows(_wins_of_levels, reward, n, log_prior)


def best_of_n_log_probs(exact: Draws, n: int) -> FloatArray:
    """Return log p_n(x) of every completion of an enumerated posterior, (P, N).

    Parameters
    ----------
    exact
        The draws that `Exact().run` returned, which are all completions.
    n
        Number of candidates.

    Raises
    ------
    BayesKLRLError
        If the draws are not every completion exactly once.
    """
    check_count("n", n)
    total = np.exp(exact.log_prior).sum(axis=1)
    if np.abs(total - 1).max() > 1e-4:
        raise BayesKLRLError(
            f"The exact law of best-of-n needs every completion once, and prior masses that sum to 1; got {total}. Use "
            "bk.Exact().run(posterior, seed=0)."
        )
    log_probs = np.empty(exact.shape)
    for p, (reward, log_prior) in enumerate(zip(exact.reward, exact.log_prior, strict=True)):
        level, mass, _ = _levels(reward, log_prior)
        with np.errstate(divide="ignore", invalid="ignore"):  # a level of mass 0 is never drawn
            log_ratio = np.log(_level_law(mass, n)) - np.log(mass)
            log_probs[p] = np.where(mass[level] > 0, log_prior + log_ratio[level], -np.inf)
    return log_probs


def _over_rows(function: _OfLevels, reward: ArrayLike, n: int, log_prior: ArrayLike | None) -> FloatArray:
    """Return function(mass, is_tied, n) of the levels of each row, in the shape of `reward` without its last axis."""
    r = np.asarray(reward, dtype=np.float64)
    known = None if log_prior is None else np.asarray(log_prior, dtype=np.float64)
    result = np.empty(r.shape[:-1])
    for index in np.ndindex(*r.shape[:-1]):
        _, mass, tied = _levels(r[index], None if known is None else known[index])
        result[index] = function(mass, tied, n)
    return result


def _levels(reward: FloatArray, log_prior: FloatArray | None) -> tuple[np.ndarray, FloatArray, np.ndarray]:
    """Return the level of each reward (M,), the masses of levels in increasing order of reward, and which are known atoms."""
    _, level, count = np.unique(reward, return_inverse=True, return_counts=True)
    if log_prior is None:
        return level, count / reward.size, count > 1
    mass = np.bincount(level, weights=np.exp(log_prior), minlength=count.size)
    return level, mass / mass.sum(), np.ones(count.size, dtype=bool)


def _edges(mass: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return F_{l-1} and F_l of each level."""
    upper = np.minimum(mass.cumsum(), 1.0)
    upper[-1] = 1.0
    return np.concatenate([[0.0], upper[:-1]]), upper


def _level_law(mass: FloatArray, n: int) -> FloatArray:
    """Return F_l^n - F_{l-1}^n."""
    lower, upper = _edges(mass)
    law: FloatArray = upper**n - lower**n
    return law


def _kl_of_levels(mass: FloatArray, tied: np.ndarray, n: int) -> float:
    """Return the KL: the sum over atoms plus the integral over the other levels."""
    law, (lower, upper) = _level_law(mass, n), _edges(mass)

    def integral(F: FloatArray) -> FloatArray:  # of n F^(n-1) log(n F^(n-1))
        values: FloatArray = F**n * (np.log(n) + (n - 1) * np.log(np.maximum(F, np.finfo(float).tiny)) - (n - 1) / n)
        return values

    with np.errstate(divide="ignore", invalid="ignore"):
        atoms = np.where(law > 0, law * (np.log(law) - np.log(mass)), 0.0)
    return float(max(np.where(tied, atoms, integral(upper) - integral(lower)).sum(), 0.0))


def _wins_of_levels(mass: FloatArray, tied: np.ndarray, n: int) -> float:
    """Return P(best > other) + P(best = other) / 2."""
    law, (lower, upper) = _level_law(mass, n), _edges(mass)
    continuum = n / (n + 1) * (upper ** (n + 1) - lower ** (n + 1))
    return float(np.where(tied, law * (lower + upper) / 2, continuum).sum())
