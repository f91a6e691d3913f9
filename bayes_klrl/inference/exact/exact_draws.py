"""Exact posterior draws, and the exact evidence if it is known, by the cheapest method that is possible.

An upper bound on log Z needs an exact draw (theory.md 4.4); a sampler that converges to the posterior is not enough. The
methods in order of cost: backward messages, enumeration, rejection with a declared bound of the reward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BudgetError
from bayes_klrl.inference.exact.enumeration import num_sequences
from bayes_klrl.inference.exact.exact import Exact
from bayes_klrl.inference.exact.messages import why_no_messages
from bayes_klrl.inference.sampling.rejection import RejectionSampling
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.blocks import run_in_blocks
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.typing import FloatArray

__all__ = ["ExactDraws", "exact_draws"]


@dataclass(frozen=True, eq=False)
class ExactDraws:
    """Exact posterior draws, and how they were obtained.

    Parameters
    ----------
    draws
        Independent, equally weighted draws, (P, N); None if there are none.
    log_evidence
        The exact log Z of each prompt, (P,); None if it is not known.
    source
        "messages", "enumeration", "rejection" or "the caller"; if there are no draws, the reason.
    cost
        The cost of obtaining the draws.
    """

    draws: Draws | None
    log_evidence: FloatArray | None
    source: str
    cost: Cost = field(default_factory=Cost)


def exact_draws(
    posterior: Posterior,
    num_draws: int,
    num_rejection_draws: int,
    *,
    seed: int,
    max_sequences: int,
    max_proposals: int,
    progress: bool = False,
    runner: Runner | None = None,
) -> ExactDraws:
    """Return exact posterior draws, if a method for them is possible.

    Parameters
    ----------
    posterior
        The posterior.
    num_draws
        Number of draws per prompt by messages or from an enumeration, where a draw costs almost nothing.
    num_rejection_draws
        Number of draws per prompt by rejection, where a draw costs exp(r_max / alpha) / Z completions.
    seed
        Seed for all random numbers.
    max_sequences, max_proposals
        The largest number of completions to enumerate, over all prompts, and to propose, per prompt.
    progress
        Show a progress bar.
    runner
        Where proposals are drawn, prompt by prompt; None: here.
    """
    prior = posterior.prior
    by_messages = why_no_messages(posterior) is None
    count = num_sequences(prior.vocab_size, len(prior.eos_token_ids), posterior.max_new_tokens) * posterior.num_prompts
    if by_messages or count <= max_sequences:
        draws = Exact(num_draws, max_sequences=max(max_sequences, 1)).run(posterior, seed=seed, progress=progress)
        return ExactDraws(draws, draws.log_evidence, "messages" if by_messages else "enumeration", draws.cost)
    bounds = posterior.likelihood.bounds
    if bounds is None or not np.isfinite(bounds[1]):
        return ExactDraws(None, None, "the reward declares no upper bound (`bounds=`) to reject under")
    try:
        rejection = RejectionSampling(num_rejection_draws, max_proposals=max_proposals)
        draws = run_in_blocks(
            chosen_runner(runner), rejection, posterior, seed=seed, progress=progress, name="exact draws"
        )
    except BudgetError as error:  # draws accepted within a fixed number of proposals are exact and independent, too
        if error.draws is None or error.draws.shape[1] == 0:
            why = f"rejection accepted nothing for some prompt, with {max_proposals:,} proposals at most (`max_proposals`)"
            return ExactDraws(None, None, why, Cost() if error.draws is None else error.draws.cost)
        draws = error.draws
    return ExactDraws(draws, None, "rejection", draws.cost)
