"""The tokens and the rows of each algorithm: what it decodes, scores and trains, from its options alone.

    decoding   models (sum of prompt lengths, once per pass + P N (T - 1))   tokens
    a step of SVI   3 (P N T + sum of prompt lengths)                        tokens: drawn once and scored twice

The last token of a completion is drawn and never read, hence T - 1. Prompts are read once for each pass, and completions of
one prompt that begin alike share what they have in common, so the numbers are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import num_sequences
from bayes_klrl.inference.exact.exact import Exact
from bayes_klrl.inference.exact.messages import why_no_messages
from bayes_klrl.inference.sampling.best_of_n import BestOfN
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.inference.sampling.rejection import RejectionSampling, largest_log_likelihood
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.inference.svi.svi import SVI
from bayes_klrl.models.decoding import ROWS_PER_BLOCK
from bayes_klrl.models.memory import Part, parts, prompt_blocks
from bayes_klrl.models.twists.simple import PILOT_DRAWS
from bayes_klrl.posterior import Posterior

__all__ = ["Setting", "Work", "work_of"]


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    Parameters
    ----------
    posterior
        The posterior.
    budget
        Bytes that one pass may take; None: no bound.
    log_evidence
        log Z, where the user knows it, in nats.
    """

    posterior: Posterior
    budget: int | None
    log_evidence: float | None

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt."""
        return [len(ids) for ids in self.posterior.prompt_ids]

    def parts(self, lengths: Sequence[int], num_draws: int, num_models: int = 1) -> list[Part]:
        """Return the parts in which N completions per prompt are decoded."""
        budget = None if self.budget is None else self.budget // num_models
        return parts((self.posterior.prior,), lengths, num_draws, self.posterior.max_new_tokens, budget)

    def decoding(self, num_draws: int, *, num_models: int = 1, blocks: bool = True) -> Work:
        """Return the work of drawing N independent completions per prompt, in blocks and in parts."""
        posterior, lengths = self.posterior, self.lengths
        block = max(1, ROWS_PER_BLOCK // len(lengths)) if blocks else num_draws
        read = rows = 0
        for first in range(0, num_draws, block):
            for part in self.parts(lengths, min(block, num_draws - first), num_models):
                read += sum(lengths[p] for p in part.prompts)
                rows = max(rows, part.prompts.size * (part.last - part.first))
        tokens = read + len(lengths) * num_draws * (posterior.max_new_tokens - 1)
        return Work(num_models * tokens, rows=rows, num_models=num_models, num_draws=num_draws)

    def populations(self, num_particles: int, *, num_models: int) -> Work:
        """Return the work of drawing N particles per prompt that are resampled together, in blocks of prompts."""
        lengths, num_tokens = self.lengths, self.posterior.max_new_tokens
        budget = None if self.budget is None else self.budget // num_models
        blocks = prompt_blocks((self.posterior.prior,), lengths, num_particles, num_tokens, ROWS_PER_BLOCK, budget)
        rows = max(block.size for block in blocks) * num_particles
        tokens = sum(lengths) + len(lengths) * num_particles * (num_tokens - 1)
        return Work(num_models * tokens, rows=rows, num_models=num_models, num_draws=num_particles)


@dataclass(frozen=True)
class Work:
    """The work of an algorithm.

    Parameters
    ----------
    tokens, training_tokens
        Tokens through models, and those of a training.
    rows
        Completions that are decoded at once.
    num_models
        Models that read each token.
    num_draws
        Completions per prompt that are decoded, for the arrays that are kept.
    step_rows
        Completions of one training step, and of those that are differentiated by one backward call; 0 without training.
    training
        The recipe of the training, if there is one.
    refusal, notes
        Why the algorithm would refuse, and what the numbers leave out.
    """

    tokens: int | None
    training_tokens: int = 0
    rows: int = 0
    num_models: int = 1
    num_draws: int = 0
    step_rows: int = 0
    rows_per_backward: int = 0
    training: SVI | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()


@singledispatch
def work_of(algorithm: Any, _setting: Setting) -> Work:
    """Return the work of an algorithm on a posterior."""
    raise BayesKLRLError(
        f"There is no plan for a {type(algorithm).__name__}. Plans are for bk.ImportanceSampling, bk.BestOfN, "
        "bk.RejectionSampling, bk.SMC, bk.Exact and bk.SVI."
    )


@work_of.register
def _(algorithm: ImportanceSampling, setting: Setting) -> Work:
    if algorithm.proposal is None:
        return setting.decoding(algorithm.num_draws)
    work = setting.decoding(algorithm.num_draws, num_models=2)
    if isinstance(algorithm.proposal, SVI):
        return replace(_training(algorithm.proposal, setting), tokens=work.tokens, num_draws=algorithm.num_draws)
    return work


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
    return replace(setting.decoding(proposals), notes=(note,))


@work_of.register
def _(algorithm: SMC, setting: Setting) -> Work:
    posterior = setting.posterior
    twisted = isinstance(algorithm.proposal, str) and algorithm.proposal == "twisted"
    num_models = 1 if algorithm.proposal is None or twisted else 2
    work = setting.populations(algorithm.num_particles * algorithm.num_islands, num_models=num_models)
    notes: tuple[str, ...] = ("all particles of a prompt are in memory at once, since they are resampled together",)
    if algorithm.num_islands > 1:
        notes = (
            "all islands of a prompt are counted as if they were in memory at once, where about 1,024 particles are",
        )
    if algorithm.twist is None and twisted and posterior.prior.eos_token_ids:  # without EOS any constant will do
        pilot = setting.decoding(PILOT_DRAWS, blocks=False)
        work = replace(work, tokens=_sum(work.tokens, pilot.tokens))
    elif hasattr(algorithm.twist, "fit"):
        notes += ("fitting the twist is not counted",)
    if isinstance(algorithm.proposal, SVI):
        trained = _training(algorithm.proposal, setting)
        work = replace(trained, tokens=work.tokens, rows=max(work.rows, trained.rows), num_draws=work.num_draws)
        notes += trained.notes
    return replace(work, notes=notes)


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
    work = _training(algorithm, setting)
    drawn = setting.decoding(algorithm.num_draws, num_models=2)
    return replace(work, tokens=drawn.tokens, rows=max(work.rows, drawn.rows), num_draws=algorithm.num_draws)


def _training(recipe: SVI, setting: Setting) -> Work:
    """Return the work of a training; its draws are counted by the caller."""
    lengths, num_tokens = setting.lengths, setting.posterior.max_new_tokens
    prompts = recipe.prompts_per_step or len(lengths)
    rows = prompts * recipe.num_particles
    read = prompts * float(np.mean(lengths))
    tokens = round(recipe.num_steps * 3 * (rows * num_tokens + read))
    chosen = sorted(lengths, reverse=True)[:prompts]
    split = setting.parts(chosen, recipe.num_particles)
    decoded = max(part.prompts.size * (part.last - part.first) for part in split)
    backward = prompts * min(recipe.num_particles, recipe.particles_per_pass or recipe.num_particles)
    return Work(
        0,
        tokens,
        decoded,
        2,
        step_rows=rows,
        rows_per_backward=backward,
        training=recipe,
        notes=("what a critic and the optimizer's pilot read is not counted",),
    )


def _sum(*numbers: int | None) -> int:
    """Return the sum of token counts that are all known."""
    return sum(number or 0 for number in numbers)
