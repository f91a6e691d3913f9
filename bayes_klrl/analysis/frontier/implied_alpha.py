"""The alpha that a policy effectively solved for, and how far below the frontier it lies.

Let b* solve R(b*) = E_q[r] on the path of posteriors p*_b (see `path`). Then, for any policy q (theory.md 1.7, Pythagoras),

    KL(q || p0) = KL(q || p*_b*) + K(b*),

so that 1 / b* is the alpha whose posterior buys the policy's reward at the lowest KL, and the gap KL(q || p0) - K(b*) is
exactly the policy's KL to that posterior, the nearest one on the path. b* < 0 is legal: a reward below the prior's mean.
Several prompts share one b*; rewards and KLs are then means over prompts, and so is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bayes_klrl.analysis.frontier.path import RewardPool, curves, moments
from bayes_klrl.checks import check_finite
from bayes_klrl.errors import BayesKLRLError

__all__ = ["Gap", "Implied", "gap", "gap_at", "implied", "monotone_root"]

_HALVINGS = 80
_DOUBLINGS = 60


@dataclass(frozen=True)
class Implied:
    """The posterior on the path that has a policy's reward.

    Parameters
    ----------
    inverse_alpha, inverse_alpha_se
        b* and its standard error, from the pool's draws and the policy's reward together.
    kl, kl_se
        K(b*), the least KL to the prior that buys the reward, and its standard error.
    log_evidence
        log Z(b*), mean over prompts.
    valid
        Whether b* lies where the pool can be relied on; elsewhere it is extrapolation.
    """

    inverse_alpha: float
    inverse_alpha_se: float
    kl: float
    kl_se: float
    log_evidence: float
    valid: bool

    @property
    def alpha(self) -> float:
        """1 / b*: units of reward per nat; inf at the prior's own reward, negative below it."""
        return 1.0 / self.inverse_alpha if self.inverse_alpha else float("inf")


@dataclass(frozen=True)
class Gap:
    """KL(q || p*_b*), the nats that a policy paid beyond what its reward costs.

    Parameters
    ----------
    value, se
        The gap and its standard error; a value below 0 by no more than its error is noise.
    implied
        The posterior at b*.
    """

    value: float
    se: float
    implied: Implied


def implied(pool: RewardPool, reward: float, *, reward_se: float = 0.0) -> Implied:
    """Return the posterior on the path whose reward is that of a policy.

    Errors by the delta method: with V = Var_p*_b*[r] = dR/db, var(b*) = (se_R^2 + reward_se^2) / V^2; and since K as a
    function of the reward m is max_b [b m - log Z(b)], var K = se_logZ^2 + b*^2 reward_se^2.

    Parameters
    ----------
    pool
        Draws from the prior, or weighted ones.
    reward
        E_q[r] of the policy, mean over prompts.
    reward_se
        The standard error of `reward`.

    Raises
    ------
    BayesKLRLError
        If no draw of the pool lies beyond that reward.

    Examples
    --------
    >>> coin = RewardPool(np.zeros(1000), np.repeat([0.0, 1.0], 500))    # R(b) = e^b / (1 + e^b)
    >>> round(implied(coin, 0.9).inverse_alpha, 6), round(float(np.log(9)), 6)
    (2.197225, 2.197225)
    """
    check_finite("reward", reward)
    check_finite("reward_se", reward_se)
    low, high = pool.reward_range()
    if not low < reward < high:
        raise BayesKLRLError(
            f"No posterior of this pool has the mean reward {reward:.6g}: its rewards reach from {low:.6g} to {high:.6g}, "
            "both ends excluded. Draw more (`num_draws`)."
        )
    b = monotone_root(lambda x: moments(pool, x)[0] - reward, start=1.0 / (high - low))
    if b is None:
        raise BayesKLRLError(f"The mean reward {reward:.6g} is too near an end of {low:.6g} to {high:.6g}. Draw more.")
    at = curves(pool, [b])[0]
    se_reward, se_evidence = float(at.se["reward"][0]), float(at.se["log_evidence"][0])
    slope = moments(pool, b)[2]
    log_evidence = float(at.log_evidence[0])
    return Implied(
        inverse_alpha=b,
        inverse_alpha_se=float(np.hypot(se_reward, reward_se) / slope) if slope > 0 else float("inf"),
        kl=b * reward - log_evidence,
        kl_se=float(np.hypot(se_evidence, b * reward_se)),
        log_evidence=log_evidence,
        valid=bool(at.valid["reward"][0] and at.valid["log_evidence"][0]),
    )


def gap(
    pool: RewardPool,
    reward: float,
    kl: float,
    *,
    reward_se: float = 0.0,
    kl_se: float = 0.0,
    covariance: float = 0.0,
) -> Gap:
    """Return how far below the frontier a policy lies, in nats: KL(q || p0) - K(b*) = KL(q || p*_b*).

    The gap is kl - b* reward + log Z(b*), and b* minimises it, so that no error of b* enters to first order:
    var = kl_se^2 + b*^2 reward_se^2 - 2 b* covariance + se_logZ^2.

    Parameters
    ----------
    pool, reward, reward_se
        Draws, the policy's mean reward and its standard error, as for `implied`.
    kl, kl_se
        KL(q || p0) of the policy in nats, mean over prompts, and its standard error.
    covariance
        Covariance of the estimates of reward and KL. From one sample of the policy it is commonly positive; 0 if they are
        independent.
    """
    return gap_at(implied(pool, reward, reward_se=reward_se), kl, kl_se=kl_se, covariance=covariance)


def gap_at(at: Implied, kl: float, *, kl_se: float = 0.0, covariance: float = 0.0) -> Gap:
    """Return the gap of a policy whose implied posterior is known; see `gap`."""
    check_finite("kl", kl)
    check_finite("kl_se", kl_se)
    check_finite("covariance", covariance)
    variance = kl_se**2 + at.kl_se**2 - 2 * at.inverse_alpha * covariance
    return Gap(value=kl - at.kl, se=float(np.sqrt(max(variance, 0.0))), implied=at)


def monotone_root(increasing: Callable[[float], float], *, start: float, low: float | None = None) -> float | None:
    """Return where an increasing function crosses 0, by doubling and halving; None if it is not found to.

    Parameters
    ----------
    increasing
        The function.
    start
        A positive number of the size of the answer; up to 2^60 times as much is tried.
    low
        The lower end of the search, at which the function is taken to be negative; None: there is none.
    """
    high = start
    for _ in range(_DOUBLINGS):
        if increasing(high) >= 0:
            break
        high *= 2
    else:
        return None
    bottom = low
    if bottom is None:
        bottom = -start
        for _ in range(_DOUBLINGS):
            if increasing(bottom) < 0:
                break
            bottom *= 2
        else:
            return None
    for _ in range(_HALVINGS):
        middle = (bottom + high) / 2
        if not bottom < middle < high:  # they are neighbours among floats
            break
        bottom, high = (middle, high) if increasing(middle) < 0 else (bottom, middle)
    return high
