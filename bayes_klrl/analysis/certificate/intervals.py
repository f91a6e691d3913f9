"""From bounds on log Z and log-weights of draws to intervals for both KLs.

The bounds on log Z are guaranteed to fail no more often than said (`evidence_bounds`). ELBO and EUBO are means of log-weights
with t intervals: nominal, since a sample says nothing of a tail that it did not meet. Each of the four statements (lower
bound, upper bound, ELBO, EUBO) gets a quarter of the failure probability, and the intervals made of them fail no more often
than that altogether.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.inference.smc.sandwich import STATEMENTS
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import logmeanexp

__all__ = ["Intervals", "exact_intervals", "intervals"]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals (low, high) in nats, for each prompt, shape (P, 2), or for the mean over prompts, shape (2,).

    Parameters
    ----------
    elbo
        The evidence lower bound of the policy, E_q[log w].
    log_evidence_bounds
        The log evidence, log Z.
    reverse_kl
        KL(q || p*), which SVI and KL-regularised RL minimise.
    forward_kl
        KL(p* || q), which is large if the policy dropped a mode.
    reverse_kl_on_support
        KL(q_A || p*) of the policy on the posterior's support A, q_A(x) = q(x) 1[x in A] / q(A): completions that the
        posterior excludes are drawn again. It is `reverse_kl` if the policy can draw none, and finite where they make that
        infinite.
    """

    elbo: FloatArray
    log_evidence_bounds: FloatArray
    reverse_kl: FloatArray
    forward_kl: FloatArray
    reverse_kl_on_support: FloatArray

    def __getitem__(self, name: str) -> FloatArray:
        """The interval of that name; attributes by string are untyped, all of these are arrays."""
        return getattr(self, name)  # type: ignore[no-any-return]


def intervals(
    log_evidence: FloatArray,
    mean_log_evidence: FloatArray,
    log_weights: FloatArray,
    exact_log_weights: FloatArray | None,
    delta: float,
) -> tuple[Intervals, Intervals]:
    """Return the intervals for each prompt and for the mean over prompts.

    Parameters
    ----------
    log_evidence, mean_log_evidence
        Bounds on log Z of each prompt, shape (P, 2), and on its mean over prompts, shape (2,).
    log_weights
        log w of the policy's draws, shape (P, N); -inf for a draw of likelihood 0.
    exact_log_weights
        log w of exact posterior draws, shape (P, M), +inf for one that the policy cannot draw; None without them.
    delta
        The failure probability.
    """
    elbo, mean_elbo = mean_intervals(log_weights, delta / STATEMENTS)
    if exact_log_weights is None:
        unknown = np.array([-np.inf, np.inf])
        eubo, mean_eubo = np.broadcast_to(unknown, elbo.shape), unknown
    else:
        eubo, mean_eubo = mean_intervals(exact_log_weights, delta / STATEMENTS)
    return kl_intervals(elbo, log_evidence, eubo), kl_intervals(mean_elbo, mean_log_evidence, mean_eubo)


def kl_intervals(elbo: FloatArray, log_evidence: FloatArray, eubo: FloatArray) -> Intervals:
    """Return KL(q||p*) = log Z - ELBO and KL(p*||q) = EUBO - log Z as intervals, not below 0; arrays (..., 2)."""
    reverse = difference(log_evidence, elbo)
    return Intervals(elbo, log_evidence, reverse, difference(eubo, log_evidence), reverse)


def difference(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return the interval of a difference that is known not to be negative; inf where either term says so."""
    with np.errstate(invalid="ignore"):
        low = first[..., 0] - second[..., 1]
        high = first[..., 1] - second[..., 0]
    # inf - inf is a term that is infinite for certain on one side (then so is the difference), or unknown on both
    certain = np.isneginf(second[..., 1]) | np.isposinf(first[..., 0])
    low = np.where(certain, np.inf, np.where(np.isnan(low), 0.0, np.maximum(low, 0.0)))
    return np.stack([low, np.where(np.isnan(high), np.inf, np.maximum(high, 0.0))], axis=-1)


def mean_intervals(values: FloatArray, delta: float) -> tuple[FloatArray, FloatArray]:
    """Return two-sided t intervals of the means over draws, (P, 2), and of the mean over prompts, (2,).

    An infinite value makes the mean infinite for certain.
    """
    from scipy.stats import t  # on demand: importing the package must not load it

    num_prompts, num_draws = values.shape
    quantile = float(t.isf(delta / 2, num_draws - 1)) if num_draws > 1 else np.inf
    mean = values.mean(axis=1)
    finite = np.isfinite(mean)
    se = np.zeros(num_prompts)
    if num_draws > 1:
        se[finite] = values[finite].std(axis=1, ddof=1) / np.sqrt(num_draws)
    with np.errstate(invalid="ignore"):
        half = np.where(finite, quantile * se if num_draws > 1 else np.inf, 0.0)
    pooled = 0.0 if not finite.all() else float(np.sqrt(np.square(half).sum()) / num_prompts)
    middle = mean.mean()
    return np.stack([mean - half, mean + half], axis=1), np.array([middle - pooled, middle + pooled])


def exact_intervals(
    log_prior: FloatArray, log_likelihood: FloatArray, log_policy: FloatArray, rounding: float
) -> tuple[Intervals, Intervals]:
    """Return the same from log-probabilities of every completion there is, shape (P, N), up to rounding.

    Parameters
    ----------
    log_prior, log_likelihood, log_policy
        Log-probabilities of every completion, shape (P, N).
    rounding
        The error of the models' own arithmetic, in nats.
    """
    log_joint = log_prior + log_likelihood
    log_evidence = logmeanexp(log_joint) + np.log(log_joint.shape[1])
    log_posterior = log_joint - log_evidence[:, None]
    reverse = expected(log_policy, log_policy, log_posterior)
    forward = expected(log_posterior, log_posterior, log_policy)
    on_support = expected_on_support(log_policy, log_posterior, reverse)
    columns = [log_evidence - reverse, log_evidence, reverse, forward, on_support]
    return (
        Intervals(*[around(column, rounding, i >= 2) for i, column in enumerate(columns)]),
        Intervals(*[around(column.mean(), rounding, i >= 2) for i, column in enumerate(columns)]),
    )


def expected(log_probs: FloatArray, first: FloatArray, second: FloatArray) -> FloatArray:
    """Return sum_x p(x) (first(x) - second(x)) over x with p(x) > 0, shape (P,)."""
    possible = log_probs > -np.inf
    gaps = np.where(possible, np.where(possible, first, 0.0) - np.where(possible, second, 0.0), 0.0)
    # a probability that underflows to 0 is positive all the same: times an infinite gap it is inf, not NaN
    probs = np.where(possible, np.where(np.isinf(gaps), 1.0, np.exp(log_probs)), 0.0)
    result: FloatArray = (probs * gaps).sum(axis=1)
    return result


def expected_on_support(log_policy: FloatArray, log_posterior: FloatArray, reverse: FloatArray) -> FloatArray:
    """Return KL(q_A || p*) with q_A the policy on the posterior's support, (P,); `reverse` where it draws nothing else."""
    inside = np.where(np.isneginf(log_posterior), -np.inf, log_policy)
    mass = logmeanexp(inside) + np.log(inside.shape[1])
    kept = np.full(len(reverse), np.inf)  # of a policy that has no mass on the support at all
    some = np.isfinite(mass)
    log_kept = inside[some] - mass[some, None]
    kept[some] = expected(log_kept, log_kept, log_posterior[some])
    leaves = ((log_policy > -np.inf) & np.isneginf(log_posterior)).any(axis=1)
    return np.where(leaves, kept, reverse)


def around(value: FloatArray, rounding: float, is_kl: bool) -> FloatArray:
    """Return value - rounding and value + rounding, (..., 2), a KL not below 0."""
    low = np.asarray(value) - rounding
    return np.stack([np.maximum(low, 0.0) if is_kl else low, np.asarray(value) + rounding], axis=-1)
