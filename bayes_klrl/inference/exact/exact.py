"""The exact posterior: every completion enumerated, or independent draws by backward messages.

Enumeration works for any prior and reward, if there are few completions. Backward messages work for an n-gram or hidden Markov
prior with rewards that an automaton computes, at lengths of thousands. `Exact` chooses between the two.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import enumerated_posterior, num_sequences
from bayes_klrl.inference.exact.messages import backward_messages, why_no_messages
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams

__all__ = ["Exact"]

_DRAWS_BY_MESSAGES = 1000


@dataclass(frozen=True)
class Exact:
    """The exact log evidence, with every completion and its weight, or with exact independent draws.

    Parameters
    ----------
    num_draws
        None returns every completion once, weighted, in the same order for all prompts; if there are too many and backward
        messages are possible, 1000 draws instead. A number N returns N independent, equally weighted draws per prompt from
        the exact posterior, by messages if possible.
    max_sequences
        The largest number of completions, over all prompts, that is enumerated.

    See Also
    --------
    bayes_klrl.inference.exact.messages.backward_messages : moments, marginals, log p*(x) and the optimal twist.

    Examples
    --------
    A coin is tossed until tails (token 1), at most twice; the reward is the number of tosses.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> exact = bk.Exact().run(bk.Posterior(coin, longer, max_new_tokens=2), seed=0)
    >>> exact.shape, bool(np.isclose(exact.log_evidence[0], np.log((np.e + np.e**2) / 2)))
    ((1, 3), True)
    """

    num_draws: int | None = None
    max_sequences: int = 2_000_000

    def __post_init__(self) -> None:
        if self.num_draws is not None:
            check_count("num_draws", self.num_draws)
        check_count("max_sequences", self.max_sequences)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; the seed is used for independent draws only.

        Raises
        ------
        BayesKLRLError
            If there are more than `max_sequences` completions, and messages are impossible.
        SupportError
            If every completion of some prompt has likelihood 0, so that there is no posterior.
        """
        check_posterior_given(posterior)
        start = time.perf_counter()
        prior = posterior.prior
        count = num_sequences(prior.vocab_size, len(prior.eos_token_ids), posterior.max_new_tokens)
        count *= posterior.num_prompts
        obstacle = why_no_messages(posterior)
        if obstacle is None and (self.num_draws is not None or count > self.max_sequences):
            draws = self._by_messages(posterior, seed)
        elif count <= self.max_sequences:
            draws = self._by_enumeration(posterior, seed)
        else:
            raise BayesKLRLError(
                f"Enumeration would take about 10^{math.log10(count):.1f} completions, more than max_sequences = "
                f"{self.max_sequences:,}. Use bk.SMC or bk.ImportanceSampling, shorten max_new_tokens, or raise "
                f"max_sequences. Backward messages would do at any length, but {obstacle}."
            )
        return replace(draws, cost=replace(draws.cost, seconds=time.perf_counter() - start))

    def _by_enumeration(self, posterior: Posterior, seed: int) -> Draws:
        """Return every completion with its weight, or independent draws from these."""
        exact = enumerated_posterior(posterior, method=type(self).__name__)
        if self.num_draws is None:
            return exact
        log_posterior = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
        return replace(
            replace(exact, log_proposal=log_posterior).resample(self.num_draws, seed),
            log_evidence=exact.log_evidence,
            log_evidence_se=exact.log_evidence_se,
        )

    def _by_messages(self, posterior: Posterior, seed: int) -> Draws:
        """Return independent draws from the posterior by backward messages."""
        messages = backward_messages(posterior)
        sequences = messages.draw(self.num_draws or _DRAWS_BY_MESSAGES, Streams.of(seed))
        reward, log_prior = posterior.reward(sequences), posterior.log_prior(sequences)
        log_posterior = log_prior + posterior.likelihood.log_likelihood(reward) - messages.log_evidence[:, None]
        prompt_tokens = sum(len(ids) for ids in posterior.prompt_ids)
        draws = Draws.equally_weighted(
            posterior,
            sequences,
            method=type(self).__name__,
            reward=reward,
            log_prior=log_prior,
            log_proposal=log_posterior,
            cost=Cost(0.0, int(sequences.lengths.sum()) + prompt_tokens),
        )
        no_error = np.zeros(posterior.num_prompts)
        return replace(draws, log_evidence=messages.log_evidence, log_evidence_se=no_error)
