"""What is done when the memory of a device runs out: half as much at once, said in a warning, and on it goes.

Memory is planned (`memory`), but a plan may err, and other processes use the same card. Random numbers belong to the draw
and not to the pass that it is made in, so a smaller pass has the same draws. What cannot be halved any more is a
`DeviceMemoryError`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from bayes_klrl.errors import DeviceMemoryError, warn_caller

__all__ = ["CURES", "attempted", "by_halves", "halving", "is_out_of_memory"]

CURES = (
    "Load the model in half precision (dtype='bfloat16'), free the memory that other processes hold, take fewer tokens "
    "(max_new_tokens, prompts), or use device='cpu'."
)

UNDIVIDED = "It cannot be divided any more."

W = TypeVar("W")
R = TypeVar("R")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device ran out: torch's own kind, or XLA's "RESOURCE_EXHAUSTED".

    Examples
    --------
    >>> is_out_of_memory(ValueError("another one"))
    False
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)


def attempted(run: Callable[[W], R], piece: W) -> list[R]:
    """Return [run(piece)]; an empty list if the memory of a device ran out, with torch's cache of free blocks given back."""
    try:
        return [run(piece)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # after the except clause: the traceback, whose frames hold tensors, is gone by now
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return []


def by_halves(
    run: Callable[[W], R],
    pieces: Sequence[W],
    rows_of: Callable[[W], int],
    halves_of: Callable[[W], Sequence[W]],
    *,
    doing: str,
    models: Sequence[Any] = (),
    num_tokens: int = 1,
    cure: str = "",
) -> Iterator[tuple[W, R]]:
    """Yield each piece of work with its result; a piece for which memory runs out is done as two halves instead.

    Pieces that follow, in this call and in later ones with the same models, are halved beforehand until they are smaller than
    the one that did not fit.

    Parameters
    ----------
    run
        A function that does a piece of work; what it does must not depend on how the work is divided.
    pieces
        The pieces.
    rows_of, halves_of
        Functions that return the number of completions of a piece, and its two halves, none if it is one completion.
    doing
        What is done with completions, for messages, such as "decoded".
    models, num_tokens
        The models that hold the completions in memory, and the tokens of a completion and its prompt.
    cure
        What to do if memory runs out for a piece that has no halves, before the usual cures.

    Raises
    ------
    DeviceMemoryError
        If memory runs out for a piece that has no halves.

    Examples
    --------
    >>> list(by_halves(sum, [[1, 2], [3, 4]], len, lambda xs: [xs[:1], xs[1:]], doing="added"))
    [([1, 2], 3), ([3, 4], 7)]
    """
    waiting = list(pieces)
    most = known_to_fit(models, num_tokens)
    while waiting:
        piece = waiting.pop(0)
        halves = halves_of(piece) if most is not None and rows_of(piece) > most else ()
        if not halves:
            if found := attempted(run, piece):
                yield piece, found[0]
                continue
            halves = halves_of(piece)
            if not halves:
                raise DeviceMemoryError(f"{ran_out(rows_of(piece), doing)}. {cure or UNDIVIDED} {CURES}")
            most = halving(rows_of(piece), doing)
            for model in models:
                remember(model, most * num_tokens)
        waiting[:0] = halves


_fits: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Rows times tokens that are tried at once with a model for which memory has run out."""


def known_to_fit(models: Sequence[Any], num_tokens: int) -> int | None:
    """Return the number of completions of so many tokens that are tried at once; None if memory never ran out."""
    found = [_fits[model] for model in models if _is_kept(model)]
    return max(1, min(found) // num_tokens) if found else None


def remember(model: Any, row_tokens: int) -> None:
    """Try at most so many rows times tokens at once with a model from here on."""
    with suppress(TypeError):  # a model of a user's own, which cannot be a key
        _fits[model] = row_tokens


def _is_kept(model: Any) -> bool:
    with suppress(TypeError):
        return model in _fits
    return False


def halving(num_rows: int, doing: str) -> int:
    """Return half of a number of completions that did not fit, at least 1, and say so in a warning.

    Raises
    ------
    DeviceMemoryError
        If it was one completion.
    """
    if num_rows <= 1:
        raise DeviceMemoryError(f"{ran_out(num_rows, doing)}. {UNDIVIDED} {CURES}")
    fewer = num_rows // 2
    warn_caller(
        f"{ran_out(num_rows, doing)}. From here on at most {fewer} are {doing} at once; the draws are the same. "
        "TorchLM(..., particles_per_pass=) sets a limit beforehand."
    )
    return fewer


def ran_out(num_rows: int, doing: str) -> str:
    """Return the sentence that says when memory ran out."""
    what = "one completion was" if num_rows == 1 else f"{num_rows} completions were"
    return f"The memory of the device ran out while {what} {doing} at once"
