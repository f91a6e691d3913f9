"""The few array operations that decoding needs, for NumPy, torch and anything that turns into NumPy.

torch is never imported from here: an array of its can only exist if somebody else has.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from bayes_klrl.typing import Array, FloatArray, IntArray

__all__ = ["draw_tokens", "no_gradient", "take_tokens", "to_host"]


def no_gradient() -> AbstractContextManager[Any]:
    """Return a context in which no backend records gradients."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.no_grad()


def to_host(array: Array) -> np.ndarray:
    """Return an array of any backend as NumPy on the host, same dtype, outside any gradient."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    return np.asarray(array)


def draw_tokens(log_probs: Array, uniforms: FloatArray) -> IntArray:
    """Return one token a row by inverse CDF: the first whose cumulative probability exceeds u.

    Several times cheaper than `torch.multinomial` (TRAPS 6), the same numbers on every backend, and a token of
    probability 0 is never drawn.

    Parameters
    ----------
    log_probs
        Normalised log-probabilities, shape (R, V).
    uniforms
        From [0, 1), shape (R,).

    Returns
    -------
    Shape (R,), int64.

    Examples
    --------
    >>> with np.errstate(divide="ignore"):
    ...     log_probs = np.log([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    >>> draw_tokens(log_probs, np.array([0.5, 0.0]))
    array([2, 1])
    """
    if hasattr(log_probs, "detach"):
        torch = sys.modules["torch"]
        cumulative = log_probs.exp().cumsum(dim=-1)
        u = torch.as_tensor(uniforms, dtype=cumulative.dtype, device=cumulative.device)[:, None]
        targets = u.clamp(max=1.0 - torch.finfo(u.dtype).eps) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
        drawn: IntArray = to_host(tokens.clamp(max=log_probs.shape[1] - 1))
        return drawn
    cumulative = np.exp(to_host(log_probs).astype(np.float64)).cumsum(axis=-1)
    targets = np.minimum(uniforms, 1.0 - np.finfo(np.float64).eps)[:, None] * cumulative[:, -1:]
    drawn = np.minimum((cumulative <= targets).sum(axis=-1), cumulative.shape[1] - 1)
    return drawn


def take_tokens(log_probs: Array, tokens: IntArray) -> FloatArray:
    """Return the log-probability of each row's token, shape (R,), float64 on the host."""
    if hasattr(log_probs, "detach"):
        torch = sys.modules["torch"]
        index = torch.as_tensor(tokens, device=log_probs.device)[:, None]
        return to_host(log_probs.gather(1, index)[:, 0]).astype(np.float64)
    taken: FloatArray = np.take_along_axis(to_host(log_probs), tokens[:, None], axis=1)[:, 0].astype(np.float64)
    return taken
