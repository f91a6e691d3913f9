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

_FLOATS_AT_ONCE = 2**21
"""Largest number of cumulative probabilities at once on the host: 8 MB in float32, which the next ones use again."""

_FLOATS_ON_DEVICE = 2**25
"""The same on an accelerator, where many small kernels would take longer (128 MB)."""


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
    table = log_probs if hasattr(log_probs, "detach") else to_host(log_probs)
    num_rows, size = len(table), max(1, _most_floats(table) // table.shape[1])
    if max(num_rows, len(rows)) <= size:
        return _first_beyond(_cumulative(table), rows, uniforms)
    tokens = np.empty(len(rows), dtype=np.int64)
    for start in range(0, num_rows, size):
        cumulative = _cumulative(table[start : start + size])
        draws = np.flatnonzero((rows >= start) & (rows < start + size))
        for first in range(0, draws.size, size):
            part = draws[first : first + size]
            tokens[part] = _first_beyond(cumulative, rows[part] - start, uniforms[part])
    return tokens


def _most_floats(table: Array) -> int:
    """Return the largest number of cumulative probabilities that are held at once; rows do not affect each other."""
    on_device = hasattr(table, "detach") and table.device.type != "cpu"
    return _FLOATS_ON_DEVICE if on_device else _FLOATS_AT_ONCE


def _cumulative(log_probs: Array) -> Array:
    """Return the cumulative probabilities of each row, (R, V): torch in its own precision, else float64 on the host."""
    if hasattr(log_probs, "detach"):
        return log_probs.softmax(dim=-1).cumsum(dim=-1)  # exp, but by a faster kernel
    return np.exp(log_probs.astype(np.float64)).cumsum(axis=-1)


def _first_beyond(cumulative: Array, rows: IntArray, uniforms: FloatArray) -> IntArray:
    """Return for each draw the first token of its row whose cumulative probability exceeds u times the last one."""
    last = cumulative.shape[1] - 1
    if hasattr(cumulative, "detach"):
        torch = sys.modules["torch"]
        if not is_identity(rows, len(cumulative)):
            cumulative = cumulative[torch.as_tensor(rows, device=cumulative.device)]
        u = torch.as_tensor(uniforms, dtype=cumulative.dtype, device=cumulative.device)[:, None]
        targets = u.clamp(max=1.0 - torch.finfo(u.dtype).eps) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
        drawn: IntArray = to_host(tokens.clamp(max=last))
        return drawn
    cumulative = cumulative[rows]
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
