"""Next-token log-probs in bounded memory: a table (R, V) of more than `MOST_FLOATS` numbers is made in several passes.

With a vocabulary of 150 000 tokens the log-probs of 1000 rows take 600 MB, several times over while tokens are drawn. Rows are
independent of each other, so that some of them at a time are enough. A smaller table is made at once: a matrix product may
differ in the last bit with the number of its rows.
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.typing import Array, IntArray, LanguageModel, State

__all__ = ["fits", "next_log_probs_of", "passes"]

MOST_FLOATS = 2**25
"""Largest number of entries of a table that is made at once (128 MB in float32)."""

FLOATS_PER_PASS = 2**24
"""Largest number of entries per pass of a larger one."""


def fits(num_rows: int, vocab_size: int) -> bool:
    """Return whether a table (R, V) is made at once."""
    return num_rows * vocab_size <= MOST_FLOATS


def passes(rows: IntArray, vocab_size: int) -> list[IntArray]:
    """Return the rows in parts of about equal size, each small enough for a table (rows, V); one part if possible.

    Examples
    --------
    >>> [len(part) for part in passes(np.arange(1000), 150_000)], [len(part) for part in passes(np.arange(1000), 30_000)]
    ([100, 100, 100, 100, 100, 100, 100, 100, 100, 100], [1000])
    """
    if fits(rows.size, vocab_size):
        return [rows]
    return np.array_split(rows, -(-rows.size // max(1, FLOATS_PER_PASS // vocab_size)))


def next_log_probs_of(model: LanguageModel, state: State, rows: IntArray) -> Array:
    """Return the next-token log-probs of some rows of a state, (len(rows), V), by the model's own method if it has one.

    The method is looked up in the class: a wrapper that passes unknown names on to another model changes the log-probs.
    """
    own = getattr(type(model), "next_log_probs_of", None)
    log_probs: Array = model.next_log_probs(model.select(state, rows)) if own is None else own(model, state, rows)
    return log_probs
