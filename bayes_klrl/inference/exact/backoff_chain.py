"""A sparse back-off n-gram model as a chain of states, without a dense column per token.

A state is the longest seen suffix of the text, a node of the trie of contexts; node 0 is the empty context. For tokens
without an entry of their own, a node h uses its parent h' (h without its oldest token), so sums recurse over orders:

    sum_a p(a | h) g(h a) = sum_{a in E(h)} [p(a | h) g(h a) - w(h) p(a | h') g(h' a)] + w(h) sum_a p(a | h') g(h' a),

where E(h) are the tokens with an arc at h, or after which the longest seen suffix is longer than after h'. At the highest
order both lead to the same context, and the bracket is one non-negative number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.prior_chains import ngram_state
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.models.ngram_lm.tables import BackoffLevel, BackoffTable, find_keys
from bayes_klrl.typing import FloatArray, IntArray, TokenIds

__all__ = ["BackoffChain"]

_NOISY, _CANCELLED = 1e2, 1e4  # ratio of a term to the sum from which it is recorded, and from which the sum is redone


@dataclass(frozen=True, eq=False)
class _Level:
    """One order of the trie; nodes are numbered over all orders.

    Parameters
    ----------
    nodes
        The nodes of this level.
    parents
        The parent of each node, which is the node without its oldest token, shape (C,).
    log_backoff
        log w(h), shape (C,).
    arcs
        The level of the table with the explicit log-probs.
    extension_keys, extensions
        For each node of the next level that is h followed by a: the key h V + a, sorted, with h counted within this level;
        and the node itself.
    """

    nodes: slice
    parents: IntArray
    log_backoff: FloatArray
    arcs: BackoffLevel
    extension_keys: IntArray
    extensions: IntArray


@dataclass(frozen=True, eq=False)
class _Part:
    """The sums at one order's nodes as sparse matrices.

    `added` acts on arrivals and nodes of lower order; what `removed` gives is subtracted, and None subtracts nothing.
    """

    nodes: slice
    added: Any
    removed: Any = None


class BackoffChain:
    """A sparse back-off n-gram model as a `Chain`; `M` is never formed, see the module."""

    def __init__(self, prior: NgramLM, table: BackoffTable) -> None:
        self._prior, self._table, self._size = prior, table, table.vocab_size
        self._levels, last_tokens = _trie(table)
        self.num_states = 1 + last_tokens.size
        # arrival j < H - 1 leads to node j + 1; the others are tokens after which no context was seen
        root_arrivals = np.full(self._size, -1, dtype=np.int64)
        if table.levels:
            root_arrivals[table.levels[0].context_keys] = np.arange(len(table.levels[0].context_keys))
        unseen = np.flatnonzero(root_arrivals < 0)
        root_arrivals[unseen] = last_tokens.size + np.arange(unseen.size)
        self._root_arrivals = root_arrivals
        self.arrival_states = np.concatenate([np.arange(1, self.num_states), np.zeros(unseen.size, dtype=np.int64)])
        self.arrival_tokens = np.concatenate([last_tokens, unseen])
        parts = [table.unigram, *(part for level in table.levels for part in (level.arc_log_probs, level.log_backoff))]
        # back-off multiplies once per order
        least = [float(part[np.isfinite(part)].min(initial=0.0)) for part in parts]
        self.least_log_prob = float(sum(least))

    def expect(self, values: FloatArray) -> tuple[FloatArray, NDArray[np.bool_] | None]:
        """See `Chain.expect`."""
        stacked, cancelled = self._stacked(values)
        totals: FloatArray = stacked[len(values) :]
        return totals, cancelled

    def _stacked(self, values: FloatArray) -> tuple[FloatArray, NDArray[np.bool_] | None]:
        """Return the values and the sums at every node, (J + H, K), and which sums lost four digits, (H, K) or None."""
        num = len(values)
        stacked = np.empty((num + self.num_states, values.shape[1]))
        stacked[:num] = values
        # `noise` of a node: the largest number in its sum, if it is large compared with the sum itself
        noise = cancelled = None
        for depth, part in enumerate(self._parts):
            total = part.added @ stacked[: num + part.nodes.start]
            own = None
            if noise is not None:
                level = self._levels[depth - 1]
                own = np.exp(level.log_backoff)[:, None] * noise[level.parents]
            if part.removed is not None:
                added, removed = total, part.removed @ values
                total = added - removed
                taken = np.where(removed > 0, added, 0.0)
                own = taken if own is None else own + taken
            if own is not None and (own > _NOISY * total).any():
                noise = np.zeros((self.num_states, values.shape[1])) if noise is None else noise
                noise[part.nodes] = own
            stacked[num + part.nodes.start : num + part.nodes.stop] = total
        if noise is not None:
            cancelled = stacked[num:] < noise / _CANCELLED
        return stacked, cancelled

    def expect_log(self, values: FloatArray) -> FloatArray:
        """See `Chain.expect_log`; with p = w p', p log p = w (p' log p' + p' log w)."""
        stacked = self._stacked(values)[0]
        total = np.empty((self.num_states, values.shape[1]))
        for part, (own, below) in zip(self._parts, self._log_parts, strict=True):
            total[part.nodes] = own @ stacked[: len(values) + part.nodes.start] + below @ total[: part.nodes.start]
        return total

    def collect(self, mass: FloatArray) -> FloatArray:
        """See `Chain.collect`."""
        num = self.arrival_states.size
        stacked = np.concatenate([np.zeros((num, mass.shape[1])), mass])
        for part in reversed(self._parts):
            own = stacked[num + part.nodes.start : num + part.nodes.stop]
            stacked[: num + part.nodes.start] += part.added.T @ own
            if part.removed is not None:
                stacked[:num] -= part.removed.T @ own
        collected: FloatArray = np.maximum(stacked[:num], 0.0)  # terms that cancel leave rounding errors of either sign
        return collected

    def row(self, state: int) -> tuple[FloatArray, IntArray]:
        """See `Chain.row`."""
        log_probs, arrivals = self._table.unigram.copy(), self._root_arrivals.copy()
        for level, within in self._path(state):
            log_probs += level.log_backoff[within]
            begin, end = np.searchsorted(level.arcs.arc_keys, [within * self._size, (within + 1) * self._size])
            log_probs[level.arcs.arc_keys[begin:end] % self._size] = level.arcs.arc_log_probs[begin:end]
            begin, end = np.searchsorted(level.extension_keys, [within * self._size, (within + 1) * self._size])
            arrivals[level.extension_keys[begin:end] % self._size] = level.extensions[begin:end] - 1
        return log_probs, arrivals

    def _path(self, state: int) -> list[tuple[_Level, int]]:
        """Return the levels from the shortest suffix of a node to the node itself, and the suffix's number in each level."""
        path: list[tuple[_Level, int]] = []
        while state:
            level = next(each for each in self._levels if each.nodes.start <= state < each.nodes.stop)
            path.append((level, state - level.nodes.start))
            state = int(level.parents[state - level.nodes.start])
        return path[::-1]

    def beliefs(self, prior_state: IntArray) -> tuple[IntArray, FloatArray]:
        """See `Chain.beliefs`; the only state is the longest suffix that was seen."""
        states = np.zeros((len(prior_state), 1), dtype=np.int64)
        for level, (_, row, within) in zip(self._levels, self._table.seen(prior_state), strict=True):
            states[row, 0] = level.nodes.start + within
        return states, np.zeros(states.shape)

    def log_terms(self, prior_state: IntArray, log_values: FloatArray, columns: IntArray) -> FloatArray:
        """See `Chain.log_terms`."""
        arrivals = np.tile(self._root_arrivals, (len(prior_state), 1))
        for level, (_, row, within) in zip(self._levels, self._table.seen(prior_state), strict=True):
            begin = np.searchsorted(level.extension_keys, within * self._size)
            count = np.searchsorted(level.extension_keys, (within + 1) * self._size) - begin
            place = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(count.sum())
            arrivals[np.repeat(row, count), level.extension_keys[place] % self._size] = level.extensions[place] - 1
        values: FloatArray = log_values[arrivals, columns[:, None]]
        values += self._table.rows(prior_state)
        return values

    def prefix_state(self, prompt_ids: Sequence[TokenIds], prompt_index: IntArray, prefixes: IntArray) -> IntArray:
        """See `Chain.prefix_state`."""
        return ngram_state(self._prior, prompt_ids, prompt_index, prefixes)

    def _explicit(self, depth: int, level: _Level) -> _Explicit:
        """Return, for every (h, a) with a in E(h): h within the level, log p(a | h), arrival, and the last two by back-off."""
        within, tokens = np.divmod(np.union1d(level.arcs.arc_keys, level.extension_keys), self._size)
        here = self._lookup(depth, within, tokens)
        below = self._lookup(depth - 1, self._parents(depth, within), tokens)
        return within, *here, level.log_backoff[within] + below[0], below[1]

    def _parents(self, depth: int, within: IntArray) -> IntArray:
        """Return the parents of nodes of one depth, both numbered within their levels."""
        start = self._levels[depth - 2].nodes.start if depth > 1 else 0
        parents: IntArray = self._levels[depth - 1].parents[within] - start
        return parents

    def _lookup(self, depth: int, within: IntArray, tokens: IntArray) -> tuple[FloatArray, IntArray]:
        """Return log p(a | h) and the arrival by a after h, for nodes h of one depth."""
        if depth == 0:
            return self._table.unigram[tokens], self._root_arrivals[tokens]
        level = self._levels[depth - 1]
        log_probs, arrivals = self._lookup(depth - 1, self._parents(depth, within), tokens)
        keys = within * self._size + tokens
        arc, has_arc = find_keys(level.arcs.arc_keys, keys)
        log_probs = np.where(has_arc, level.arcs.arc_log_probs[arc], level.log_backoff[within] + log_probs)
        if level.extension_keys.size:
            place, longer = find_keys(level.extension_keys, keys)
            arrivals = np.where(longer, level.extensions[place] - 1, arrivals)
        return log_probs, arrivals

    @cached_property
    def _parts(self) -> list[_Part]:
        """The formula as sparse matrices, one per order."""
        root = np.zeros(self._size, dtype=np.int64)
        parts = [
            _Part(slice(0, 1), self._sparse(slice(0, 1), [(root, self._root_arrivals, np.exp(self._table.unigram))]))
        ]
        for depth, level in enumerate(self._levels, start=1):
            within, log_p, arrival, log_below, arrival_below = self._explicit(depth, level)
            same = arrival == arrival_below
            change = np.exp(log_p) - np.where(same, np.exp(log_below), 0.0)
            up = change > 0
            nodes = np.arange(len(level.parents))
            backed_off = (nodes, self.arrival_states.size + level.parents, np.exp(level.log_backoff))
            added = self._sparse(level.nodes, [(within[up], arrival[up], change[up]), backed_off])
            less, other = change < 0, ~same
            removed = [(within[less], arrival[less], -change[less])]
            removed.append((within[other], arrival_below[other], np.exp(log_below[other])))
            any_removed = less.any() or other.any()
            parts.append(_Part(level.nodes, added, self._sparse(level.nodes, removed, 0) if any_removed else None))
        return parts

    @cached_property
    def _log_parts(self) -> list[tuple[Any, Any]]:
        """The same for p log p: matrices on values and plain sums of lower order, and matrices on their p log p sums."""
        root = np.zeros(self._size, dtype=np.int64)
        unigram = self._sparse(slice(0, 1), [(root, self._root_arrivals, _plogp(self._table.unigram))])
        parts = [(unigram, self._below(slice(0, 1), []))]
        for depth, level in enumerate(self._levels, start=1):
            within, log_p, arrival, log_below, arrival_below = self._explicit(depth, level)
            nodes = np.arange(len(level.parents))
            plain_below = (nodes, self.arrival_states.size + level.parents, _plogp(level.log_backoff))
            entries = [(within, arrival, _plogp(log_p)), (within, arrival_below, -_plogp(log_below)), plain_below]
            below = self._below(level.nodes, [(nodes, level.parents, np.exp(level.log_backoff))])
            parts.append((self._sparse(level.nodes, entries), below))
        return parts

    def _sparse(self, nodes: slice, entries: list[_Entries], num_below: int | None = None) -> Any:
        """Return the sum of entries (node within the level, column, value) as a matrix on arrivals and lower nodes."""
        below = nodes.start if num_below is None else num_below
        return _csr(entries, (nodes.stop - nodes.start, self.arrival_states.size + below))

    def _below(self, nodes: slice, entries: list[_Entries]) -> Any:
        """Return the sum of entries (node within the level, lower node, value) as a matrix on lower nodes."""
        return _csr(entries, (nodes.stop - nodes.start, nodes.start))


_Entries = tuple[IntArray, IntArray, FloatArray]
_Explicit = tuple[IntArray, FloatArray, IntArray, FloatArray, IntArray]


def _csr(entries: list[_Entries], shape: tuple[int, int]) -> Any:
    """Return the sum of entries (row, column, value) as a sparse matrix."""
    from scipy.sparse import csr_array

    if not entries:
        return csr_array(shape)
    rows, columns, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    return csr_array((values, (rows, columns)), shape=shape)


def _plogp(log_p: FloatArray) -> FloatArray:
    """Return p log p, with 0 for p = 0."""
    return np.where(np.isneginf(log_p), 0.0, np.exp(log_p) * np.where(np.isneginf(log_p), 0.0, log_p))


def _trie(table: BackoffTable) -> tuple[list[_Level], IntArray]:
    """Return the levels with nodes numbered over all orders, and the newest token of every node except the root."""
    size = table.vocab_size
    starts = np.cumsum([1, *(len(level.context_keys) for level in table.levels)])
    newest: list[IntArray] = []
    prefixes: list[IntArray] = []  # each node without its newest token, numbered within the level below
    parents = []
    for depth, level in enumerate(table.levels):
        parent, oldest = np.divmod(level.context_keys, size)
        newest.append(newest[-1][parent] if depth else oldest)
        parents.append(parent + starts[depth - 1] if depth else np.zeros(parent.size, dtype=np.int64))
        if depth:
            place, found = find_keys(table.levels[depth - 1].context_keys, prefixes[-1][parent] * size + oldest)
            if not found.all():
                raise BayesKLRLError(
                    "This back-off table has a context but not the same context without its newest token, so it is not a "
                    "chain of seen contexts. Use a table made by NgramLM.fit, which always has both."
                )
            prefixes.append(place)
        else:
            prefixes.append(np.zeros(parent.size, dtype=np.int64))
    levels = []
    for depth, level in enumerate(table.levels):
        keys = np.zeros(0, dtype=np.int64)
        nodes = keys
        if depth + 1 < len(table.levels):
            keys = prefixes[depth + 1] * size + newest[depth + 1]
            nodes = np.argsort(keys)
            keys, nodes = keys[nodes], nodes + starts[depth + 1]
        own = slice(int(starts[depth]), int(starts[depth + 1]))
        levels.append(_Level(own, parents[depth], level.log_backoff, level, keys, nodes))
    return levels, np.concatenate([np.zeros(0, dtype=np.int64), *newest])
