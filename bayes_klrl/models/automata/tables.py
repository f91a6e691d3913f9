"""Transition tables of automata as plain arrays, shape (D, V); state 0 is the start."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import IntArray

__all__ = ["explored", "levenshtein_machine", "minimal", "pattern_machine", "product_machine", "reachable"]

_MAX_STATES = 20_000

S = TypeVar("S", bound=Hashable)


def explored(start: S, successors: Callable[[S], Sequence[S]]) -> tuple[IntArray, list[S]]:
    """Return the transitions between all states that can be reached, breadth first, and the list of these states.

    Parameters
    ----------
    start
        The first state.
    successors
        A function that returns a state's next states, one for each symbol.
    """
    number: dict[S, int] = {start: 0}
    states, rows = [start], []
    for state in states:  # grows while it is read
        row = []
        for successor in successors(state):
            if successor not in number:
                number[successor] = len(states)
                states.append(successor)
            row.append(number[successor])
        rows.append(row)
        if len(states) > _MAX_STATES:
            raise BayesKLRLError(
                f"The automaton has more than {_MAX_STATES:,} states. Use a smaller pattern or distance."
            )
    return np.array(rows, dtype=np.int64), states


def reachable(transitions: IntArray, start: int) -> IntArray:
    """Return the states that can be reached from `start`, sorted."""
    seen = np.zeros(len(transitions), dtype=bool)
    seen[start] = True
    frontier = np.array([start])
    while frontier.size:
        following = np.unique(transitions[frontier])
        frontier = following[~seen[following]]
        seen[frontier] = True
    return np.flatnonzero(seen)


def minimal(transitions: IntArray, labels: IntArray) -> tuple[IntArray, IntArray]:
    """Return the smallest automaton that gives every text the same label, and its labels (Moore 1956).

    Parameters
    ----------
    transitions
        The next states, shape (D, V).
    labels
        The label of each state, integers of shape (D,). States of different labels are never merged.
    """
    kept = reachable(transitions, 0)
    number = np.zeros(len(transitions), dtype=np.int64)
    number[kept] = np.arange(kept.size)
    transitions, labels = number[transitions[kept]], labels[kept]
    columns = np.unique(transitions, axis=1)  # equal columns need to be compared only once
    group = np.unique(labels, return_inverse=True)[1]
    while True:
        signature = np.column_stack([group, group[columns]])
        finer = np.unique(signature, axis=0, return_inverse=True)[1].ravel()
        if finer.max() == group.max():
            break
        group = finer
    # number the groups by their first state, so that state 0 stays the start
    first = np.unique(group, return_index=True)[1]
    order = np.argsort(first)
    rank = np.argsort(order)
    members = first[order]
    return rank[group[transitions[members]]], labels[members]


def pattern_machine(pattern: Sequence[int], vocab_size: int) -> IntArray:
    """Return the table of Knuth, Morris and Pratt (1977): in state k the last tokens were the first k of the pattern."""
    size = len(pattern)
    transitions = np.zeros((size + 1, vocab_size), dtype=np.int64)
    transitions[size] = size
    fallback = 0  # the state after pattern[1:k]
    for k, token in enumerate(pattern):
        transitions[k] = transitions[fallback] if k else 0
        if k:
            fallback = int(transitions[fallback, token])
        transitions[k, token] = k + 1
    return transitions


def product_machine(first: IntArray, second: IntArray, start: tuple[int, int]) -> tuple[IntArray, IntArray]:
    """Return the transitions of two automata run in parallel, and the pair of states that each state is, shape (D, 2)."""
    pairs, token_class = np.unique(np.concatenate([first, second]), axis=1, return_inverse=True)
    left, right = pairs[: len(first)].tolist(), pairs[len(first) :].tolist()
    transitions, states = explored(start, lambda s: list(zip(left[s[0]], right[s[1]], strict=True)))
    return transitions[:, token_class.ravel()], np.array(states, dtype=np.int64)


def levenshtein_machine(target: Sequence[int], cap: int, vocab_size: int) -> tuple[IntArray, IntArray]:
    """Return the automaton whose states are rows of the edit-distance table, and the distance of each, at most cap + 1.

    A state holds min(cap + 1, distance between the tokens read and each prefix of the target). Larger entries are not
    needed, since entries along a row differ by at most 1 (Wagner and Fischer 1974; Schulz and Mihov 2002).
    """
    symbols = sorted(set(target))
    limit = cap + 1

    def step(row: tuple[int, ...], symbol: int | None) -> tuple[int, ...]:
        new = [min(row[0] + 1, limit)]
        for i, wanted in enumerate(target):
            new.append(min(row[i] + (wanted != symbol), row[i + 1] + 1, new[i] + 1, limit))
        return tuple(new)

    start = tuple(min(i, limit) for i in range(len(target) + 1))
    by_class, rows = explored(start, lambda row: [step(row, symbol) for symbol in [None, *symbols]])
    token_class = np.zeros(vocab_size, dtype=np.int64)
    token_class[symbols] = np.arange(1, len(symbols) + 1)
    return by_class[:, token_class], np.array([row[-1] for row in rows], dtype=np.int64)
