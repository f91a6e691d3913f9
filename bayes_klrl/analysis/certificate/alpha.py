"""A policy against the reward-KL frontier: the alpha that it effectively solved for, and the KL that it paid too much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.analysis.frontier.draws import pool_of
from bayes_klrl.analysis.frontier.implied_alpha import gap
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError

__all__ = ["FrontierPoint", "frontier_point"]


@dataclass(frozen=True)
class FrontierPoint:
    """The implied alpha with its interval and the frontier gap with its error, as in `Certificate`; NaN where undefined."""

    implied_alpha: float
    implied_alpha_interval: tuple[float, float]
    gap: float
    gap_se: float
    notes: tuple[str, ...]


def frontier_point(policy_draws: Draws, prior_draws: Draws, *, has_alpha: bool) -> FrontierPoint:
    """Return implied alpha and frontier gap of a policy, from its own draws and a pool of prior draws."""
    if not has_alpha:
        return _undefined("no implied alpha: a likelihood of constraints alone has none")
    reward = policy_draws.reward
    log_ratio = policy_draws.log_proposal - policy_draws.log_prior
    if not (np.isfinite(reward).all() and np.isfinite(log_ratio).all()):
        return _undefined("no implied alpha: the policy draws completions of likelihood or prior probability 0")
    num_prompts, num_draws = reward.shape
    scale = num_draws * num_prompts**2
    covariance = sum(np.cov(r, k) for r, k in zip(reward, log_ratio, strict=True)) / scale
    try:
        found = gap(
            pool_of(prior_draws),
            float(reward.mean()),
            float(log_ratio.mean()),
            reward_se=float(np.sqrt(covariance[0, 0])),
            kl_se=float(np.sqrt(covariance[1, 1])),
            covariance=float(covariance[0, 1]),
        )
    except BayesKLRLError as error:
        return _undefined(f"no implied alpha: {error}")
    weak = "implied alpha and frontier gap rest on too few of the prior's draws to trust their errors (draw more: num_draws)"
    notes = () if found.implied.valid else (weak,)
    b, margin = found.implied.inverse_alpha, 1.96 * found.implied.inverse_alpha_se
    return FrontierPoint(found.implied.alpha, alphas_between(b - margin, b + margin), found.value, found.se, notes)


def alphas_between(low: float, high: float) -> tuple[float, float]:
    """Return the interval of alpha = 1 / b for b from low to high; up to inf where b may be 0, the prior's own reward.

    Examples
    --------
    >>> alphas_between(1.0, 2.0), alphas_between(-1.0, 4.0), alphas_between(-2.0, -1.0)
    ((0.5, 1.0), (0.25, inf), (-1.0, -0.5))
    """
    if low > 0 or high < 0:
        return 1 / high, 1 / low
    return (1 / high, np.inf) if high > 0 else (np.inf, np.inf)


def _undefined(note: str) -> FrontierPoint:
    return FrontierPoint(np.nan, (np.nan, np.nan), np.nan, np.nan, (note,))
