"""The log-probs of completions that follow different prompts, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bayes_klrl.batch import Batch, Setting
from bayes_klrl.likelihood import Likelihood, TokenReward
from bayes_klrl.posterior import Posterior, completion_log_probs, numbered
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, TokenIds

__all__ = ["batch_log_probs", "posterior_of", "row_log_probs"]


def batch_log_probs(lm: LanguageModel, batch: Batch, rows: IntArray | None = None) -> FloatArray:
    """Return log p(x | c) of the M completions of a batch, or of some of its rows, in nats, shape (M,), float64."""
    assert batch.prompt_ids is not None, "a posterior's batches have the ids of their prompts"
    chosen = slice(None) if rows is None else rows
    return row_log_probs(lm, batch.prompt_ids, batch.prompt_index[chosen], batch.tokens[chosen], batch.lengths[chosen])


def row_log_probs(
    lm: LanguageModel, prompt_ids: Sequence[TokenIds], prompt_index: IntArray, tokens: IntArray, lengths: IntArray
) -> FloatArray:
    """Return log p(x | c) of R completions or prefixes of any prompts, in nats, shape (R,), float64.

    Parameters
    ----------
    lm
        The language model.
    prompt_ids
        Token ids of the P prompts.
    prompt_index, tokens, lengths
        Index of the prompt of each row, shape (R,); the tokens, shape (R, T); and their numbers, shape (R,), which may be 0.
    """
    total = np.zeros(len(prompt_index))  # of an empty prefix
    begun = np.flatnonzero(lengths > 0)
    order = begun[np.argsort(prompt_index[begun], kind="stable")]
    present, counts = np.unique(prompt_index[begun], return_counts=True)
    # prompts with equally many rows, such as all prompts of a sample, go through the model together
    for count in np.unique(counts):
        prompts = present[counts == count]
        rows = order[np.isin(prompt_index[order], prompts)]
        shape = (len(prompts), int(count))
        sequences = Sequences(tokens[rows].reshape(*shape, tokens.shape[1]), lengths[rows].reshape(shape))
        total[rows] = completion_log_probs(lm, [prompt_ids[p] for p in prompts], sequences).ravel()
    return total


def posterior_of(setting: Setting, likelihood: Likelihood | None = None) -> Posterior:
    """Return the posterior of a likelihood (None: a constant one) in the setting of another posterior."""
    likelihood = TokenReward(_no_reward, alpha=1.0) if likelihood is None else likelihood
    options = {**setting.columns, "prompts": setting.prompts, "max_new_tokens": setting.max_new_tokens}
    return numbered(setting.prompt_numbers, setting.prior, likelihood, options)


def _no_reward(tokens: IntArray, lengths: IntArray) -> FloatArray:  # noqa: ARG001
    """Return 0 for every completion."""
    return np.zeros(len(lengths))
