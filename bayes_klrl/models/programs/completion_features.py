"""Features f(x) of completions by a function of NumPy arrays, with the same checks for every backend."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.errors import RewardError
from bayes_klrl.sequences import completion_lengths, pad_token
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

__all__ = ["features_error", "host_features"]


def host_features(fn: Callable[[IntArray, IntArray], ArrayLike], tokens: IntArray, lm: LanguageModel) -> FloatArray:
    """Return f(x) of M completions, shape (M,) or (M, K).

    Parameters
    ----------
    fn
        A function `fn(tokens (M, T), lengths (M,))` that returns M numbers or M rows of K.
    tokens
        The completions, shape (M, T), with arbitrary ids past the first EOS.
    lm
        The language model whose EOS ids end the completions.

    Raises
    ------
    RewardError
        If `fn` returns anything else, or NaN.

    Examples
    --------
    >>> from bayes_klrl.models.ngram_lm.lm import NgramLM
    >>> coin = NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> host_features(lambda tokens, lengths: lengths, np.array([[0, 0, 1], [1, 0, 0]]), coin)
    array([3., 1.])
    """
    lengths = completion_lengths(tokens, lm.eos_token_ids)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    found = np.asarray(fn(np.where(inside, tokens, pad_token(lm.eos_token_ids)), lengths), dtype=np.float64)
    if found.ndim not in (1, 2) or len(found) != len(tokens) or np.isnan(found).any():
        raise features_error(len(tokens), found.shape, has_nan=bool(np.isnan(found).any()))
    return found


def features_error(num_completions: int, shape: tuple[int, ...], *, has_nan: bool = False) -> RewardError:
    """Return the error for an array that does not hold the features of `num_completions` completions."""
    return RewardError(
        f"Features of {num_completions} completions must be as many numbers, or rows of numbers, without NaN; got "
        f"the shape {shape}{' with NaN' if has_nan else ''}."
    )
