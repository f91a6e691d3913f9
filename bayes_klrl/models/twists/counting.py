"""A twist by counting: the mean likelihood of prior draws that had the same last tokens at the same position.

    psi_t(x_1:t) = m_k,      m_j = (sum of phi over draws with the same last j tokens at t + kappa m_{j-1}) / (count + kappa)

m_0 is over all draws that are (un)finished at t and is shrunk in the same way towards Z-hat. So a context that was never
drawn gets the value of the next shorter one, and without draws the twist is constant. It works for any reward and any prior.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.decoding import draw_blocks
from bayes_klrl.models.twists.simple import fitted_rows, log_evidence_of_pilot
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, IntArray, State

__all__ = ["CountingTwist", "FittedCounts"]

_MOST_CODES = 2**62


@dataclass(frozen=True)
class CountingTwist:
    """A recipe of a twist: E[likelihood | last tokens, position], counted on prior draws.

    Parameters
    ----------
    num_draws
        N, the number of draws per prompt from the prior.
    context
        k, the number of last tokens that the twist depends on; 0: on the position only.
    shrinkage
        kappa, the number of draws that the mean of the shorter context counts as.

    Examples
    --------
    >>> from bayes_klrl.problems import gold_posterior
    >>> twist = CountingTwist(2000).fit(gold_posterior(), seed=0)
    >>> after_0, after_1 = twist(gold_posterior(), np.zeros(2, int), np.array([[2, 0], [2, 1]]))
    >>> bool(after_0 > after_1)
    True
    """

    num_draws: int = 4096
    context: int = 1
    shrinkage: float = 16.0

    def __post_init__(self) -> None:
        check_count("num_draws", self.num_draws)
        check_count("context", self.context, least=0)
        check_positive("shrinkage", self.shrinkage)

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> FittedCounts:
        """See `TwistRecipe.fit`."""
        _check_codes(posterior, self.context)
        start, model_tokens = time.perf_counter(), 0
        tokens, lengths, rewards = [], [], []
        streams = Streams.of(seed, self.num_draws)
        for block in draw_blocks(
            (posterior.prior,), posterior.prompt_ids, self.num_draws, posterior.max_new_tokens, streams
        ):
            reward = posterior.reward_of_rows(block.tokens, block.lengths, block.prompt_index)
            rewards.append(reward.reshape(posterior.num_prompts, -1))
            sequences = block.sequences()
            tokens.append(sequences.tokens)
            lengths.append(sequences.lengths)
            model_tokens += block.model_tokens
        log_likelihood = posterior.likelihood.log_likelihood(np.concatenate(rewards, axis=1))
        fitted = self._counted(
            posterior, np.concatenate(tokens, axis=1), np.concatenate(lengths, axis=1), log_likelihood
        )
        training = Cost(training_tokens=model_tokens, training_seconds=time.perf_counter() - start)
        return FittedCounts(posterior.prompt_ids, *fitted, training=training)

    def _counted(
        self, posterior: Posterior, tokens: IntArray, lengths: IntArray, log_likelihood: FloatArray
    ) -> tuple[IntArray, int, FloatArray, tuple[tuple[IntArray, FloatArray], ...]]:
        """Return the tables of `FittedCounts`, from draws (P, N, T) with lengths and log phi (P, N)."""
        eos = np.array(sorted(posterior.prior.eos_token_ids), dtype=np.int64)
        log_evidence = log_evidence_of_pilot(log_likelihood)
        top = np.maximum(log_likelihood.max(axis=1), log_evidence)  # phi is counted in units of its largest value
        phi = np.exp(log_likelihood - top[:, None])
        which, draw, position = np.nonzero(np.arange(tokens.shape[2]) < lengths[..., None])
        values, mean = phi[which, draw], np.exp(log_evidence - top)[which]
        levels = []
        for depth in range(self.context + 1):
            long_enough = position + 1 >= depth
            recent = [tokens[which, draw, np.maximum(position - back, 0)] for back in range(max(depth, 1))]
            codes = _codes(posterior, which, position, recent, depth, eos)[long_enough]
            distinct, first, group = np.unique(codes, return_index=True, return_inverse=True)
            total = np.bincount(group, weights=values[long_enough])
            shrunk = (total + self.shrinkage * mean[long_enough][first]) / (np.bincount(group) + self.shrinkage)
            mean = mean.copy()
            mean[long_enough] = shrunk[group]
            levels.append((distinct, np.log(shrunk) + top[which[long_enough][first]]))
        return eos, posterior.prior.vocab_size, log_evidence, tuple(levels)


@dataclass(frozen=True, eq=False)
class FittedCounts:
    """The twist that `CountingTwist.fit` returns.

    Parameters
    ----------
    prompts
        The token ids of the P prompts.
    eos, vocab_size
        The prior's EOS ids, and its number of tokens.
    log_evidence
        log Z-hat of each prompt in nats, shape (P,).
    levels
        For contexts of 0, 1, ..., k tokens: the codes that were drawn, sorted, and log psi of each.
    training
        Seconds and model tokens of the draws.
    """

    prompts: tuple[tuple[int, ...], ...]
    eos: IntArray
    vocab_size: int
    log_evidence: FloatArray
    levels: tuple[tuple[IntArray, FloatArray], ...]
    training: Cost = field(default_factory=Cost)

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        rows = fitted_rows(posterior, self.prompts, prompt_index)
        if prefixes.shape[1] == 0:
            return self.log_evidence[rows]
        return self._looked_up(posterior, rows, [prefixes[:, -1 - back] for back in range(prefixes.shape[1])])

    def next_log_psi(
        self,
        posterior: Posterior,
        prompt_index: IntArray,
        prefixes: IntArray,
        prior_rows: tuple[State, IntArray] | None = None,
    ) -> FloatArray:
        """Return log psi of every one-token extension, (R, V); see `bayes_klrl.models.twists.simple.next_log_psi`."""
        rows = fitted_rows(posterior, self.prompts, prompt_index)
        num_rows, width = prefixes.shape
        every = np.tile(np.arange(self.vocab_size), num_rows)
        before = [np.repeat(prefixes[:, -1 - back], self.vocab_size) for back in range(min(width, len(self.levels)))]
        values = self._looked_up(posterior, np.repeat(rows, self.vocab_size), [every, *before], width + 1)
        return values.reshape(num_rows, self.vocab_size)

    def _looked_up(
        self, posterior: Posterior, prompt_index: IntArray, recent: Sequence[IntArray], width: int | None = None
    ) -> FloatArray:
        """Return log psi of the longest context that was drawn; `recent` holds the last tokens, newest first."""
        width = len(recent) if width is None else width
        position = np.full(len(prompt_index), width - 1)
        log_psi = self.log_evidence[prompt_index]
        for depth, (codes, values) in enumerate(self.levels[: width + 1]):
            if not codes.size:  # no draw was that long
                break
            wanted = _codes(posterior, prompt_index, position, recent[: max(depth, 1)], depth, self.eos)
            place = np.minimum(np.searchsorted(codes, wanted), codes.size - 1)
            log_psi = np.where(codes[place] == wanted, values[place], log_psi)
        return log_psi


def _codes(
    posterior: Posterior,
    prompt_index: IntArray,
    position: IntArray,
    recent: Sequence[IntArray],
    depth: int,
    eos: IntArray,
) -> IntArray:
    """Return one number for (prompt, position, last `depth` tokens), or for depth 0 (prompt, position, ended or not)."""
    codes: IntArray = prompt_index * posterior.max_new_tokens + position
    if depth == 0:
        return 2 * codes + np.isin(recent[0], eos)
    for tokens in recent[:depth]:
        codes = codes * posterior.prior.vocab_size + tokens
    return codes


def _check_codes(posterior: Posterior, context: int) -> None:
    """Refuse contexts for which the number of codes exceeds an int64."""
    if posterior.num_prompts * posterior.max_new_tokens * posterior.prior.vocab_size**context >= _MOST_CODES:
        raise BayesKLRLError(
            f"context = {context} is too long for {posterior.prior.vocab_size} tokens: there are too many contexts to number, "
            "and hardly any would be drawn twice. Use a shorter one."
        )
