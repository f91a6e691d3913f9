"""Importance sampling from the prior or from any proposal.

    x_n ~ q,   log w_n = log p0(x_n) + r(x_n) / alpha - log q(x_n),   log Z-hat = logmeanexp_n log w_n

E[Z-hat] = Z exactly, for any q that is positive where the posterior is. With the prior as proposal, log w = r / alpha, and
ESS / N tends to Z(b)^2 / Z(2b) with b = 1 / alpha; at least exp(KL(p* || p0)) draws are needed (Chatterjee and Diaconis 2018).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BudgetError
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.inference.sampling.proposals import Proposal, resolve_proposal
from bayes_klrl.posterior import Posterior
from bayes_klrl.prompts.part import named_prompt
from bayes_klrl.prompts.words import prompt_words
from bayes_klrl.randomness import Streams

__all__ = ["ImportanceSampling"]


@dataclass(frozen=True)
class ImportanceSampling:
    """Weighted draws from a proposal: the baseline that every other method is compared with.

    Parameters
    ----------
    num_draws
        Number of draws per prompt, N.
    proposal
        The model to draw from: None for the prior, a language model on the prior's vocabulary, or a recipe such as `SVI`,
        which is fitted first, so that its draws are then corrected by weights.

    Examples
    --------
    A fair coin is tossed once and the reward is 1 for either side, so that log Z = 1.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=1)
    >>> bk.ImportanceSampling(10).run(posterior, seed=0).log_evidence
    array([1.])
    """

    num_draws: int
    proposal: Proposal = None

    def __post_init__(self) -> None:
        check_count("num_draws", self.num_draws)

    @property
    def rows_per_prompt(self) -> int:
        """Completions per prompt that are decoded at once; a prompt's draws do not depend on the others (`runners.blocks`)."""
        return self.num_draws

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`.

        Raises
        ------
        BudgetError
            If some prompt has no draw of positive likelihood. The error carries the draws.
        """
        check_posterior_given(posterior)
        proposal, training = resolve_proposal(self.proposal, posterior, seed, progress)
        start = time.perf_counter()
        drawn = draw(
            (proposal, posterior.prior),
            posterior,
            self.num_draws,
            Streams.of(seed),
            description="importance sampling",
            progress=progress,
        )
        log_proposal, log_prior = drawn.log_probs
        draws = Draws.weighted(
            posterior,
            drawn.sequences,
            method=type(self).__name__,
            reward=drawn.reward,
            log_prior=log_prior,
            log_proposal=log_proposal,
            cost=replace(training, seconds=time.perf_counter() - start, model_tokens=drawn.model_tokens),
        )
        return require_positive_weight(replace(draws, info=drawn.info), posterior)


def require_positive_weight(draws: Draws, posterior: Posterior | None = None) -> Draws:
    """Return the draws, or raise a `BudgetError` that carries them if some prompt has no positive weight.

    The error calls the prompt by its number in `posterior`, which may be a part of another one; None: among the draws'.
    """
    if np.isneginf(draws.log_evidence).any():
        p = int(np.isneginf(draws.log_evidence).argmax())
        name = f"prompt {p} ({prompt_words(draws.prompts[p])})" if posterior is None else named_prompt(posterior, p)
        raise BudgetError(
            f"None of the {draws.shape[1]} draws of {name} has positive likelihood. "
            "Draw more, use a proposal that knows the constraint, or relax it to log(eps). This error's `draws` "
            "holds the draws.",
            draws,
        )
    return draws
