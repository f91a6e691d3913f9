"""What can be had exactly of a posterior: its evidence, and draws that follow it to the letter.

An upper bound on log Z needs an exact draw (theory.md 4.4), and nothing that a sampler converges to will do. In order
of cost: backward messages, enumeration, rejection under a declared bound of the reward.
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
from bayes_klrl.typing import FloatArray

__all__ = ["ExactDraws", "exact_draws"]


@dataclass(frozen=True, eq=False)
class ExactDraws:
    """Exact posterior draws, and how they were had.

    Parameters
    ----------
    draws
        Independent draws of weight 1, (P, N); None if there are none.
    log_evidence
        The exact log Z of each prompt, (P,); None if it is not known.
    source
        "messages", "enumeration", "rejection" or "the caller"; if there are no draws, why.
    cost
        Of getting them.
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
) -> ExactDraws:
    """Return exact posterior draws if there is a way to them.

    Parameters
    ----------
    posterior
        The posterior.
    num_draws
        N where a draw costs next to nothing: by messages, from an enumeration.
    num_rejection_draws
        N by rejection, where a draw costs exp(r_max / alpha) / Z completions.
    seed
        Of the draws.
    max_sequences, max_proposals
        The most completions, over all prompts, to enumerate; and to propose for each prompt.
    progress
        Show a progress bar.
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
        draws = RejectionSampling(num_rejection_draws, max_proposals=max_proposals).run(
            posterior, seed=seed, progress=progress
        )
    except BudgetError as error:  # those accepted within a fixed number of proposals are exact and independent, too
        if error.draws is None or error.draws.shape[1] == 0:
            why = f"rejection accepted none of {max_proposals:,} proposals for some prompt (`max_proposals`)"
            return ExactDraws(None, None, why, Cost() if error.draws is None else error.draws.cost)
        draws = error.draws
    return ExactDraws(draws, None, "rejection", draws.cost)
