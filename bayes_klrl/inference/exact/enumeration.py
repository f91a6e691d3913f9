"""Enumeration of all completions, and the exact posterior on them.

log Z = logsumexp_x [ log p0(x) + r(x) / alpha ]   over all x that end with EOS or are T tokens long (theory.md 5.1)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import SupportError
from bayes_klrl.posterior import Posterior
from bayes_klrl.prompts.words import prompt_words
from bayes_klrl.sequences import Sequences, pad_token

__all__ = ["all_sequences", "enumerated_posterior", "num_sequences"]


def enumerated_posterior(posterior: Posterior, *, method: str) -> Draws:
    """Return every completion once with its exact posterior weight, (P, N), in the same order for all prompts.

    Raises
    ------
    SupportError
        If every completion of some prompt has likelihood 0 or prior probability 0.
    """
    prior = posterior.prior
    one_prompt = all_sequences(prior.vocab_size, prior.eos_token_ids, posterior.max_new_tokens)
    sequences = Sequences(
        np.repeat(one_prompt.tokens, posterior.num_prompts, axis=0),
        np.repeat(one_prompt.lengths, posterior.num_prompts, axis=0),
    )
    reward = posterior.reward(sequences)
    num = reward.shape[1]
    draws = Draws.weighted(
        posterior,
        sequences,
        method=method,
        reward=reward,
        log_prior=posterior.log_prior(sequences),
        log_proposal=np.full(reward.shape, -np.log(num)),
        cost=Cost(0.0, int(sequences.lengths.sum() + sum(len(ids) for ids in posterior.prompt_ids) * num)),
    )
    if np.isneginf(draws.log_evidence).any():
        p = int(np.isneginf(draws.log_evidence).argmax())
        raise SupportError(
            f"Every completion of prompt {p} ({prompt_words(posterior.prompts[p])}) has likelihood 0 or prior "
            "probability 0: there is no posterior. Relax the constraint."
        )
    undefined = np.full(posterior.num_prompts, np.nan)
    exact_se = np.zeros(posterior.num_prompts)
    return replace(draws, log_evidence_se=exact_se, elbo=undefined, ess=undefined, pareto_k=undefined)


def num_sequences(vocab_size: int, num_eos: int, max_new_tokens: int) -> int:
    """Return the number of completions: those that end with EOS, and those cut at T tokens."""
    inner = vocab_size - num_eos
    ended_early: int = sum(inner ** (length - 1) * num_eos for length in range(1, max_new_tokens))
    cut: int = inner ** (max_new_tokens - 1) * vocab_size
    return ended_early + cut


def all_sequences(vocab_size: int, eos_token_ids: Collection[int], max_new_tokens: int) -> Sequences:
    """Return every completion once, sorted by length and then lexicographically, shape (1, N, T)."""
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
    """Return every prefix followed by every token, in lexicographic order, shape (K * len(last_tokens), t + 1)."""
    repeated = np.repeat(prefixes, last_tokens.size, axis=0)
    return np.column_stack([repeated, np.tile(last_tokens, len(prefixes))])
