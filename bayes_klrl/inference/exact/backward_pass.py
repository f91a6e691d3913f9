"""The backward recursion over (prior's state h, automaton's state d), in log space (theory.md 5.2).

    B_T(h, d) = r_T(d) / alpha
    B_t(h, d) = log sum_a p0(a | h) exp( r_a(d, a) / alpha + [a is EOS ? r_T(d') / alpha : B_{t+1}(h a, d')] ),
    d' = delta(d, a)

The sums of a step are products with the prior's matrix, in probabilities relative to the largest term of each d. Sums that
underflow or lose digits to cancellation are computed again term by term in logs, so every message has full precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayes_klrl.inference.exact.prior_chains import Chain
from bayes_klrl.models.automata.reward import AutomatonPotential
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp

__all__ = ["BackwardPass", "ExactCell", "Step", "StoredMessages"]

_LEAST_LOG = -600.0  # exp of less is close to the smallest float64
_LEAST = math.exp(_LEAST_LOG)


@dataclass(frozen=True, eq=False)
class ExactCell:
    """A sum that was computed term by term: B_t(state, column) = `log_total`.

    Parameters
    ----------
    state, column
        The prior's state h and the automaton's state d.
    arrivals, log_probs, weights
        The arrivals j from h, log M[h, j], and the share of each in the sum, shape (m,) each.
    log_total
        The log of the sum; -inf if nothing is possible.
    """

    state: int
    column: int
    arrivals: IntArray
    log_probs: FloatArray
    weights: FloatArray
    log_total: float


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the recursion, from B_{t+1} to B_t.

    Parameters
    ----------
    weights
        exp(log value of arrival j from automaton state d - shift of d), shape (J, D).
    totals
        sum_j M[h, j] weights[j, d], shape (H, D); 0 in the cells of `exact`.
    exact
        The cells for which this sum is not precise enough.
    message
        B_t, shape (H, D).
    """

    weights: FloatArray
    totals: FloatArray
    exact: tuple[ExactCell, ...]
    message: FloatArray


class BackwardPass:
    """The recursion for one prior and one likelihood; see the module.

    Parameters
    ----------
    chain
        The prior as a chain.
    potential
        The likelihood on an automaton.
    eos_token_ids
        The tokens that end a completion.
    """

    def __init__(self, chain: Chain, potential: AutomatonPotential, eos_token_ids: frozenset[int]) -> None:
        self.chain, self.potential = chain, potential
        self.num_columns = potential.final.size
        tokens = chain.arrival_tokens
        self.ends = np.isin(tokens, list(eos_token_ids))
        self.next_columns: IntArray = potential.transitions.T[tokens]
        self.log_paid: FloatArray = potential.token.T[tokens]
        self.log_paid[self.ends] += potential.final[self.next_columns[self.ends]]
        # an ended completion has no future value: it reads the 0 that is appended to the messages
        after = chain.arrival_states[:, None] * self.num_columns + self.next_columns
        self.after = np.where(self.ends[:, None], chain.num_states * self.num_columns, after)

    @property
    def last_message(self) -> FloatArray:
        """The message B_T, shape (H, D)."""
        return np.tile(self.potential.final, (self.chain.num_states, 1))

    def gather(self, values: FloatArray) -> FloatArray:
        """Return values[h', d'] of the cell that arrival j leads to from d, (J, D), for values (H, D); 0 if the token ends."""
        gathered: FloatArray = np.append(values, 0.0)[self.after]
        return gathered

    def log_values(self, next_message: FloatArray) -> FloatArray:
        """Return the log value of arrival j from automaton state d, reward plus message, given B_{t+1}, shape (J, D)."""
        values = self.gather(next_message)
        values += self.log_paid
        return values

    def step(self, next_message: FloatArray) -> Step:
        """Return the step from B_{t+1} to B_t."""
        log_values = self.log_values(next_message)
        shift = log_values.max(axis=0)
        shift = np.where(np.isfinite(shift), shift, 0.0)
        weights = log_values - shift
        np.exp(weights, out=weights)
        totals, doubtful = self.chain.expect(weights)
        small = totals < _LEAST
        if small.any():
            small &= self._out_of_range(log_values, shift)
            doubtful = small if doubtful is None else doubtful | small
        with np.errstate(divide="ignore", invalid="ignore"):
            message = np.log(totals) + shift
        exact = () if doubtful is None else tuple(self._exact_cells(doubtful, log_values))
        for cell in exact:
            message[cell.state, cell.column] = cell.log_total
            totals[cell.state, cell.column] = 0.0
        return Step(weights, totals, exact, message)

    def _out_of_range(self, log_values: FloatArray, shift: FloatArray) -> NDArray[np.bool_]:
        """Return the columns in which a term may have underflowed to 0, shape (D,)."""
        least = np.where(np.isfinite(log_values), log_values, np.inf).min(axis=0)
        with np.errstate(invalid="ignore"):
            outside: NDArray[np.bool_] = least - shift + self.chain.least_log_prob < _LEAST_LOG
        return outside

    def _exact_cells(self, doubtful: NDArray[np.bool_], log_values: FloatArray) -> Iterator[ExactCell]:
        """Yield the marked cells (H, D), summed in logs."""
        for state in np.flatnonzero(doubtful.any(axis=1)):
            log_probs, arrivals = self.chain.row(int(state))
            for column in np.flatnonzero(doubtful[state]):
                terms = log_probs + log_values[arrivals, column]
                log_total = float(logsumexp(terms))
                weights = np.exp(terms - log_total) if np.isfinite(log_total) else np.zeros(terms.shape)
                yield ExactCell(int(state), int(column), arrivals, log_probs, weights, log_total)


class StoredMessages:
    """The messages B_0, ..., B_T: all of them if they fit into memory, otherwise every sqrt(T)-th and the last stretch read.

    Parameters
    ----------
    backward
        The recursion.
    num_tokens
        Largest number of tokens, T.
    bytes_in_memory
        Largest size of all messages, in bytes, at which they are all kept.
    """

    def __init__(self, backward: BackwardPass, num_tokens: int, bytes_in_memory: int = 2**28) -> None:
        self._backward, self._num_tokens = backward, num_tokens
        message = backward.last_message
        fits = message.nbytes * (num_tokens + 1) <= bytes_in_memory
        self._stride = 1 if fits else math.isqrt(num_tokens) + 1
        self._kept = {num_tokens: message}
        self._stretch: dict[int, FloatArray] = {}
        for t in range(num_tokens - 1, -1, -1):
            message = backward.step(message).message
            if t % self._stride == 0:
                self._kept[t] = message

    def at(self, t: int) -> FloatArray:
        """Return B_t, shape (H, D); cheap if read in increasing or decreasing order of t."""
        if t in self._kept:
            return self._kept[t]
        if t not in self._stretch:
            end = min((t // self._stride + 1) * self._stride, self._num_tokens)
            message = self._kept[end]
            self._stretch = {}
            for s in range(end - 1, t // self._stride * self._stride, -1):
                message = self._backward.step(message).message
                self._stretch[s] = message
        return self._stretch[t]
