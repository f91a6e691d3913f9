"""The few array operations that decoding needs, for NumPy, torch and anything that turns into NumPy.

This module never imports torch: a torch tensor can only exist if somebody else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from bayes_klrl.typing import Array, FloatArray, IntArray

__all__ = [
    "cumulative_probs",
    "draw_tokens",
    "drawn_tokens",
    "first_beyond",
    "is_identity",
    "no_gradient",
    "on_accelerator",
    "overridden",
    "take_tokens",
    "to_device",
    "to_host",
    "to_host_together",
]

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


def on_accelerator(array: Any) -> bool:
    """Return whether an array is a torch tensor outside of main memory, which the host has to wait for."""
    return hasattr(array, "detach") and array.device.type != "cpu"


def to_device(array: Any, device: Any, dtype: Any = None) -> Any:
    """Return an array of the host as a torch tensor on a device; the host does not wait for what the device is computing.

    `torch.as_tensor(array, device=device)` waits. A copy from ordinary memory is staged before `to` returns, so that the array
    may be changed at once; on Apple's devices it is not.
    """
    tensor = sys.modules["torch"].as_tensor(array, dtype=dtype, device="cpu")  # whatever torch's default device is
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=device.type != "mps")


def to_host_together(arrays: Sequence[Array]) -> list[np.ndarray]:
    """Return arrays (M,) on the host; those that are on one accelerator come by one transfer, as float64.

    Token ids and float32 numbers are exact in float64. Arrays that are on the host already are returned as they are.
    """
    devices = {array.device for array in arrays if on_accelerator(array)}
    found = list(arrays)
    for device in devices:
        places = [i for i, array in enumerate(arrays) if on_accelerator(array) and array.device == device]
        own = [arrays[i] for i in places]
        if device.type == "mps":  # it has no float64
            own = [to_host(array) for array in own]
        else:
            own = list(to_host(sys.modules["torch"].stack([array.double() for array in own])))
        for i, array in zip(places, own, strict=True):
            found[i] = array
    return found


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
    tokens: IntArray = to_host(drawn_tokens(log_probs, rows, uniforms))
    return tokens


def drawn_tokens(log_probs: Array, rows: IntArray, uniforms: FloatArray) -> Array:
    """Return the same as `draw_tokens`, on the accelerator if the log-probs are there: the host does not wait."""
    table = log_probs if hasattr(log_probs, "detach") else to_host(log_probs)
    num_rows, size = len(table), max(1, _most_floats(table) // table.shape[1])
    if max(num_rows, len(rows)) <= size:
        return _first_beyond(cumulative_probs(table), rows, uniforms)
    parts, tokens = [], []
    for start in range(0, num_rows, size):
        cumulative = cumulative_probs(table[start : start + size])
        draws = np.flatnonzero((rows >= start) & (rows < start + size))
        for first in range(0, draws.size, size):
            parts.append(draws[first : first + size])
            tokens.append(_first_beyond(cumulative, rows[parts[-1]] - start, uniforms[parts[-1]]))
    place = np.concatenate(parts).argsort()
    if on_accelerator(table):
        return sys.modules["torch"].cat(tokens)[to_device(place, table.device)]
    return np.concatenate(tokens)[place]


def _most_floats(table: Array) -> int:
    """Return the largest number of cumulative probabilities that are held at once; rows do not affect each other."""
    on_device = hasattr(table, "detach") and table.device.type != "cpu"
    return _FLOATS_ON_DEVICE if on_device else _FLOATS_AT_ONCE


def cumulative_probs(log_probs: Array) -> Array:
    """Return the cumulative probabilities of each row, (R, V): torch in its own precision, else float64 on the host."""
    if hasattr(log_probs, "detach"):
        return log_probs.softmax(dim=-1).cumsum(dim=-1)  # exp, but by a faster kernel
    return np.exp(log_probs.astype(np.float64)).cumsum(axis=-1)


def _first_beyond(cumulative: Array, rows: IntArray, uniforms: FloatArray) -> Array:
    """Return for each draw the first token of its row whose cumulative probability exceeds u times the last one."""
    if hasattr(cumulative, "detach"):
        if not is_identity(rows, len(cumulative)):
            cumulative = cumulative[to_device(rows, cumulative.device)]
        tokens = first_beyond(cumulative, to_device(uniforms, cumulative.device, cumulative.dtype))
        return tokens if on_accelerator(tokens) else to_host(tokens)
    cumulative = cumulative[rows]
    targets = np.minimum(uniforms, 1.0 - np.finfo(np.float64).eps)[:, None] * cumulative[:, -1:]
    on_host: IntArray = np.minimum((cumulative <= targets).sum(axis=-1), cumulative.shape[1] - 1)
    return on_host


def first_beyond(cumulative: Array, uniforms: Array) -> Array:
    """Return the tokens (R,) at which cumulative probabilities (R, V) first exceed u times the last one; torch tensors."""
    torch = sys.modules["torch"]
    targets = uniforms[:, None].clamp(max=1.0 - torch.finfo(uniforms.dtype).eps) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def take_tokens(log_probs: Array, rows: IntArray, tokens: Array) -> Array:
    """Return log_probs[rows, tokens], shape (M,), as float64 on the host.

    If the tokens are on an accelerator the result is where the log-probs are, in their own precision, and the host does not
    wait.
    """
    if hasattr(log_probs, "detach") and on_accelerator(tokens):
        tokens = tokens.to(log_probs.device)
        if is_identity(rows, len(log_probs)):
            return log_probs.gather(1, tokens[:, None])[:, 0]
        return log_probs[to_device(rows, log_probs.device), tokens]
    tokens = to_host(tokens)
    if hasattr(log_probs, "detach"):
        index = to_device(rows, log_probs.device), to_device(tokens, log_probs.device)
        return to_host(log_probs[index]).astype(np.float64)
    return to_host(log_probs)[rows, tokens].astype(np.float64)


def overridden(tokens: Array, forced: IntArray) -> Array:
    """Return the tokens (M,), with forced ones where these are not -1."""
    if not on_accelerator(tokens):
        return np.where(forced >= 0, forced, tokens)
    there = to_device(forced, tokens.device)
    return tokens.where(there < 0, there)


def is_identity(rows: IntArray, num_rows: int) -> bool:
    """Return whether rows are 0, 1, ..., num_rows - 1."""
    return len(rows) == num_rows and bool((rows == np.arange(num_rows)).all())
