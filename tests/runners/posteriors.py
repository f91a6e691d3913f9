"""Posteriors that catch a wrong split: equal prompts, a column, and a reward that depends on the number of the prompt."""

from __future__ import annotations

import numpy as np

import bayes_klrl as bk
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["FIELDS", "differing", "numbered_posterior"]

FIELDS = (
    "tokens",
    "lengths",
    "reward",
    "log_prior",
    "log_likelihood",
    "log_proposal",
    "log_weights",
    "log_evidence",
    "log_evidence_se",
    "elbo",
    "ess",
    "pareto_k",
)
PROMPTS = [[0], [1], [2], [0], [3], [4], [1, 2], [2, 3]]  # prompts 0 and 3 are equal


def numbered_posterior(prompts: list[list[int]] = PROMPTS) -> bk.Posterior:
    """A posterior on a table of six tokens; each prompt has its own reward."""
    table = np.log(np.random.default_rng(0).dirichlet(np.ones(6), size=6))

    def reward(tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
        return (tokens == prompt_index[:, None] % 5).sum(axis=1) + 0.125 * prompt_index

    likelihood = bk.TokenReward(reward, alpha=2.0, bounds=(0, 5.0 + 0.875))
    lm = bk.NgramLM(table, eos_token_id=5)
    return bk.Posterior(lm, likelihood, prompts=prompts, max_new_tokens=5, answer=[str(p) for p in range(len(prompts))])


def differing(first: bk.Draws, second: bk.Draws) -> list[str]:
    """The fields and entries of `info` in which two draws differ in any bit."""
    one, other = ({name: getattr(draws, name) for name in FIELDS} | dict(draws.info) for draws in (first, second))
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name], equal_nan=True)]
