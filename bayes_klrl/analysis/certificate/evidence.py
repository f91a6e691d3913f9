"""The two ways to a certificate's intervals: by enumeration of all completions, and by sampling."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from bayes_klrl.analysis.certificate.intervals import Intervals, exact_intervals, intervals
from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, SupportError
from bayes_klrl.inference.exact.enumeration import num_sequences
from bayes_klrl.inference.exact.exact import Exact
from bayes_klrl.inference.exact.exact_draws import ExactDraws, exact_draws
from bayes_klrl.inference.same_posterior import check_values
from bayes_klrl.inference.smc.conditional import DRAW_AGAIN, ConditionalSMC
from bayes_klrl.inference.smc.sandwich import PairedRuns, policy_runs, sandwich
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.models.twists.twisted_lm import TwistedLM
from bayes_klrl.posterior import Posterior, completion_log_probs
from bayes_klrl.randomness import stream_seed
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import SerialRunner
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, LanguageModel, Twist

__all__ = [
    "CALLERS",
    "Evidence",
    "PriorRuns",
    "Settings",
    "by_enumeration",
    "by_sampling",
    "can_enumerate",
    "exact_or_given",
    "prior_runs",
]

CALLERS = "the caller"
_ROUNDING = 1e-9
_FLOAT32_ROUNDING = 1e-4  # of a sequence's log-prob: the promise for float32 models, theory.md 1.4


@dataclass(frozen=True)
class Settings:
    """The options of `certify`, checked."""

    seed: int
    num_draws: int
    num_particles: int
    num_runs: int
    failure_probability: float
    max_sequences: int
    max_proposals: int
    sampling_only: bool
    progress: bool
    runner: Runner = field(default_factory=SerialRunner)

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0)
        check_count("num_draws", self.num_draws, least=32)
        check_count("num_particles", self.num_particles, least=2)
        check_count("num_runs", self.num_runs, least=2)
        check_count("max_sequences", self.max_sequences, least=0)
        check_count("max_proposals", self.max_proposals)
        delta = self.failure_probability
        if isinstance(delta, bool) or not isinstance(delta, int | float | np.number) or not 0 < delta < 0.5:
            raise BayesKLRLError(f"failure_probability must be a number between 0 and 0.5; got {delta!r}.")

    def stream(self, part: str) -> int:
        """Return the seed of one part of the work."""
        return stream_seed(self.seed, 0, f"certify {part}")


@dataclass(frozen=True, eq=False)
class Evidence:
    """The intervals of a certificate, with their source.

    Parameters
    ----------
    intervals, pooled
        Intervals for each prompt, and for the mean over prompts.
    grade, failure_probability
        The fields of these names of `Certificate`.
    source
        The source of the bounds on log Z, in words.
    draws
        Exact posterior draws; None if there are none.
    notes
        Statements that could not be made, with the reason.
    cost
        Seconds and model tokens spent.
    log_policy
        log q of every completion, shape (P, M), where all are enumerated; else None.
    """

    intervals: Intervals
    pooled: Intervals
    grade: str
    failure_probability: float
    source: str
    draws: Draws | None
    notes: tuple[str, ...]
    cost: Cost
    log_policy: FloatArray | None = None


def can_enumerate(posterior: Posterior, max_sequences: int) -> bool:
    """Return whether all completions of all prompts are no more than `max_sequences`."""
    prior = posterior.prior
    count = num_sequences(prior.vocab_size, len(prior.eos_token_ids), posterior.max_new_tokens)
    return count * posterior.num_prompts <= max_sequences


def by_enumeration(
    posterior: Posterior, policy: LanguageModel, settings: Settings, everything: Draws | None = None
) -> Evidence:
    """Return both KLs exactly, by scoring every completion; `everything` holds them if they have been listed before."""
    if everything is None:
        everything = Exact(max_sequences=settings.max_sequences).run(posterior, seed=0)
    log_policy = completion_log_probs(policy, posterior.prompt_ids, everything.sequences)
    rounding = _ROUNDING if _is_float64(posterior.prior) and _is_float64(policy) else _FLOAT32_ROUNDING
    per_prompt, pooled = exact_intervals(everything.log_prior, everything.log_likelihood, log_policy, rounding)
    draws = everything.resample(settings.num_draws, settings.stream("exact draws"))
    source = f"exact: all {everything.shape[1]:,} completions enumerated"
    return Evidence(per_prompt, pooled, "A", 0.0, source, draws, (), everything.cost, log_policy)


def exact_or_given(posterior: Posterior, given: Sequences | Draws | None, settings: Settings) -> ExactDraws:
    """Return the caller's exact draws, or the package's own if there is a way to them."""
    if given is None:
        return exact_draws(
            posterior,
            settings.num_draws,
            settings.num_runs,
            seed=settings.stream("exact draws"),
            max_sequences=settings.max_sequences,
            max_proposals=settings.max_proposals,
            progress=settings.progress,
            runner=settings.runner,
        )
    reward, log_prior = posterior.reward(given), posterior.log_prior(given)
    if isinstance(given, Draws):
        check_values(given, reward, log_prior, DRAW_AGAIN)
    draws = Draws.equally_weighted(
        posterior,
        posterior.sequences(given),
        method="given",
        reward=reward,
        log_prior=log_prior,
        log_proposal=None,
        cost=Cost(),
    )
    if np.isneginf(draws.log_prior + draws.log_likelihood).any():
        raise SupportError("A completion given as an exact posterior draw has posterior probability 0, so it is none.")
    return ExactDraws(draws, None, CALLERS)


def by_sampling(
    posterior: Posterior,
    policy: LanguageModel,
    policy_draws: Draws,
    exact: ExactDraws,
    found: PriorRuns | None,
    settings: Settings,
) -> Evidence:
    """Return intervals from the runs of SMC below and conditional SMC above; without runs from the exact log Z."""
    log_weights = log_weights_of(policy_draws)
    exact_weights = None if exact.draws is None else scored_log_weights(posterior, policy, exact.draws)
    delta, cost = settings.failure_probability, exact.cost
    if found is None:
        assert exact.log_evidence is not None
        # a little to each side, as for an enumeration: another order of the same sums may not fall outside
        log_evidence = exact.log_evidence[:, None] + np.array([-_ROUNDING, _ROUNDING])
        mean_log_evidence, source = log_evidence.mean(axis=0), f"exact: {exact.source}"
    else:
        runs, cost = [found.runs], cost + found.cost
        if policy is not posterior.prior and policy.full_support:
            runs.append(policy_runs(log_weights, exact_weights))
        log_evidence, mean_log_evidence = sandwich(runs, delta)
        source = _described(runs, settings, exact)
    per_prompt, pooled = intervals(log_evidence, mean_log_evidence, log_weights, exact_weights, delta)
    two_sided = exact.log_evidence is not None or exact.draws is not None
    notes: tuple[str, ...] = () if two_sided else (f"lower bound only: {exact.source}",)
    notes += _without_spread("ELBO", "the policy's", log_weights)
    if exact_weights is not None:
        notes += _without_spread("EUBO", "exact", exact_weights)
    return Evidence(per_prompt, pooled, "A" if two_sided else "B", delta, source, exact.draws, notes, cost)


def _without_spread(name: str, whose: str, log_weights: FloatArray) -> tuple[str, ...]:
    """Return a note if all draws of some prompt weigh the same: their mean then claims an error of 0, as no sample can."""
    finite = log_weights[np.isfinite(log_weights).all(axis=1)]
    if not finite.size or (np.ptp(finite, axis=1) > _ROUNDING * np.maximum(1.0, np.abs(finite).max(axis=1))).all():
        return ()
    num = log_weights.shape[1]
    return (
        f"all {num:,} {whose} draws of some prompt weigh the same, so {name} and the KL made of it show no error: right for a "
        f"perfect policy, but other completions, of mass up to {3 / num:.2g}, may have gone unseen",
    )


def log_weights_of(draws: Draws) -> FloatArray:
    """Return log w = log p0 + r / alpha - log q of a policy's own draws, (P, N); -inf for what has posterior mass 0."""
    impossible = np.isneginf(draws.log_prior)
    log_ratio = np.where(impossible, 0.0, draws.log_prior) - draws.log_proposal
    return np.where(impossible, -np.inf, log_ratio + draws.log_likelihood)


def scored_log_weights(posterior: Posterior, policy: LanguageModel, exact: Draws) -> FloatArray:
    """Return log w of exact posterior draws, (P, M), prior and policy scored alike; +inf for what the policy cannot draw."""
    sequences = exact.sequences
    log_prior = completion_log_probs(posterior.prior, posterior.prompt_ids, sequences)
    log_policy = completion_log_probs(policy, posterior.prompt_ids, sequences)
    return log_prior - log_policy + exact.log_likelihood


@dataclass(frozen=True, eq=False)
class PriorRuns:
    """M runs of SMC from the prior, as many conditional ones as there are exact draws (M at most), and their cost."""

    runs: PairedRuns
    cost: Cost


def prior_runs(posterior: Posterior, exact: ExactDraws, smc: SMC, settings: Settings) -> PriorRuns:
    """Return the runs that bound log Z without a look at any policy."""
    ready, made = smc.prepared(posterior, settings.stream("twist"), settings.progress)
    if hasattr(ready.twist, "next_log_psi"):  # then the locally optimal proposal costs no more, and weights vary least
        ready = replace(ready, proposal=TwistedLM(posterior, cast("Twist", ready.twist)))
    below = ready.log_evidences(
        posterior,
        settings.num_runs,
        seed=settings.stream("lower bound"),
        progress=settings.progress,
        runner=settings.runner,
    )
    upper, total = None, made + below.cost
    if exact.draws is not None:
        retained = Sequences(exact.draws.tokens[:, : settings.num_runs], exact.draws.lengths[:, : settings.num_runs])
        above = ConditionalSMC(ready).log_evidences(
            posterior,
            retained,
            seed=settings.stream("upper bound"),
            progress=settings.progress,
            runner=settings.runner,
        )
        upper = above.log_evidence
        total += above.cost
    return PriorRuns(PairedRuns(below.log_evidence, upper), total)


def _described(runs: list[PairedRuns], settings: Settings, exact: ExactDraws) -> str:
    """Return the source of the bounds, in words."""
    words = f"{runs[0].lower.shape[1]} runs of SMC with {settings.num_particles} particles"
    if runs[0].upper is not None:
        words += f", {runs[0].upper.shape[1]} conditional on exact draws ({exact.source})"
    return words if len(runs) == 1 else words + "; the policy's own draws as importance samples"


def _is_float64(lm: LanguageModel) -> bool:
    """Return whether a model computes in float64: those that live in NumPy do."""
    return not hasattr(lm, "parameters")
