"""Bounds on log Z from both sides, from one or several ways of sampling.

Runs with E[Z-hat] <= Z bound log Z from below, runs with E[1 / Z-hat] <= 1 / Z bound it from above (`evidence_bounds`). The
best of the bounds from several ways of sampling is valid if each of them gets a share of the failure probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.inference.smc.evidence_bounds import (
    evidence_lower_bound,
    evidence_upper_bound,
    mean_lower_bound,
    mean_upper_bound,
)
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import logmeanexp

__all__ = ["STATEMENTS", "PairedRuns", "policy_runs", "sandwich"]

STATEMENTS = 4
"""Number of statements of a certificate (lower bound, upper bound, ELBO, EUBO) that share its failure probability."""

_GROUP = 16


@dataclass(frozen=True, eq=False)
class PairedRuns:
    """Independent estimates of log Z from one way of sampling.

    Parameters
    ----------
    lower
        log Z-hat with E[Z-hat] <= Z, shape (P, M).
    upper
        log Z-hat with E[1 / Z-hat] <= 1 / Z, shape (P, M'); None if there are no exact draws.
    """

    lower: FloatArray
    upper: FloatArray | None


def policy_runs(log_weights: FloatArray, exact_log_weights: FloatArray | None) -> PairedRuns:
    """Return runs of importance sampling from the policy, by splitting existing draws into groups of K = 16.

        lower:  Z-hat = mean of K weights           upper:  Z-hat = (w(x*) + sum of K - 1 weights) / K

    Parameters
    ----------
    log_weights
        log w of the policy's draws, shape (P, N).
    exact_log_weights
        log w of exact posterior draws, shape (P, M).
    """
    num_prompts, num_draws = log_weights.shape
    size = min(_GROUP, num_draws)
    num_groups = num_draws // size
    groups = log_weights[:, : num_groups * size].reshape(num_prompts, num_groups, size)
    if exact_log_weights is None:
        return PairedRuns(logmeanexp(groups), None)
    num_upper = min(num_groups, exact_log_weights.shape[1])
    retained = exact_log_weights[:, :num_upper, None]
    return PairedRuns(logmeanexp(groups), logmeanexp(np.concatenate([retained, groups[:, :num_upper, 1:]], axis=2)))


def sandwich(runs: list[PairedRuns], delta: float) -> tuple[FloatArray, FloatArray]:
    """Return bounds on log Z of each prompt, (P, 2), and on the mean of log Z, (2,).

    Each end fails with probability at most delta / 4. The ways of sampling share this probability equally, so that all their
    bounds hold together and the best one can be taken.
    """
    share = delta / STATEMENTS / len(runs)
    lower = np.max([evidence_lower_bound(run.lower, share) for run in runs], axis=0)
    mean_lower = max(mean_lower_bound(run.lower, share) for run in runs)
    uppers = [run.upper for run in runs if run.upper is not None]
    upper, mean_upper = np.full(len(lower), np.inf), np.inf
    if uppers:
        upper = np.min([evidence_upper_bound(array, share) for array in uppers], axis=0)
        mean_upper = min(mean_upper_bound(array, share) for array in uppers)
    return np.stack([lower, upper], axis=1), np.array([mean_lower, mean_upper])
