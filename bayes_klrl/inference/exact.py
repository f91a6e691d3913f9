"""The exact posterior by enumeration of every completion.

log Z = logsumexp_x [ log p0(x) + r(x) / alpha ]   over all x that end with EOS or are T tokens long (THEORY 4.1)
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, SupportError
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences, pad_token

__all__ = ["Exact", "all_sequences", "num_sequences"]


@dataclass(frozen=True)
class Exact:
    """Every completion once, with its exact posterior weight and the exact log evidence.

    Parameters
    ----------
    num_draws
        None: the enumeration itself, every completion once, in the same order for all prompts, weighted. A number: that
        many independent draws from the exact posterior, weighing equally.
    max_sequences
        Refuse to enumerate more completions than this, over all prompts.

    Examples
    --------
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
        """See `Algorithm.run`; the seed matters for `num_draws` only.

        Raises
        ------
        BayesKLRLError
            If there are more than `max_sequences` completions.
        SupportError
            If every completion has likelihood 0: there is no posterior.
        """
        start = time.perf_counter()
        prior, width = posterior.prior, posterior.max_new_tokens
        count = num_sequences(prior.vocab_size, len(prior.eos_token_ids), width) * posterior.num_prompts
        if count > self.max_sequences:
            raise BayesKLRLError(
                f"Enumeration would take about 10^{math.log10(count):.1f} completions, more than max_sequences = "
                f"{self.max_sequences:,}. Use bk.SMC or bk.ImportanceSampling, shorten max_new_tokens, or raise max_sequences."
            )
        one_prompt = all_sequences(prior.vocab_size, prior.eos_token_ids, width)
        sequences = Sequences(
            np.repeat(one_prompt.tokens, posterior.num_prompts, axis=0),
            np.repeat(one_prompt.lengths, posterior.num_prompts, axis=0),
        )
        reward = posterior.reward(sequences)
        num = reward.shape[1]
        draws = Draws.weighted(
            posterior,
            sequences,
            method=type(self).__name__,
            reward=reward,
            log_prior=posterior.log_prior(sequences),
            log_proposal=np.full(reward.shape, -np.log(num)),
            cost=Cost(0.0, int(sequences.lengths.sum() + sum(len(ids) for ids in posterior.prompt_ids) * num)),
        )
        if np.isneginf(draws.log_evidence).any():
            p = int(np.isneginf(draws.log_evidence).argmax())
            raise SupportError(
                f"Every completion of prompt {p} ({posterior.prompts[p]!r}) has likelihood 0 or prior probability 0: there "
                "is no posterior. Relax the constraint."
            )
        undefined = np.full(posterior.num_prompts, np.nan)
        exact = replace(
            draws, log_evidence_se=np.zeros(posterior.num_prompts), elbo=undefined, ess=undefined, pareto_k=undefined
        )
        if self.num_draws is not None:
            log_posterior = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
            exact = replace(
                replace(exact, log_proposal=log_posterior).resample(self.num_draws, seed),
                log_evidence=exact.log_evidence,
                log_evidence_se=exact.log_evidence_se,
            )
        return replace(exact, cost=replace(exact.cost, seconds=time.perf_counter() - start))


def num_sequences(vocab_size: int, num_eos: int, max_new_tokens: int) -> int:
    """Return how many completions there are: those that end with EOS, and those cut at T tokens."""
    inner = vocab_size - num_eos
    ended_early: int = sum(inner ** (length - 1) * num_eos for length in range(1, max_new_tokens))
    cut: int = inner ** (max_new_tokens - 1) * vocab_size
    return ended_early + cut


def all_sequences(vocab_size: int, eos_token_ids: Collection[int], max_new_tokens: int) -> Sequences:
    """Return every completion once, by length and then in lexicographic order, shape (1, N, T)."""
    eos = np.array(sorted(eos_token_ids), dtype=np.int64)
    inner = np.setdiff1d(np.arange(vocab_size), eos)
    prefixes = np.zeros((1, 0), dtype=np.int64)
    levels = []
    for length in range(1, max_new_tokens + 1):
        last_tokens = np.arange(vocab_size) if length == max_new_tokens else eos
        levels.append(_extended(prefixes, last_tokens))
        prefixes = _extended(prefixes, inner)
    tokens = np.full((sum(map(len, levels)), max_new_tokens), pad_token(eos_token_ids), dtype=np.int64)
    start = 0
    for level in levels:
        tokens[start : start + len(level), : level.shape[1]] = level
        start += len(level)
    lengths = np.repeat(np.arange(1, max_new_tokens + 1), [len(level) for level in levels])
    return Sequences(tokens[None], lengths[None])


def _extended(prefixes: np.ndarray, last_tokens: np.ndarray) -> np.ndarray:
    """Return every prefix followed by every token, in lexicographic order."""
    repeated = np.repeat(prefixes, last_tokens.size, axis=0)
    return np.column_stack([repeated, np.tile(last_tokens, len(prefixes))])
