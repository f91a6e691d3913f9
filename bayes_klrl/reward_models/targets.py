"""Three posteriors of an uncertain reward r_theta, theta ~ p(theta | data), from one pool of draws (theory.md 1.10).

    plug-in   prop. to p0 exp(E_theta r_theta / alpha)                 the mean reward, as if it were known
    joint     prop. to p0 E_theta[exp(r_theta / alpha)]                theta with weight Z_theta: optimistic
    cut       E_theta[p0 exp(r_theta / alpha) / Z_theta]               uncertainty goes one way: the default

Rewards learned from preferences are known up to a constant a_theta. Plug-in and cut posterior do not depend on it. The joint
posterior does, so it has no meaning unless every reward is anchored (with log Z_theta = 0 it is the cut posterior).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.checks import check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import check_log_weights, logmeanexp, normalised

__all__ = ["reward_target_weights"]

Target = Literal["cut", "joint", "plug-in"]


def reward_target_weights(
    rewards: ArrayLike, *, alpha: float, target: Target = "cut", log_weights: ArrayLike | None = None
) -> FloatArray:
    """Return normalised weights of N draws under one of the three posteriors, shape (N,).

    Parameters
    ----------
    rewards
        The rewards r_theta(x_n) for S equally likely draws of theta, shape (S, N); -inf is legal.
    alpha
        Units of reward per nat.
    target
        The posterior that the weights are for: "cut", "joint" or "plug-in".
    log_weights
        log p0(x_n) - log q(x_n) in nats for draws from q, shape (N,); None: the draws are from the prior.

    Raises
    ------
    BayesKLRLError
        If the target is unknown, the shapes do not fit, or no draw has a positive weight.

    Examples
    --------
    A constant added to the reward of one theta changes the joint posterior only:

    >>> rewards = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> shifted = rewards + np.array([[0.0], [3.0]])
    >>> for target in ("cut", "joint", "plug-in"):
    ...     print(reward_target_weights(shifted, alpha=1.0, target=target).round(2))
    [0.5 0.5]
    [0.71 0.29]
    [0.5 0.5]
    """
    check_positive("alpha", alpha)
    log_likelihood = check_log_weights(np.asarray(rewards, dtype=np.float64) / alpha)
    if log_likelihood.ndim != 2 or not log_likelihood.size:
        raise BayesKLRLError(f"rewards must have the shape (S, N), one row per theta; got {log_likelihood.shape}.")
    pool = np.zeros(log_likelihood.shape[1]) if log_weights is None else check_log_weights(log_weights)
    if pool.shape != log_likelihood.shape[1:]:
        raise BayesKLRLError(f"log_weights must have the shape (N,) = {log_likelihood.shape[1:]}; got {pool.shape}.")
    if target == "cut":
        weights: FloatArray = normalised(pool + log_likelihood).mean(axis=0)
        return weights
    if target == "joint":
        return normalised(pool + logmeanexp(log_likelihood.T))
    if target == "plug-in":
        return normalised(pool + log_likelihood.mean(axis=0))
    raise BayesKLRLError(f'target must be "cut", "joint" or "plug-in"; got {target!r}.')
