"""Upper ends that no sample can give: what one of policy and posterior can draw, the other never does, or draws are in doubt.

A policy that gives probability 0 to what the posterior has makes KL(p* || q) infinite, and a policy that gives positive
probability, however small, to what the posterior excludes makes KL(q || p*) infinite. Neither need be among the draws. So an
upper end is finite only where this is ruled out. What users act on is then KL(q_A || p*), of the policy on the support A of
the posterior, q_A(x) = q(x) 1[x in A] / q(A):

    KL(q_A || p*) = log Z - E_qA[log w] - log q(A),        0 <= -log q(A) <= log(1 / delta) / N  if N of N draws are in A.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bayes_klrl.analysis.certificate.evidence import Evidence, log_weights_of
from bayes_klrl.analysis.certificate.intervals import Intervals, difference, mean_intervals
from bayes_klrl.draws import Draws
from bayes_klrl.inference.policies import covers_prior
from bayes_klrl.inference.smc.sandwich import STATEMENTS
from bayes_klrl.likelihood import Factor, Likelihood
from bayes_klrl.likelihoods.best_of import BestOf
from bayes_klrl.likelihoods.power import Power
from bayes_klrl.models.automata.reward import AutomatonReward
from bayes_klrl.posterior import Posterior, completion_log_probs
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["excludes_by_declaration", "mean_on_support", "with_open_ends", "with_open_reverse", "without_contradiction"]

BoolArray = NDArray[np.bool_]
_SCORED = 64  # excluded completions of a prompt that a policy without full support is asked about


def with_open_ends(
    evidence: Evidence, posterior: Posterior, policy: LanguageModel, ours: Draws, prior_draws: Draws, delta: float
) -> Evidence:
    """Return the evidence with upper ends of inf where policy or posterior may draw what the other cannot.

    Parameters
    ----------
    evidence
        Intervals from samples.
    posterior, policy
        The posterior and the policy.
    ours, prior_draws
        Draws of the policy and of the prior, (P, N).
    delta
        The failure probability of the certificate.
    """
    if not covers_prior(policy, posterior.prior):
        note = "no upper end for KL(p*||q): the policy gives probability 0 to tokens, perhaps to some that the prior can draw"
        evidence = replace(
            evidence,
            intervals=_forward_open(evidence.intervals),
            pooled=_forward_open(evidence.pooled),
            notes=(*evidence.notes, note),
        )
    log_weights = log_weights_of(ours)
    found = evidence.intervals, evidence.pooled
    opened, reason = with_open_reverse(found, posterior, policy, log_weights, prior_draws, delta)
    if reason is not None:
        note = reason
        evidence = replace(evidence, intervals=opened[0], pooled=opened[1])
    elif np.isneginf(prior_draws.log_likelihood).any() or excludes_by_declaration(posterior.likelihood):
        note = (
            "KL(policy||posterior) would be infinite if the policy could draw anything that the posterior excludes: none of "
            f"its {log_weights.shape[1]:,} draws is excluded, and it gives probability 0 to tokens, perhaps to all of that"
        )
    else:
        return evidence
    return replace(evidence, notes=(*evidence.notes, note))


def with_open_reverse(
    found: tuple[Intervals, Intervals],
    posterior: Posterior,
    policy: LanguageModel,
    log_weights: FloatArray,
    prior_draws: Draws,
    delta: float,
) -> tuple[tuple[Intervals, Intervals], str | None]:
    """Return intervals of the prompts and of their mean, with KL(policy || posterior) open where it is, or may be, infinite.

    Parameters
    ----------
    found
        The intervals of each prompt, and of the mean over prompts.
    posterior, policy, prior_draws, delta
        As for `with_open_ends`.
    log_weights
        log w of the policy's draws, (P, N).

    Returns
    -------
    The intervals, and the note that says why; None if no end was opened.
    """
    infinite = (log_weights == -np.inf).any(axis=1) | _known(posterior, policy, prior_draws)
    reason = _why_not_ruled_out(posterior, policy)
    is_open = infinite | (reason is not None)
    if not is_open.any():
        return found, None
    elbo, mean_elbo = mean_on_support(log_weights, is_open, delta / STATEMENTS)
    pooled = _reverse_open(found[1], mean_elbo, np.array(True))
    note = _reverse_note(infinite, log_weights, reason, pooled.reverse_kl_on_support)
    return (_reverse_open(found[0], elbo, is_open), pooled), note


def without_contradiction(evidence: Evidence, of_caller: bool) -> Evidence:
    """Return the evidence with upper ends open where the lower bound on log Z is above the upper one.

    The lower bound rests on runs of SMC alone, and fails with probability delta / 4 at most. The upper bound does so only if
    the exact draws are exact. If both held they could not cross, so that with exact draws crossing has probability delta / 2
    at most. It is evidence against them, and what stays valid in either case is what does not use them: the lower bound and
    ELBO. The swapped interval would be the worst answer: if one of the two bounds holds, log Z is not between them.

    Parameters
    ----------
    evidence
        The intervals.
    of_caller
        Whether the draws are the caller's: then those of all prompts are in doubt, and are left out.
    """
    of_prompt, of_mean = evidence.intervals.log_evidence_bounds, evidence.pooled.log_evidence_bounds
    crossed = of_prompt[:, 0] > of_prompt[:, 1]
    if not (crossed.any() or of_mean[0] > of_mean[1]):
        return evidence
    bounds = of_prompt[int(crossed.argmax())] if crossed.any() else of_mean
    where = f"{int(crossed.sum())} of {len(crossed)} prompts" if crossed.any() else "the mean over prompts"
    if of_caller:
        crossed = np.ones_like(crossed)
    advice = (
        "the completions given as `exact` are then most likely no exact draws of this posterior, and are left out"
        if of_caller
        else "what rests on exact draws is left out there; certify with another seed and more runs (num_runs) to see it again"
    )
    note = (
        f"the bounds on log Z contradict each other for {where}: at least {bounds[0]:.3f} by SMC, at most {bounds[1]:.3f} by "
        f"exact draws. With exact draws this has probability {evidence.failure_probability / 2:.3g} at most, for a prompt; "
        f"{advice}, so that upper ends are open"
    )

    def opened(found: Intervals, doubtful: np.ndarray) -> Intervals:
        log_evidence, reverse, forward = (
            np.array(found[name]) for name in ("log_evidence_bounds", "reverse_kl", "forward_kl")
        )
        log_evidence[..., 1] = np.where(doubtful, np.inf, log_evidence[..., 1])
        reverse[..., 1] = np.where(doubtful, np.inf, reverse[..., 1])
        forward = np.where(doubtful[..., None], np.array([0.0, np.inf]), forward)
        return Intervals(found.elbo, log_evidence, reverse, forward, reverse)

    return replace(
        evidence,
        intervals=opened(evidence.intervals, crossed),
        pooled=opened(evidence.pooled, np.array(True)),
        grade="B",
        draws=None if of_caller else evidence.draws,
        notes=(*evidence.notes, note),
    )


def excludes_by_declaration(likelihood: Likelihood) -> bool:
    """Return whether a factor says that it may exclude completions: a constraint, or a reward that is allowed to be -inf.

    `Power` and `BestOf` have no lower bound either, but exclude nothing that the prior can draw. A reward without declared
    bounds says nothing; then a bound from above needs exact draws of the caller's, or an automaton, whose values are known.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> finite, hard = (bk.TokenReward(lambda x, n: n, alpha=1.0, bounds=(low, 9)) for low in (0, -np.inf))
    >>> [excludes_by_declaration(one) for one in (finite, hard, finite * hard, bk.Power(2.0))]
    [False, True, True, False]
    """
    return any(_may_exclude(factor) for factor in likelihood.factors)


def _may_exclude(factor: Factor) -> bool:
    """Return whether one factor of a likelihood may be -inf where the prior is positive, by what it declares."""
    if isinstance(factor, Power | BestOf):
        return False
    unbounded = factor.bounds is not None and bool(np.isneginf(factor.bounds[0]))
    if isinstance(factor, AutomatonReward):  # all its values are known
        given = np.concatenate([np.ravel(np.asarray(each)) for each in (factor.token_rewards, factor.final_rewards)])
        return (unbounded or factor.bounds is None) and bool(np.isneginf(given).any())
    return unbounded


def mean_on_support(log_weights: FloatArray, restricted: BoolArray, delta: float) -> tuple[FloatArray, FloatArray]:
    """Return intervals of E_qA[log w] + log q(A), (P, 2), and of its mean over prompts, (2,).

    Half of delta is for the t interval of the mean over the draws in A, half for the Clopper-Pearson interval of q(A).

    Parameters
    ----------
    log_weights
        log w of the policy's draws, (P, N); -inf for those outside A.
    restricted
        The prompts whose q(A) may be less than 1, (P,); for the others it is 1.
    delta
        The failure probability, for each prompt and for the mean.
    """
    num_prompts = len(log_weights)
    each = np.array([_mean_of_finite(row, delta / 2) for row in log_weights])
    mean = np.array([-np.inf, np.inf])
    if np.isfinite(each).all():
        half = float(np.sqrt(np.square(np.diff(each) / 2).sum())) / num_prompts
        mean = each.mean() + np.array([-half, half])
    masses = (_log_mass(log_weights, restricted, error) for error in (delta / 2, delta / (2 * num_prompts)))
    return each + next(masses), mean + next(masses).mean(axis=0)


def _mean_of_finite(log_weights: FloatArray, delta: float) -> FloatArray:
    """Return the t interval of the mean of what is finite, (2,)."""
    finite = log_weights[np.isfinite(log_weights)]
    return mean_intervals(finite[None], delta)[0][0] if finite.size > 1 else np.array([-np.inf, np.inf])


def _log_mass(log_weights: FloatArray, restricted: BoolArray, delta: float) -> FloatArray:
    """Return the Clopper-Pearson interval of log q(A), (P, 2): [log(delta) / N, 0] if all draws are in A."""
    from scipy.stats import beta  # on demand: importing the package must not load it

    num = log_weights.shape[1]
    inside = np.isfinite(log_weights).sum(axis=1)
    error = np.where((inside == 0) | (inside == num), delta, delta / 2)  # one-sided where only one end is open
    low = np.where(inside == 0, 0.0, beta.ppf(error, np.maximum(inside, 1), num - inside + 1))
    high = np.where(inside == num, 1.0, beta.isf(error, inside + 1, np.maximum(num - inside, 1)))
    with np.errstate(divide="ignore"):
        bounds = np.log(np.stack([low, high], axis=1))
    return np.where(restricted[:, None], bounds, 0.0)


def _why_not_ruled_out(posterior: Posterior, policy: LanguageModel) -> str | None:
    """Return why the policy may draw what the posterior excludes, whatever was seen; None if nothing speaks for it."""
    if not covers_prior(posterior.prior, policy):
        return "the prior gives probability 0 to tokens, perhaps to some that the policy can draw"
    if policy.full_support and excludes_by_declaration(posterior.likelihood):
        return (
            "the policy can draw all completions, and the likelihood has a constraint or a reward whose declared lower bound "
            "is -inf (if nothing has the reward -inf, declare bounds=(low, high) with a finite low)"
        )
    return None


def _known(posterior: Posterior, policy: LanguageModel, prior_draws: Draws) -> BoolArray:
    """Return the prompts for which the policy can draw what the prior drew and the likelihood excludes, (P,)."""
    excluded = prior_draws.log_likelihood == -np.inf
    if policy.full_support:
        return np.asarray(excluded.any(axis=1))
    found: BoolArray = np.zeros(len(excluded), dtype=bool)
    for p in np.flatnonzero(excluded.any(axis=1)):
        rows = np.flatnonzero(excluded[p])[:_SCORED]
        some = Sequences(prior_draws.tokens[p : p + 1, rows], prior_draws.lengths[p : p + 1, rows])
        found[p] = bool(np.isfinite(completion_log_probs(policy, posterior.prompt_ids[p : p + 1], some)).any())
    return found


def _forward_open(found: Intervals) -> Intervals:
    """Return intervals without an upper end of KL(p* || q)."""
    forward = found.forward_kl.copy()
    forward[..., 1] = np.inf
    return replace(found, forward_kl=forward)


def _reverse_open(found: Intervals, elbo: FloatArray, is_open: BoolArray) -> Intervals:
    """Return intervals without an upper end of KL(q || p*), and with that of q on the support."""
    reverse = found.reverse_kl.copy()
    reverse[..., 1] = np.where(is_open, np.inf, reverse[..., 1])
    on_support = np.where(is_open[..., None], difference(found.log_evidence_bounds, elbo), found.reverse_kl_on_support)
    return replace(found, reverse_kl=reverse, reverse_kl_on_support=on_support)


def _reverse_note(infinite: BoolArray, log_weights: FloatArray, reason: str | None, on_support: FloatArray) -> str:
    """Return why KL(q || p*) has no upper end, how rarely the policy draws what makes it infinite, and the KL without it."""
    num, share = log_weights.shape[1], float(np.isneginf(log_weights).mean())
    of_prompts = "" if len(infinite) == 1 else f" for {int(infinite.sum())} of {len(infinite)} prompts"
    says = f"has no upper end: {reason}"
    if infinite.any():
        says = f"is infinite{of_prompts}: the policy can draw what the posterior excludes"
    how_often = f"{share:.2g} of its draws are excluded"
    if share == 0:
        how_often = (
            f"None of its {num:,} draws is excluded, so that the probability of one is below {3 / num:.2g} (at 95 %)"
        )
    low, high = on_support
    without = f"in [{low:.3f}, {high:.3f}]" if np.isfinite(high) else f"at least {low:.3f}"
    return f"KL(policy||posterior) {says}. {how_often}; without them, drawn again, the KL is {without}"
