"""Priors as chains of states, as backward messages need them: dense n-gram tables and hidden Markov models.

A chain has H states. It moves by drawing one of J *arrivals*, each of which is a token and the state it leads to; M[h, j]
is the probability of arrival j in state h. All sums over next tokens are then products with the matrix M, which need not be
stored: for a bigram M is its table, for a back-off model it is sparse, for an HMM it is transitions times emissions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bayes_klrl.models.ngram_lm.hmm import HmmLM
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.models.ngram_lm.tables import DenseTable
from bayes_klrl.typing import FloatArray, IntArray, State, TokenIds
from bayes_klrl.weights import logsumexp

__all__ = ["Chain", "DenseChain", "HmmChain"]


class Chain(Protocol):
    """The matrix M of a prior, and the map from the prior's decoding states to states of the chain."""

    num_states: int
    """Number of states, H."""
    arrival_states: IntArray
    """The state that each arrival leads to, shape (J,)."""
    arrival_tokens: IntArray
    """The token of each arrival, shape (J,)."""
    least_log_prob: float
    """The smallest finite entry of log M."""

    def expect(self, values: FloatArray) -> tuple[FloatArray, NDArray[np.bool_] | None]:
        """Return sum_j M[h, j] values[j, k], shape (H, K), for values (J, K).

        The second result, bool (H, K), marks sums of non-negative values that lost more than four digits to cancellation; None
        if no sum did.
        """

    def expect_log(self, values: FloatArray) -> FloatArray | None:
        """Return sum_a p(a | h) log p(a | h) values[j(a), k], shape (H, K); None if a token has several arrivals j."""

    def collect(self, mass: FloatArray) -> FloatArray:
        """Return sum_h M[h, j] mass[h, k], shape (J, K), for mass (H, K)."""

    def row(self, state: int) -> tuple[FloatArray, IntArray]:
        """Return log M[h, j] and j of all arrivals j that can follow state h, shape (m,) each."""

    def beliefs(self, prior_state: State) -> tuple[IntArray, FloatArray]:
        """Return the chain's possible states and their log-probabilities, (R, m) each, given the prior's decoding state."""

    def log_terms(self, prior_state: State, log_values: FloatArray, columns: IntArray) -> FloatArray:
        """Return log sum over arrivals j by token a of M[., j] exp(log_values[j, column]), shape (R, V).

        Parameters
        ----------
        prior_state
            The prior's decoding state of R rows.
        log_values
            Log values of arrivals, shape (J, D).
        columns
            The column of `log_values` that each row uses, shape (R,).
        """

    def prefix_state(self, prompt_ids: Sequence[TokenIds], prompt_index: IntArray, prefixes: IntArray) -> State:
        """Return the prior's decoding state of R rows, after the prompt and the prefix (R, t) of each."""


class DenseChain:
    """An n-gram table as a chain: a state is a context, an arrival is the next context (for n = 1 the token).

    Contexts are numbered in base V, oldest token first; `M` is stored as (S, A, V): S numbers of all but the oldest token,
    A oldest tokens, V next tokens.
    """

    def __init__(self, prior: NgramLM, table: DenseTable) -> None:
        size, order = table.vocab_size, table.order
        self._prior, self._size = prior, size
        self._log_rows: FloatArray = table.log_probs.reshape(-1, size)
        self.num_states = len(self._log_rows)
        self._num_suffixes = size ** max(order - 2, 0)
        self.arrival_states = np.arange(self.num_states) if order > 1 else np.zeros(size, dtype=np.int64)
        self.arrival_tokens = np.tile(np.arange(size), self._num_suffixes)
        finite = self._log_rows[np.isfinite(self._log_rows)]
        self.least_log_prob = float(finite.min())
        by_oldest = np.exp(self._log_rows).reshape(-1, self._num_suffixes, size)
        self._probs = np.ascontiguousarray(by_oldest.swapaxes(0, 1))

    @cached_property
    def _plogp(self) -> FloatArray:
        """All entries of p log p, in the shape of `_probs`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self._probs > 0, self._probs * np.log(self._probs), 0.0)

    def expect(self, values: FloatArray) -> tuple[FloatArray, None]:
        """See `Chain.expect`."""
        return self._times(self._probs, values), None

    def expect_log(self, values: FloatArray) -> FloatArray:
        """See `Chain.expect_log`."""
        return self._times(self._plogp, values)

    def _times(self, matrix: FloatArray, values: FloatArray) -> FloatArray:
        """Return sum_a matrix[s, h, a] values[s a, k] as (H, K)."""
        product: FloatArray = matrix @ values.reshape(self._num_suffixes, self._size, -1)
        return product.swapaxes(0, 1).reshape(self.num_states, -1)

    def collect(self, mass: FloatArray) -> FloatArray:
        """See `Chain.collect`."""
        by_suffix = mass.reshape(-1, self._num_suffixes, mass.shape[1]).swapaxes(0, 1)
        collected: FloatArray = self._probs.swapaxes(1, 2) @ by_suffix
        return collected.reshape(-1, mass.shape[1])

    def row(self, state: int) -> tuple[FloatArray, IntArray]:
        """See `Chain.row`."""
        return self._log_rows[state], self._arrivals(np.array([state]))[0]

    def beliefs(self, prior_state: IntArray) -> tuple[IntArray, FloatArray]:
        """See `Chain.beliefs`; the context is known, so there is one state."""
        states = self._numbers(prior_state)[:, None]
        return states, np.zeros(states.shape)

    def log_terms(self, prior_state: IntArray, log_values: FloatArray, columns: IntArray) -> FloatArray:
        """See `Chain.log_terms`."""
        states = self._numbers(prior_state)
        if self._num_suffixes == 1:
            values = log_values.T[columns]
        else:
            values = log_values[self._arrivals(states), columns[:, None]]
        values += self._log_rows[states]
        return values

    def prefix_state(self, prompt_ids: Sequence[TokenIds], prompt_index: IntArray, prefixes: IntArray) -> IntArray:
        """See `Chain.prefix_state`."""
        return ngram_state(self._prior, prompt_ids, prompt_index, prefixes)

    def _numbers(self, contexts: IntArray) -> IntArray:
        """Return the number of each context, shape (R,)."""
        width = contexts.shape[1]
        numbers: IntArray = contexts @ self._size ** np.arange(width - 1, -1, -1, dtype=np.int64)
        return numbers

    def _arrivals(self, states: IntArray) -> IntArray:
        """Return the arrival by each token from each state, shape (R, V)."""
        arrivals: IntArray = (states % self._num_suffixes)[:, None] * self._size + np.arange(self._size)
        return arrivals


def ngram_state(prior: NgramLM, prompt_ids: Sequence[TokenIds], prompt_index: IntArray, prefixes: IntArray) -> IntArray:
    """Return the last n - 1 tokens of each prompt with its prefix, shape (R, n - 1)."""
    width = prior.order - 1
    before = prior.prefill(prompt_ids)[prompt_index]
    read = np.concatenate([before, prefixes[:, max(0, prefixes.shape[1] - width) :]], axis=1)
    return read[:, read.shape[1] - width :]


class HmmChain:
    """A hidden Markov model as a chain: a state is the hidden z_t after its token was emitted, and the last one is the start.

    By arrival z V + a the hidden state becomes z and emits a, so that M[h, (z, a)] = A[h, z] E[z, a] (theory.md 5.4).
    """

    def __init__(self, prior: HmmLM) -> None:
        num, size = prior.emissions.shape
        self._prior, self._shape = prior, (num, size)
        self.num_states = num + 1
        self.arrival_states = np.repeat(np.arange(num), size)
        self.arrival_tokens = np.tile(np.arange(size), num)
        with np.errstate(divide="ignore"):
            self._log_steps, self._log_emissions = np.log(prior.steps), np.log(prior.emissions)
        self.least_log_prob = float(
            self._log_steps[prior.steps > 0].min() + self._log_emissions[prior.emissions > 0].min()
        )

    def expect(self, values: FloatArray) -> tuple[FloatArray, None]:
        """See `Chain.expect`."""
        emitted = (self._prior.emissions[:, None, :] @ values.reshape(*self._shape, -1))[:, 0]
        expected: FloatArray = self._prior.steps @ emitted
        return expected, None

    def expect_log(self, values: FloatArray) -> None:
        """See `Chain.expect_log`; None, because p0(x) is a sum over hidden paths."""
        return

    def collect(self, mass: FloatArray) -> FloatArray:
        """See `Chain.collect`."""
        arrived = self._prior.steps.T @ mass
        collected: FloatArray = self._prior.emissions[:, :, None] * arrived[:, None, :]
        return collected.reshape(-1, mass.shape[1])

    def row(self, state: int) -> tuple[FloatArray, IntArray]:
        """See `Chain.row`."""
        log_row = (self._log_steps[state][:, None] + self._log_emissions).ravel()
        return log_row, np.arange(log_row.size)

    def beliefs(self, prior_state: FloatArray) -> tuple[IntArray, FloatArray]:
        """See `Chain.beliefs`; these are the filter's probabilities of hidden states."""
        with np.errstate(divide="ignore"):
            log_filter = np.log(prior_state)
        return np.tile(np.arange(self.num_states), (len(prior_state), 1)), log_filter

    def log_terms(self, prior_state: FloatArray, log_values: FloatArray, columns: IntArray) -> FloatArray:
        """See `Chain.log_terms`."""
        hidden = prior_state @ self._prior.steps
        log_terms = np.empty((len(prior_state), self._shape[1]))
        for column in np.unique(columns):
            rows = np.flatnonzero(columns == column)
            log_joint = self._log_emissions + log_values[:, column].reshape(self._shape)
            shift = log_joint.max(axis=0)
            shift = np.where(np.isfinite(shift), shift, 0.0)
            with np.errstate(divide="ignore"):
                log_terms[rows] = np.log(hidden[rows] @ np.exp(log_joint - shift)) + shift
                lost = rows[(log_terms[rows] < shift - 600).any(axis=1)]
                for row in lost:  # the terms differ by more than float64 can hold: sum them in logs
                    log_terms[row] = logsumexp((np.log(hidden[row])[:, None] + log_joint).T)
        return log_terms

    def prefix_state(self, prompt_ids: Sequence[TokenIds], prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Chain.prefix_state`."""
        state = self._prior.prefill(prompt_ids)[prompt_index]
        for t in range(prefixes.shape[1]):
            state = self._prior.append(state, prefixes[:, t])
        return state
