"""Priors, policies and scores that several tests of the likelihoods use."""

from __future__ import annotations

import numpy as np

import bayes_klrl as bk
from tests.helpers.truth import full_table, random_posterior

__all__ = ["NUM_TOKENS", "PRIOR", "PROMPTS", "REFERENCE", "TUNED", "every", "length_score", "posterior_of", "score"]

PRIOR = random_posterior(1).prior
TUNED = full_table(PRIOR, noise=0.8, seed=1)
REFERENCE = full_table(PRIOR, noise=0.4, seed=2)
PROMPTS = [[0], [1]]
NUM_TOKENS = 4


def score(tokens: np.ndarray, lengths: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    """A score that is different for every completion, and depends on the prompt."""
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    place = np.pi ** np.arange(tokens.shape[1])
    return np.sin(((tokens + 1) * inside) @ place + prompt_index)


def length_score(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A score with many ties."""
    return lengths


def posterior_of(likelihood: bk.Likelihood, prior: bk.LanguageModel = PRIOR, **options: object) -> bk.Posterior:
    """The posterior of a likelihood on two prompts."""
    settings: dict[str, object] = {"prompts": PROMPTS, "max_new_tokens": NUM_TOKENS} | options
    return bk.Posterior(prior, likelihood, **settings)  # type: ignore[arg-type]


def every(lm: bk.LanguageModel, sequences: bk.Sequences) -> np.ndarray:
    """log p(x | c) of completions (P, N) under a model."""
    zero = bk.TokenReward(lambda tokens, lengths: 0.0 * lengths, alpha=1.0)
    return posterior_of(zero, lm).log_prior(sequences)
