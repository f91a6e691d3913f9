"""`DistilledTwist`: the exact twist of an n-gram model that imitates the prior (theory.md 3.9; Zhang et al. 2023, 2024).

An n-gram model is fitted by counting to draws from the prior, its posterior under the same reward is solved by backward
messages, and the resulting optimal twist is used for the original posterior. The reward must be computed by an automaton.
Weights remain exact: errors of the n-gram model increase the variance, but cause no bias.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.message_lm import MessageTwist
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.models.automata.reward import automaton_potential
from bayes_klrl.models.decoding import draw_blocks
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, IntArray, State

__all__ = ["DistilledTwist", "FittedDistilled"]


@dataclass(frozen=True)
class DistilledTwist:
    """A recipe for the twist of any prior and a reward that an automaton computes.

    Parameters
    ----------
    order
        Order n of the n-gram model.
    num_draws
        Number of prior draws per prompt to which the n-gram model is fitted.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> odd = bk.Automaton.counts(0, modulo=2, vocab_size=2)
    >>> reward = bk.AutomatonReward(odd, final_rewards=[0.0, 1.0], alpha=0.1)
    >>> posterior = bk.Posterior(coin, reward, max_new_tokens=8)
    >>> draws = bk.SMC(16, twist=bk.DistilledTwist(), proposal="twisted").run(posterior, seed=0)
    >>> bool(abs(draws.log_evidence[0] - np.log((1 + np.exp(10)) / 2)) < 0.1)
    True
    """

    order: int = 2
    num_draws: int = 2000

    def __post_init__(self) -> None:
        check_count("order", self.order)
        check_count("num_draws", self.num_draws)

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> FittedDistilled:
        """See `TwistRecipe.fit`.

        Raises
        ------
        BayesKLRLError
            If the likelihood is not computed by an automaton.
        """
        check_posterior_given(posterior)
        if automaton_potential(posterior.likelihood) is None:
            raise BayesKLRLError(
                f"A DistilledTwist solves an n-gram model's posterior, and needs a likelihood made only of "
                f"bk.AutomatonReward and bk.AutomatonConstraint; got {posterior.likelihood!r}. Use bk.LearnedTwist or "
                "bk.PartialRewardTwist."
            )
        start = time.perf_counter()
        ngram, model_tokens = self._imitation(posterior, seed)
        solved = backward_messages(
            Posterior(
                ngram,
                posterior.likelihood,
                prompts=[list(ids) for ids in posterior.prompt_ids],
                max_new_tokens=posterior.max_new_tokens,
            )
        )
        training = Cost(training_tokens=model_tokens, training_seconds=time.perf_counter() - start)
        return FittedDistilled(solved.twist(), training)

    def _imitation(self, posterior: Posterior, seed: int) -> tuple[NgramLM, int]:
        """Return the n-gram model of prior draws, read with the end of their prompts, and the model tokens they took."""
        prior, seen = posterior.prior, self.order - 1
        rows: list[list[int]] = []
        model_tokens = 0
        streams = Streams.of(seed, self.num_draws)
        for block in draw_blocks((prior,), posterior.prompt_ids, self.num_draws, posterior.max_new_tokens, streams):
            tails = [list(posterior.prompt_ids[p])[-seen:] if seen else [] for p in block.prompt_index]
            rows += [tail + ids for tail, ids in zip(tails, block.sequences().lists(), strict=True)]
            model_tokens += block.model_tokens
        ngram = NgramLM.fit(rows, order=self.order, eos_token_id=prior.eos_token_ids, vocab_size=prior.vocab_size)
        return ngram, model_tokens


@dataclass(frozen=True, eq=False)
class FittedDistilled:
    """The twist that `DistilledTwist.fit` returns.

    Parameters
    ----------
    solved
        The optimal twist of the n-gram model's posterior.
    training
        The cost of drawing, counting and solving.
    """

    solved: MessageTwist
    training: Cost = field(default_factory=Cost)

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        return self.solved(posterior, prompt_index, prefixes)

    def next_log_psi(
        self,
        posterior: Posterior,
        prompt_index: IntArray,
        prefixes: IntArray,
        prior_rows: tuple[State, IntArray] | None = None,
    ) -> FloatArray:
        """Return log psi of every one-token extension, (R, V); see `bayes_klrl.models.twists.simple.next_log_psi`."""
        return self.solved.next_log_psi(posterior, prompt_index, prefixes, prior_rows)
