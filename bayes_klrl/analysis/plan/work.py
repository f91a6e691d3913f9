"""The tokens and the rows of each algorithm: what it decodes, scores and trains, from its options alone.

A sweep of suffix moves, by Markov chains or annealed particles, decodes all rows once more, their kept tokens included.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np

from bayes_klrl.analysis.plan.setting import Setting, Work
from bayes_klrl.analysis.plan.training import training_work, twist_tokens
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import num_sequences
from bayes_klrl.inference.exact.exact import Exact
from bayes_klrl.inference.exact.messages import why_no_messages
from bayes_klrl.inference.mcmc.suffix_mh import SuffixMH
from bayes_klrl.inference.sampling.best_of_n import BestOfN
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.inference.sampling.quasi_rejection import QuasiRejection
from bayes_klrl.inference.sampling.rejection import RejectionSampling, largest_log_likelihood
from bayes_klrl.inference.smc.annealing import AnnealedSMC
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.inference.svi.svi import SVI
from bayes_klrl.inference.twists.learned import LearnedTwist
from bayes_klrl.models.twists.simple import PILOT_DRAWS

__all__ = ["work_of"]

_MOST_STEPS = 100  # of a schedule that annealed SMC chooses by its pilot


@singledispatch
def work_of(algorithm: Any, _setting: Setting) -> Work:
    """Return the work of an algorithm on a posterior."""
    raise BayesKLRLError(
        f"There is no plan for a {type(algorithm).__name__}. Plans are for bk.ImportanceSampling, bk.BestOfN, "
        "bk.RejectionSampling, bk.QuasiRejection, bk.SMC, bk.AnnealedSMC, bk.SuffixMH, bk.Exact and bk.SVI."
    )


@work_of.register
def _(algorithm: ImportanceSampling, setting: Setting) -> Work:
    work = setting.decoding(algorithm.num_draws, num_models=_num_models(algorithm.proposal))
    return _trained(algorithm.proposal, work, setting)


@work_of.register
def _(algorithm: BestOfN, setting: Setting) -> Work:
    return setting.decoding(algorithm.n * algorithm.num_draws)


@work_of.register
def _(algorithm: RejectionSampling, setting: Setting) -> Work:
    posterior = setting.posterior
    try:
        log_bound = largest_log_likelihood(posterior)
    except BayesKLRLError as error:
        return Work(None, refusal=str(error))
    low = posterior.likelihood.bounds[0]  # type: ignore[index]
    log_evidence = low / posterior.alpha if setting.log_evidence is None else setting.log_evidence
    expected = algorithm.num_draws * math.exp(min(log_bound - log_evidence, 700.0))
    proposals = math.ceil(min(float(algorithm.max_proposals), expected))
    known = (
        "the log evidence given" if setting.log_evidence is not None else "the lowest reward everywhere, the worst case"
    )
    note = f"{proposals:,} proposals per prompt are counted: those expected with {known}, at most max_proposals"
    return replace(setting.decoding(proposals), notes=(note,), is_bound=proposals == algorithm.max_proposals)


@work_of.register
def _(algorithm: SMC, setting: Setting) -> Work:
    posterior = setting.posterior
    twisted = isinstance(algorithm.proposal, str) and algorithm.proposal == "twisted"
    num_models = 1 if twisted else _num_models(algorithm.proposal)
    work = setting.populations(algorithm.num_particles * algorithm.num_islands, num_models=num_models)
    notes: tuple[str, ...] = ("all particles of a prompt are in memory at once, since they are resampled together",)
    if algorithm.num_islands > 1:
        notes = (
            "all islands of a prompt are counted as if they were in memory at once, where about 1,024 particles are",
        )
    tokens, fitting = work.tokens or 0, twist_tokens(algorithm.twist, setting)
    if algorithm.twist is None and twisted and posterior.prior.eos_token_ids:  # without EOS any constant will do
        tokens += setting.pilot_tokens(PILOT_DRAWS)
    if isinstance(algorithm.twist, LearnedTwist):  # its features are one more pass of the prior
        tokens += tokens // num_models
    if fitting is None:
        notes += ("fitting the twist is not counted",)
    work = replace(work, tokens=tokens, training_tokens=fitting or 0, notes=notes, is_bound=fitting is not None)
    return _trained(algorithm.proposal, work, setting)


@work_of.register
def _(algorithm: QuasiRejection, setting: Setting) -> Work:
    work = setting.decoding(algorithm.max_proposals, num_models=_num_models(algorithm.proposal))
    note = f"all of max_proposals = {algorithm.max_proposals:,} are counted: how many are accepted is known afterwards"
    return _trained(algorithm.proposal, replace(work, notes=(note,)), setting)


@work_of.register
def _(algorithm: AnnealedSMC, setting: Setting) -> Work:
    num_models = _num_models(algorithm.proposal)
    notes: tuple[str, ...] = ("all particles of all prompts are in memory at once",)
    work = setting.together(algorithm.num_particles, num_models=num_models)
    num_steps, tokens = len(algorithm.schedule or ()), 0
    if algorithm.schedule is None:
        num_steps = _MOST_STEPS
        notes += (f"a schedule of {_MOST_STEPS} steps is counted, the most that its pilot chooses",)
        pilot = setting.together(algorithm.num_pilot, num_models=num_models).tokens or 0
        tokens = pilot * (1 + (num_steps - 1) * algorithm.num_moves)
    tokens += (work.tokens or 0) * (1 + num_steps * algorithm.num_moves)
    return _trained(algorithm.proposal, replace(work, tokens=tokens, notes=notes), setting)


@work_of.register
def _(algorithm: SuffixMH, setting: Setting) -> Work:
    work = setting.together(algorithm.num_chains, num_models=_num_models(algorithm.proposal))
    sweeps = algorithm.num_warmup + algorithm.num_draws * algorithm.thinning
    bounds = setting.posterior.likelihood.bounds
    notes: tuple[str, ...] = ("all chains of all prompts are in memory at once",)
    is_bound = bounds is not None and bool(np.isfinite(bounds[0]))
    if not is_bound:
        notes += (
            "starts of positive likelihood are taken to be found at once, and the search for others is not counted",
        )
    return _trained(
        algorithm.proposal,
        replace(
            work,
            tokens=(work.tokens or 0) * (1 + sweeps),
            num_draws=algorithm.num_chains * algorithm.num_draws,
            notes=notes,
            is_bound=is_bound,
        ),
        setting,
    )


@work_of.register
def _(algorithm: Exact, setting: Setting) -> Work:
    posterior = setting.posterior
    prior, num_tokens, num_prompts = posterior.prior, posterior.max_new_tokens, posterior.num_prompts
    num_eos = len(prior.eos_token_ids)
    count = num_sequences(prior.vocab_size, num_eos, num_tokens)
    obstacle = why_no_messages(posterior)
    if obstacle is None and (algorithm.num_draws is not None or count * num_prompts > algorithm.max_sequences):
        num = algorithm.num_draws or 1000
        return Work(num_prompts * num * num_tokens + sum(setting.lengths), rows=num_prompts * num, num_draws=num)
    if count * num_prompts > algorithm.max_sequences:
        return Work(
            None,
            refusal=f"enumeration would take about 10^{math.log10(count * num_prompts):.1f} completions, more than "
            f"max_sequences = {algorithm.max_sequences:,}, and {obstacle}",
        )
    inner = prior.vocab_size - num_eos
    ended = sum(length * inner ** (length - 1) * num_eos for length in range(1, num_tokens))
    tokens = num_prompts * (ended + num_tokens * inner ** (num_tokens - 1) * prior.vocab_size)
    return Work(tokens + count * sum(setting.lengths), rows=count * num_prompts, num_draws=count)


@work_of.register
def _(algorithm: SVI, setting: Setting) -> Work:
    return _trained(algorithm, setting.decoding(algorithm.num_draws, num_models=2), setting)


def _num_models(proposal: Any) -> int:
    """Return how many models read each token that a proposal draws: it and the prior."""
    return 1 if proposal is None else 2


def _trained(proposal: Any, work: Work, setting: Setting) -> Work:
    """Return the work with that of training its proposal, if this is an SVI."""
    if not isinstance(proposal, SVI):
        return work
    training = training_work(proposal, setting)
    return replace(
        training,
        tokens=work.tokens,
        training_tokens=training.training_tokens + work.training_tokens,
        rows=max(work.rows, training.rows),
        num_draws=work.num_draws,
        notes=work.notes + training.notes,
        is_bound=work.is_bound and training.is_bound,
    )
