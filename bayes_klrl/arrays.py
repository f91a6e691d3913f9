"""The few array operations that decoding needs, for NumPy, torch and anything that turns into NumPy.

This module never imports torch: a torch tensor can only exist if somebody else has imported it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from bayes_klrl.typing import Array, FloatArray, IntArray

__all__ = ["draw_tokens", "is_identity", "no_gradient", "take_tokens", "to_host"]


def no_gradient() -> AbstractContextManager[Any]:
    """Return a context in which no backend records gradients."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.no_grad()


def to_host(array: Array) -> np.ndarray:
    """Return an array of any backend as NumPy on the host, same dtype, outside any gradient."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    return np.asarray(array)


def draw_tokens(log_probs: Array, rows: IntArray, uniforms: FloatArray) -> IntArray:
    """Return tokens by inverse CDF: for each draw, the first token of its row whose cumulative probability exceeds u.

    Several times cheaper than `torch.multinomial` (theory.md 10.2), the same numbers on every backend, and a token of
    probability 0 is never drawn.

    Parameters
    ----------
    log_probs
        Normalised log-probabilities, shape (R, V).
    rows
        Row of `log_probs` that each draw is taken from, shape (M,).
    uniforms
        One uniform random number in [0, 1) per draw, shape (M,).

    Returns
    -------
    The drawn tokens, shape (M,), int64.

    Examples
    --------
    >>> with np.errstate(divide="ignore"):
    ...     log_probs = np.log([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    >>> draw_tokens(log_probs, np.array([0, 0, 1]), np.array([0.49, 0.5, 0.0]))
    array([0, 2, 1])
    """
    last = log_probs.shape[1] - 1
    if hasattr(log_probs, "detach"):
        torch = sys.modules["torch"]
        cumulative = log_probs.softmax(dim=-1).cumsum(dim=-1)  # exp, but by a faster kernel
        if not is_identity(rows, len(cumulative)):
            cumulative = cumulative[torch.as_tensor(rows, device=cumulative.device)]
        u = torch.as_tensor(uniforms, dtype=cumulative.dtype, device=cumulative.device)[:, None]
        targets = u.clamp(max=1.0 - torch.finfo(u.dtype).eps) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
        drawn: IntArray = to_host(tokens.clamp(max=last))
        return drawn
    cumulative = np.exp(to_host(log_probs).astype(np.float64)).cumsum(axis=-1)[rows]
    targets = np.minimum(uniforms, 1.0 - np.finfo(np.float64).eps)[:, None] * cumulative[:, -1:]
    on_host: IntArray = np.minimum((cumulative <= targets).sum(axis=-1), last)
    return on_host


def take_tokens(log_probs: Array, rows: IntArray, tokens: IntArray) -> FloatArray:
    """Return log_probs[rows, tokens], shape (M,), as float64 on the host."""
    if hasattr(log_probs, "detach"):
        torch = sys.modules["torch"]
        index = torch.as_tensor(rows, device=log_probs.device), torch.as_tensor(tokens, device=log_probs.device)
        return to_host(log_probs[index]).astype(np.float64)
    taken: FloatArray = to_host(log_probs)[rows, tokens].astype(np.float64)
    return taken


def is_identity(rows: IntArray, num_rows: int) -> bool:
    """Return whether rows are 0, 1, ..., num_rows - 1."""
    return len(rows) == num_rows and bool((rows == np.arange(num_rows)).all())
