"""Whether draws are of a posterior: by its prompts, its alpha, and the rewards and prior log-probs of its completions.

Draws of another reward or another prior have the shape of the right ones, and what rests on them is then wrong without a sign.
Each draw carries its reward and its log p0, so that the posterior can compute both again and compare.
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray

__all__ = ["check_are_of", "check_values"]

_RECOMPUTED = 8  # draws of each prompt that are scored again
_MOST_IDS = 12


def check_are_of(posterior: Posterior, draws: Draws, cure: str) -> None:
    """Refuse draws of other prompts, another alpha, another reward or another prior, by the first few of each prompt.

    Parameters
    ----------
    posterior
        The posterior that the draws should be of.
    draws
        Draws of any method.
    cure
        What the error advises, a whole sentence.

    Raises
    ------
    BayesKLRLError
        If they are of another posterior; the message names a completion and its two values.
    """
    if draws.prompts != posterior.prompts or not np.isclose(draws.alpha, posterior.alpha, rtol=1e-12):
        raise BayesKLRLError(f"These draws are of another posterior: their prompts or their alpha differ. {cure}")
    few = Sequences(draws.tokens[:, :_RECOMPUTED], draws.lengths[:, :_RECOMPUTED])
    check_values(draws, posterior.reward(few), posterior.log_prior(few), cure)


def check_values(draws: Draws, reward: FloatArray, log_prior: FloatArray, cure: str) -> None:
    """Refuse draws whose first M rewards or prior log-probs are not the posterior's own, shape (P, M); see `check_are_of`."""
    num = reward.shape[1]
    for what, ours, theirs, tolerance in (
        ("reward", reward, draws.reward[:, :num], 1e-3),
        ("prior log-prob", log_prior, draws.log_prior[:, :num], 0.1),  # bf16 is this coarse
    ):
        differing = np.argwhere(~np.isclose(ours, theirs, rtol=1e-3, atol=tolerance))
        if differing.size:
            p, n = differing[0]
            ids = draws.tokens[p, n, : draws.lengths[p, n]].tolist()
            shown = f"{ids[:_MOST_IDS]}"[:-1] + (", ...]" if len(ids) > _MOST_IDS else "]")
            raise BayesKLRLError(
                f"These draws are of another posterior: draw {n} of prompt {p}, with ids {shown}, has the {what} "
                f"{theirs[p, n]:.6g}, and by this posterior {ours[p, n]:.6g}. {cure}"
            )
