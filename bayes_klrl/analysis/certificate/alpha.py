"""A policy against the reward-KL frontier: the alpha that it effectively solved for, and the KL that it paid too much."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.analysis.frontier.draws import pool_of
from bayes_klrl.analysis.frontier.implied_alpha import gap
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray

__all__ = ["FrontierPoint", "enumerated_point", "frontier_point"]


@dataclass(frozen=True)
class FrontierPoint:
    """A policy's mean reward and KL to the prior, and its place below the frontier, as in `Certificate`; NaN if undefined."""

    reward: float
    kl_prior: float
    implied_alpha: float = np.nan
    implied_alpha_interval: tuple[float, float] = (np.nan, np.nan)
    gap: float = np.nan
    gap_se: float = np.nan
    notes: tuple[str, ...] = ()


def frontier_point(policy_draws: Draws, prior_draws: Draws, *, has_alpha: bool) -> FrontierPoint:
    """Return the point of a policy, estimated from its own draws and a pool of prior draws."""
    reward = policy_draws.reward
    log_ratio = policy_draws.log_proposal - policy_draws.log_prior
    point = FrontierPoint(float(reward.mean()), float(log_ratio.mean()))
    if (reason := _why_undefined(point, has_alpha, np.stack([reward, prior_draws.reward]))) is not None:
        return replace(point, notes=(reason,))
    num_prompts, num_draws = reward.shape
    scale = num_draws * num_prompts**2
    covariance = sum(np.cov(r, k) for r, k in zip(reward, log_ratio, strict=True)) / scale
    try:
        found = gap(
            pool_of(prior_draws),
            point.reward,
            point.kl_prior,
            reward_se=float(np.sqrt(covariance[0, 0])),
            kl_se=float(np.sqrt(covariance[1, 1])),
            covariance=float(covariance[0, 1]),
        )
    except BayesKLRLError as error:
        return replace(point, notes=(f"no implied alpha: {error}",))
    weak = "implied alpha and frontier gap rest on too few of the prior's draws to trust their errors (draw more: num_draws)"
    b, margin = found.implied.inverse_alpha, 1.96 * found.implied.inverse_alpha_se
    return replace(
        point,
        implied_alpha=found.implied.alpha,
        implied_alpha_interval=alphas_between(b - margin, b + margin),
        gap=found.value,
        gap_se=found.se,
        notes=() if found.implied.valid else (weak,),
    )


def enumerated_point(everything: Draws, log_policy: FloatArray, *, has_alpha: bool) -> FrontierPoint:
    """Return the point of a policy by sums over all completions: no errors, and a gap of at most KL(q || p*).

    Parameters
    ----------
    everything
        All M completions with their prior and reward, as `Exact` lists them.
    log_policy
        log q of each, shape (P, M).
    has_alpha
        Whether the likelihood has a reward, and not constraints alone.
    """
    mass = np.exp(log_policy)
    drawn = mass > 0
    with np.errstate(invalid="ignore"):  # what is never drawn counts 0, whatever its reward
        reward = np.where(drawn, mass * everything.reward, 0.0).sum(axis=1).mean()
        kl_prior = np.where(drawn, mass * (log_policy - everything.log_prior), 0.0).sum(axis=1).mean()
    point = FrontierPoint(float(reward), float(kl_prior))
    possible = np.where(np.isneginf(everything.log_prior), -np.inf, everything.reward)
    if (reason := _why_undefined(point, has_alpha, possible)) is not None:
        return replace(point, notes=(reason,))
    try:
        found = gap(pool_of(everything), point.reward, point.kl_prior)
    except BayesKLRLError:
        reason = "no implied alpha: the policy's mean reward is at an end of what any posterior has, where alpha is 0"
        return replace(point, notes=(reason,))
    alpha = found.implied.alpha
    return replace(
        point, implied_alpha=alpha, implied_alpha_interval=(alpha, alpha), gap=max(found.value, 0.0), gap_se=0.0
    )


def _why_undefined(point: FrontierPoint, has_alpha: bool, rewards: FloatArray) -> str | None:
    """Return why a policy has no place on the frontier, given the rewards of what can be drawn, (..., N); None if it has."""
    if not has_alpha:
        return "no implied alpha: a likelihood of constraints alone has none"
    if not (np.isfinite(point.reward) and np.isfinite(point.kl_prior)):
        return "no implied alpha: the policy draws completions of likelihood or prior probability 0"
    finite = rewards[np.isfinite(rewards)]
    if np.ptp(finite) == 0:
        return (
            f"no implied alpha: the reward is {finite[0]:.6g} wherever it is finite, in all completions that were seen, and a "
            "constant reward has the same posterior at every alpha"
        )
    return None


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
