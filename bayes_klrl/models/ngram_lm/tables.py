"""Storage of p(token | last n - 1 tokens) of an n-gram model: a dense array, or back-off over the n-grams that were seen.

Letters: V vocabulary, R contexts. A context holds the last order - 1 tokens, oldest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp

__all__ = ["BackoffLevel", "BackoffTable", "DenseTable", "NgramTable", "find_keys", "fit_witten_bell"]

_SUM_TOLERANCE = 1e-6  # what a softmax in float32 leaves
_EXACT_TOLERANCE = 1e-12  # what one in float64 leaves: such rows are kept bit for bit


class NgramTable(Protocol):
    """Log-probs of the next token, found by context."""

    @property
    def order(self) -> int:
        """n: the next token depends on the n - 1 tokens before it."""

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""

    @property
    def full_support(self) -> bool:
        """True if no entry is -inf."""

    def rows(self, contexts: IntArray) -> FloatArray:
        """Return log p(. | context), shape (R, V), for contexts of shape (R, order - 1)."""

    def at(self, contexts: IntArray, tokens: IntArray) -> FloatArray:
        """Return log p(token | context), shape (R,), for contexts (R, order - 1) and tokens (R,)."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the named arrays in which the table is saved."""


@dataclass(frozen=True, eq=False)
class DenseTable:
    """A table with all entries in one array of shape (V,) * order, last axis the next token.

    Rows that sum to 1 within 1e-6 but not within 1e-12 (of a softmax in float32) are normalised in float64. Rows that sum to
    1 within 1e-12 are kept as given.
    """

    log_probs: FloatArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_probs", _normalised_rows(self.log_probs))
        self.log_probs.setflags(write=False)

    @property
    def order(self) -> int:
        """See `NgramTable.order`."""
        return self.log_probs.ndim

    @property
    def vocab_size(self) -> int:
        """See `NgramTable.vocab_size`."""
        return len(self.log_probs)

    @cached_property
    def full_support(self) -> bool:
        """See `NgramTable.full_support`."""
        return bool(np.isfinite(self.log_probs).all())

    def rows(self, contexts: IntArray) -> FloatArray:
        """See `NgramTable.rows`."""
        by_row: FloatArray = self.log_probs.reshape(-1, self.vocab_size)
        return by_row[self._row_numbers(contexts)]

    def at(self, contexts: IntArray, tokens: IntArray) -> FloatArray:
        """See `NgramTable.at`."""
        by_row: FloatArray = self.log_probs.reshape(-1, self.vocab_size)
        return by_row[self._row_numbers(contexts), tokens]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See `NgramTable.arrays`."""
        return {"log_probs": self.log_probs}

    def _row_numbers(self, contexts: IntArray) -> IntArray:
        place_values = self.vocab_size ** np.arange(self.order - 2, -1, -1, dtype=np.int64)
        numbers: IntArray = contexts @ place_values
        return numbers


def _normalised_rows(log_probs: ArrayLike) -> FloatArray:
    """Return a float64 copy of a table, after checking that its rows, over the last axis, sum to 1."""
    table = np.array(log_probs, dtype=np.float64)
    if table.ndim == 0 or table.size == 0 or len(set(table.shape)) != 1:
        raise BayesKLRLError(
            f"An n-gram table has shape (V,) * order, one axis of length V per token; got {table.shape}."
        )
    if np.isnan(table).any():
        raise BayesKLRLError(f"Log-probs must not be NaN; row {_first(np.isnan(table).any(axis=-1))} has one.")
    if table.max() > _SUM_TOLERANCE:
        entry = _first(table > _SUM_TOLERANCE)
        raise BayesKLRLError(
            f"Log-probs are at most 0; entry {entry} is {table[entry]:.6g}. Take the log of "
            "probabilities, or subtract logsumexp over the last axis from logits."
        )
    log_totals = logsumexp(table)
    sums = np.exp(log_totals)
    if (np.abs(sums - 1) > _SUM_TOLERANCE).any():
        row = _first(np.abs(sums - 1) > _SUM_TOLERANCE)
        raise BayesKLRLError(
            f"The probabilities of every row must sum to 1 within {_SUM_TOLERANCE}; those of row {row} "
            f"sum to {sums[row]:.9g}. Subtract logsumexp over the last axis."
        )
    inexact = np.abs(log_totals) > _EXACT_TOLERANCE
    return np.minimum(np.where(inexact[..., None], table - log_totals[..., None], table), 0.0)


def _first(bad: ArrayLike) -> tuple[int, ...]:
    """Return the index of the first True."""
    return tuple(int(i) for i in np.argwhere(bad)[0])


@dataclass(frozen=True, eq=False)
class BackoffLevel:
    """The contexts of one length k that were seen, and the tokens seen after them.

    Contexts form a trie that is read backwards: context number i has key `parent * V + oldest token`, where
    `parent` is the number of the same context without its oldest token, at the level below (0 for the empty
    one). Keys stay below (number of contexts) * V, so no order overflows int64. Arc `context * V + token` is
    a token seen after a context.

    Parameters
    ----------
    context_keys
        The keys of the C contexts, sorted, shape (C,).
    log_backoff
        log of the probability that a context leaves to the level below, shape (C,).
    arc_keys
        The keys of the A arcs, sorted, shape (A,).
    arc_log_probs
        log p(token | context) of each arc, already interpolated with the levels below, shape (A,).
    """

    context_keys: IntArray
    log_backoff: FloatArray
    arc_keys: IntArray
    arc_log_probs: FloatArray


@dataclass(frozen=True, eq=False)
class BackoffTable:
    """A back-off n-gram model, whose memory grows with the number of n-grams seen and not with V**order.

    p(a | h) = the stored value if h a was seen, else backoff(h) * p(a | h without its oldest token), with
    backoff(h) = 1 for an h never seen and a dense unigram at the bottom (Katz 1987; the ARPA format).

    Parameters
    ----------
    unigram
        log p(token), shape (V,).
    levels
        The contexts of length 1, 2, ..., order - 1.
    """

    unigram: FloatArray
    levels: tuple[BackoffLevel, ...]

    @property
    def order(self) -> int:
        """See `NgramTable.order`."""
        return len(self.levels) + 1

    @property
    def vocab_size(self) -> int:
        """See `NgramTable.vocab_size`."""
        return self.unigram.size

    @property
    def full_support(self) -> bool:
        """See `NgramTable.full_support`."""
        return bool(np.isfinite(self.unigram).all())

    def rows(self, contexts: IntArray) -> FloatArray:
        """See `NgramTable.rows`."""
        log_probs = np.tile(self.unigram, (len(contexts), 1))
        for level, row, context in self.seen(contexts):
            log_probs[row] += level.log_backoff[context, None]
            arc, count = self._arcs_of(level, context)
            log_probs[np.repeat(row, count), level.arc_keys[arc] % self.vocab_size] = level.arc_log_probs[arc]
        return log_probs

    def at(self, contexts: IntArray, tokens: IntArray) -> FloatArray:
        """See `NgramTable.at`."""
        log_probs: FloatArray = self.unigram[tokens]
        for level, row, context in self.seen(contexts):
            arc, found = find_keys(level.arc_keys, context * self.vocab_size + tokens[row])
            backed_off = log_probs[row] + level.log_backoff[context]
            log_probs[row] = np.where(found, level.arc_log_probs[arc], backed_off)
        return log_probs

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See `NgramTable.arrays`."""
        named: dict[str, NDArray[Any]] = {"unigram": self.unigram}
        for length, level in enumerate(self.levels, start=1):
            named.update({f"{name}_{length}": array for name, array in vars(level).items()})
        return named

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], order: int) -> BackoffTable:
        """Return the table that wrote these `arrays`; raise `KeyError` if a name is missing."""
        names = BackoffLevel.__dataclass_fields__
        levels = [BackoffLevel(*(arrays[f"{name}_{length}"] for name in names)) for length in range(1, order)]
        table = cls(arrays["unigram"], tuple(levels))
        table._check()
        return table

    def _check(self) -> None:
        """Refuse arrays that do not fit together: a lookup in them would return a wrong number."""
        num_parents = 1
        for level in self.levels:
            num_contexts = len(level.context_keys)
            sound = (
                level.log_backoff.shape == (num_contexts,)
                and level.arc_log_probs.shape == level.arc_keys.shape
                and _are_keys(level.context_keys, num_parents * self.vocab_size)
                and _are_keys(level.arc_keys, num_contexts * self.vocab_size)
            )
            if not sound:
                raise BayesKLRLError("The arrays of the back-off table do not fit together; save the model again.")
            num_parents = num_contexts

    def seen(self, contexts: IntArray) -> Iterator[tuple[BackoffLevel, IntArray, IntArray]]:
        """Yield, from short contexts to long ones, the rows whose context was seen, and the number of the context."""
        row = np.arange(len(contexts))
        parent = np.zeros(len(contexts), dtype=np.int64)
        for length, level in enumerate(self.levels, start=1):
            context, found = find_keys(level.context_keys, parent * self.vocab_size + contexts[row, -length])
            # A context is seen only if its shorter suffix was: the rest need not be looked up any further.
            row, parent = row[found], context[found]
            yield level, row, parent

    def _arcs_of(self, level: BackoffLevel, context: IntArray) -> tuple[IntArray, IntArray]:
        """Return the positions of the contexts' arcs, one context after another, and the number of arcs of each."""
        start = np.searchsorted(level.arc_keys, context * self.vocab_size)
        count = np.searchsorted(level.arc_keys, (context + 1) * self.vocab_size) - start
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(start, count) + within, count


def _are_keys(keys: IntArray, limit: int) -> bool:
    """Return whether `keys` are sorted distinct integers in 0..limit - 1, at least one."""
    is_integer = keys.dtype.kind == "i" and keys.ndim == 1 and keys.size > 0
    return is_integer and bool(keys[0] >= 0 and keys[-1] < limit and (np.diff(keys) > 0).all())


def find_keys(sorted_keys: IntArray, keys: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
    """Return each key's position in `sorted_keys` (any legal one if absent), and True where it is present."""
    position = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return position, sorted_keys[position] == keys


def fit_witten_bell(texts: Sequence[IntArray], *, order: int, vocab_size: int, pad_token: int) -> BackoffTable:
    """Return the n-gram model of `texts`, interpolated by the method of Witten and Bell.

        p(a | h) = (c(h a) + t(h) p(a | h')) / (c(h) + t(h)),

    c counts, t(h) the number of distinct tokens seen after h, h' the context without its oldest token; below
    the unigram stands the uniform law 1 / V, so that every token has positive probability. Unseen tokens get
    t(h) / (c(h) + t(h)) p(a | h'), which is the back-off form that the table stores.

    Source: Witten and Bell (1991), method C; interpolated form of Chen and Goodman (1998), section 2.5.

    Parameters
    ----------
    texts
        Token ids of each text, with at least one token in total.
    order
        n.
    vocab_size
        V.
    pad_token
        The token before the start of every text. It serves as context only and is not counted as a token of the text.
    """
    before = [pad_token] * (order - 1)
    stream = np.concatenate([np.concatenate([before, ids]) for ids in texts]).astype(np.int64)
    is_drawn = np.concatenate([np.arange(len(ids) + order - 1) >= order - 1 for ids in texts])
    position = np.flatnonzero(is_drawn)
    token = stream[position]

    counts = np.bincount(token, minlength=vocab_size)
    num_types = np.count_nonzero(counts)
    unigram: FloatArray = np.log((counts + num_types / vocab_size) / (token.size + num_types))

    levels: list[BackoffLevel] = []
    context = np.zeros(token.size, dtype=np.int64)
    for length in range(1, order):
        context_keys, context = np.unique(context * vocab_size + stream[position - length], return_inverse=True)
        arc_keys, arc_counts = np.unique(context * vocab_size + token, return_counts=True)
        arc_context, arc_token = np.divmod(arc_keys, vocab_size)
        lower = unigram[arc_token]
        if levels:  # whatever follows h also follows h', so every arc has one below it
            lower_keys = context_keys[arc_context] // vocab_size * vocab_size + arc_token
            lower = levels[-1].arc_log_probs[np.searchsorted(levels[-1].arc_keys, lower_keys)]
        types = np.bincount(arc_context)
        total = np.bincount(context) + types
        arc_probs = (arc_counts + types[arc_context] * np.exp(lower)) / total[arc_context]
        levels.append(BackoffLevel(context_keys, np.log(types / total), arc_keys, np.log(arc_probs)))
    return BackoffTable(unigram, tuple(levels))
