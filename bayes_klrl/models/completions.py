"""Completions that were drawn, with their log-probs: what a decoding leaves, in one piece or in several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["Completions", "joined"]


@dataclass(eq=False)
class Completions:
    """N completions for each of P prompts; R = P * N rows, prompt by prompt.

    Parameters
    ----------
    tokens, lengths
        The tokens (R, T), with filler past the lengths, and the number of tokens of each row (R,).
    finished
        True for rows that ended with EOS or are T tokens long, shape (R,).
    log_probs
        log p(x_1:t | c) of the tokens of each row under each model, in nats, shape (models, R), float64.
    prompt_index
        The prompt of each row, (R,).
    model_tokens
        Number of tokens that went through a model.
    step_count
        Length of the longest completion.
    particles_per_pass
        The largest number of rows that were decoded at once.
    """

    tokens: IntArray
    lengths: IntArray
    finished: np.ndarray
    log_probs: FloatArray
    prompt_index: IntArray
    model_tokens: int
    step_count: int
    particles_per_pass: int

    def sequences(self) -> Sequences:
        """Return the completions, shape (P, N, T)."""
        num_prompts = int(self.prompt_index[-1]) + 1
        return Sequences(
            self.tokens.reshape(num_prompts, -1, self.tokens.shape[1]), self.lengths.reshape(num_prompts, -1)
        )


def joined(parts: Sequence[Completions], rows: Sequence[IntArray], prompt_index: IntArray) -> Completions:
    """Return completions that were decoded in parts as one record.

    Parameters
    ----------
    parts
        The parts.
    rows
        The rows of the whole that each part holds; together all R of them.
    prompt_index
        The prompt of each row of the whole, (R,).
    """
    place = np.concatenate(rows).argsort()
    return Completions(
        np.concatenate([part.tokens for part in parts])[place],
        np.concatenate([part.lengths for part in parts])[place],
        np.concatenate([part.finished for part in parts])[place],
        np.concatenate([part.log_probs for part in parts], axis=1)[:, place],
        prompt_index,
        sum(part.model_tokens for part in parts),
        max(part.step_count for part in parts),
        max(part.particles_per_pass for part in parts),
    )
