"""A guide and the prior on one set of prompts: their draws, and bounds on the distance of both to the posterior.

The bounds are those of a certificate (`analysis/certificate`), with importance sampling alone, so that no model token is spent
twice. The draws of a policy q (the guide, and the prior) are split into M groups of K. With an exact posterior draw x* in the
place of one of the K draws for the upper end (theory.md 3.10),

    E[mean of K weights w(x)] = Z,      E[1 / mean of w(x*) and K - 1 weights] <= 1 / Z,     w = p0 exp(r / alpha) / q.

For the mean of log Z over P prompts all P M groups bet together, so that a few draws per prompt are enough if there are many
prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.analysis.certificate.evidence import (
    Settings,
    by_enumeration,
    can_enumerate,
    log_weights_of,
    scored_log_weights,
)
from bayes_klrl.analysis.certificate.intervals import Intervals, intervals
from bayes_klrl.analysis.certificate.open_ends import with_open_reverse
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.inference.exact.exact_draws import ExactDraws, exact_draws
from bayes_klrl.inference.policies import policy_draws
from bayes_klrl.inference.smc.sandwich import PairedRuns, sandwich
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, LanguageModel
from bayes_klrl.weights import logmeanexp

__all__ = ["Judgement", "grouped", "judgement", "weighted"]

_ROUNDING = 1e-9
_GROUPS = 32  # over all prompts
_SMALLEST_GROUP = 8
_WORST_GAP = 1e-2  # nats between decoding and scoring, as for a certificate


@dataclass(frozen=True, eq=False)
class Judgement:
    """The guide and the prior on one set of prompts.

    Parameters
    ----------
    posterior
        The posterior of these prompts.
    draws
        The completions of the policies "prior" and "guide", equally weighted, (P, N) each.
    kl
        KL(policy || posterior) of each prompt by policy, (P,): exact where all completions were counted, else the estimate
        log Z-hat - ELBO, which may lie below 0.
    bounds
        Intervals of each prompt by policy: bounds on log Z, the ELBO, and KL(policy || posterior).
    pooled
        The same for the mean over prompts.
    grade
        The kind of the bounds, no judgement of a policy. "A": the intervals are two-sided. "B": upper ends are inf, because
        there are no exact posterior draws. "C": the models' arithmetic is too coarse for a bound, as of a certificate.
    failure_probability
        The probability that some interval of a policy, of a prompt or of the mean, misses its value; 0 if all completions
        were counted. See `Certificate`.
    source
        The source of the bounds on log Z, in words.
    cost
        Seconds and model tokens of all of it.
    """

    posterior: Posterior
    draws: Mapping[str, Draws]
    kl: Mapping[str, FloatArray]
    bounds: Mapping[str, Intervals]
    pooled: Mapping[str, Intervals]
    grade: str
    failure_probability: float
    source: str
    cost: Cost


def judgement(posterior: Posterior, guide: LanguageModel, settings: Settings, num_runs: int | None = None) -> Judgement:
    """Return how far the guide and the prior are from the posterior of these prompts.

    Parameters
    ----------
    posterior
        The posterior; it may have other prompts than those that the guide was trained on.
    guide
        A language model on the vocabulary of the prior.
    settings
        The options of `amortise`, checked.
    num_runs
        M, the number of groups; see `amortise`.
    """
    start = time.perf_counter()
    policies = {"prior": posterior.prior, "guide": guide}
    draws = {name: _timed_draws(posterior, lm, name, settings) for name, lm in policies.items()}
    cost = draws["prior"].cost + draws["guide"].cost
    if not settings.sampling_only and can_enumerate(posterior, settings.max_sequences):
        found, more = _by_enumeration(posterior, policies, settings)
    else:
        num_groups = num_runs or _enough_groups(posterior.num_prompts, settings.num_draws)
        exact = _exact_draws(posterior, num_groups, settings)
        found, more = _by_sampling(posterior, policies, draws, exact, num_groups, settings), exact.cost
    if any(each.info["scoring_gap"].max() > _WORST_GAP for each in draws.values() if "scoring_gap" in each.info):
        found = replace(found, grade="C")
    cost = replace(cost + more, seconds=time.perf_counter() - start)
    return Judgement(posterior, draws, **vars(found), cost=cost)


@dataclass(frozen=True, eq=False)
class _Found:
    """The fields of a `Judgement` that enumeration and sampling find in their own ways."""

    kl: dict[str, FloatArray]
    bounds: dict[str, Intervals]
    pooled: dict[str, Intervals]
    grade: str
    failure_probability: float
    source: str


def weighted(posterior: Posterior, draws: Draws) -> Draws:
    """Return a policy's own draws with importance weights, at the cost of the draws: they are not drawn again."""
    return Draws.weighted(
        posterior,
        draws.sequences,
        method="ImportanceSampling",
        reward=draws.reward,
        log_prior=draws.log_prior,
        log_proposal=draws.log_proposal,
        cost=draws.cost,
    )


def grouped(log_weights: FloatArray, exact_log_weights: FloatArray | None, num_runs: int) -> PairedRuns:
    """Return estimates of log Z from M groups of a policy's draws.

    Parameters
    ----------
    log_weights
        log w of the policy's draws, shape (P, N).
    exact_log_weights
        log w of exact posterior draws, shape (P, M'); None if there are none.
    num_runs
        M, the number of groups.
    """
    num_prompts, num_draws = log_weights.shape
    size = num_draws // num_runs
    groups = log_weights[:, : num_runs * size].reshape(num_prompts, num_runs, size)
    if exact_log_weights is None:
        return PairedRuns(logmeanexp(groups), None)
    num_upper = min(num_runs, exact_log_weights.shape[1])
    retained = exact_log_weights[:, :num_upper, None]
    return PairedRuns(logmeanexp(groups), logmeanexp(np.concatenate([retained, groups[:, :num_upper, 1:]], axis=2)))


def _timed_draws(posterior: Posterior, lm: LanguageModel, name: str, settings: Settings) -> Draws:
    """Return the draws of one policy, with their seconds."""
    start = time.perf_counter()
    streams = Streams.of(settings.stream(name))
    draws = policy_draws(posterior, lm, settings.num_draws, streams, progress=settings.progress)
    return replace(draws, method=name, cost=replace(draws.cost, seconds=time.perf_counter() - start))


def _by_enumeration(
    posterior: Posterior, policies: Mapping[str, LanguageModel], settings: Settings
) -> tuple[_Found, Cost]:
    """Return both KLs exactly, and what it cost to score every completion."""
    found = {name: by_enumeration(posterior, lm, settings) for name, lm in policies.items()}
    bounds = {name: evidence.intervals for name, evidence in found.items()}
    pooled = {name: evidence.pooled for name, evidence in found.items()}
    kl = {name: each.reverse_kl.mean(axis=1) for name, each in bounds.items()}
    cost = sum((each.cost for each in found.values()), Cost())
    return _Found(kl, bounds, pooled, "A", 0.0, found["prior"].source), cost


def _by_sampling(
    posterior: Posterior,
    policies: Mapping[str, LanguageModel],
    draws: Mapping[str, Draws],
    exact: ExactDraws,
    num_groups: int,
    settings: Settings,
) -> _Found:
    """Return both KLs with intervals from the policies' draws, or from the exact log Z where it is known."""
    delta = settings.failure_probability
    log_weights = {name: log_weights_of(each) for name, each in draws.items()}
    if exact.log_evidence is not None and not settings.sampling_only:
        log_evidence, source = exact.log_evidence, f"exact: {exact.source}"
        bounds = log_evidence[:, None] + np.array([-_ROUNDING, _ROUNDING])
        mean_bounds = bounds.mean(axis=0)
    else:
        # a policy that cannot draw everything is no proposal; the prior always is one
        proposals = {name: lm for name, lm in policies.items() if name == "prior" or lm.full_support}
        runs = [
            grouped(log_weights[name], _exact_log_weights(posterior, lm, exact), num_groups)
            for name, lm in proposals.items()
        ]
        bounds, mean_bounds = sandwich(runs, delta)
        # the mean of unbiased estimates of Z is unbiased, too
        log_evidence = logmeanexp(np.stack([logmeanexp(log_weights[name]) for name in proposals], axis=1))
        source = _described(exact, num_groups, settings.num_draws)
    found, notes = {}, []
    for name, each in log_weights.items():
        closed = intervals(bounds, mean_bounds, each, None, delta)
        found[name], note = with_open_reverse(closed, posterior, policies[name], each, draws["prior"], delta)
        if note is not None:
            notes.append(f"; {name}: {note}")
    return _Found(
        {name: log_evidence - each.mean(axis=1) for name, each in log_weights.items()},
        {name: per_prompt for name, (per_prompt, _) in found.items()},
        {name: pooled for name, (_, pooled) in found.items()},
        "B" if exact.log_evidence is None and exact.draws is None else "A",
        delta,
        source + "".join(notes),
    )


def _exact_log_weights(posterior: Posterior, lm: LanguageModel, exact: ExactDraws) -> FloatArray | None:
    """Return log w of the exact posterior draws under a proposal, (P, M); None if there are none."""
    return None if exact.draws is None else scored_log_weights(posterior, lm, exact.draws)


def _enough_groups(num_prompts: int, num_draws: int) -> int:
    """Return a number of groups with which the bounds on the mean of log Z lose little to their failure probability."""
    return min(max(1, -(-_GROUPS // num_prompts)), max(1, num_draws // _SMALLEST_GROUP))


def _exact_draws(posterior: Posterior, num_groups: int, settings: Settings) -> ExactDraws:
    """Return exact posterior draws if there is a way to them: one for each group by rejection, where each is dear."""
    return exact_draws(
        posterior,
        settings.num_draws,
        num_groups,
        seed=settings.stream("exact draws"),
        max_sequences=settings.max_sequences,
        max_proposals=settings.max_proposals,
        progress=settings.progress,
    )


def _described(exact: ExactDraws, num_groups: int, num_draws: int) -> str:
    """Return the source of bounds by sampling, in words."""
    groups = "1 group" if num_groups == 1 else f"{num_groups} groups"
    words = (
        f"importance sampling from the prior and from the guide, {groups} of {num_draws // num_groups} draws per prompt"
    )
    if exact.draws is None:
        return f"{words}; no upper end: {exact.source}"
    return f"{words}, with exact draws ({exact.source}) for the upper end"
