"""Critics: what a prefix is worth, as the baseline of each token's gradient.

With V_t any function of the prefix x_1:t (V_0 its start, V at the end r / alpha) and l_t = log q_t - log p0_t, the increments
of SMC's log-weight are temporal differences, and their discounted sums are advantages:

    delta_t = V_t - V_(t-1) - l_t,      A_t = sum_k lambda^k delta_(t+k),
    grad ELBO ~ 1/N sum_n sum_t A_t grad log q(x_t | x_<t)

At lambda = 1 this is exact for every V that does not depend on the batch, since V_(t-1) is a baseline that depends on x_<t
alone. At any lambda it is exact where V is the log-weight to come, E_q[log w | x_1:t] (theory.md 2.14; Schulman et al. 2016).
A critic is a twist of SMC: alpha V is a value function of RL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import FloatArray, IntArray, Twist

__all__ = ["Critic", "Rows", "TwistCritic", "advantages"]


@dataclass(frozen=True, eq=False)
class Rows:
    """R completions of any prompts.

    Parameters
    ----------
    prompt_index
        Index of the prompt that each completion follows, shape (R,).
    tokens, lengths
        The tokens with filler past the lengths, (R, T), and the lengths, (R,).
    """

    prompt_index: IntArray
    tokens: IntArray
    lengths: IntArray

    @property
    def mask(self) -> np.ndarray:
        """True at the tokens of each completion, (R, T)."""
        inside: np.ndarray = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return inside


class Critic(Protocol):
    """What a training step asks of a critic."""

    def values(self, rows: Rows) -> FloatArray:
        """Return V of the prefix before each token, in nats, shape (R, T); what stands past a length is not used."""

    def learn(self, rows: Rows, log_ratio: FloatArray, log_likelihood: FloatArray) -> None:
        """Learn from completions whose values were used.

        Parameters
        ----------
        rows
            The completions.
        log_ratio
            l_t = log q_t - log p0_t of each token, 0 past the lengths, shape (R, T).
        log_likelihood
            r / alpha of each completion in nats, shape (R,).
        """


def advantages(
    values: FloatArray, log_ratio: FloatArray, log_likelihood: FloatArray, lengths: IntArray, discount: float
) -> FloatArray:
    """Return A_t of every token, 0 past the lengths, shape (R, T).

    Parameters
    ----------
    values, log_ratio, log_likelihood
        As in `Critic`.
    lengths
        The lengths of the completions, (R,).
    discount
        lambda, in [0, 1].

    Examples
    --------
    With lambda = 1 the values cancel but for the one before the token:

    >>> values, ratio = np.array([[1.0, 2.0, 9.0]]), np.array([[0.5, 0.25, 0.0]])
    >>> advantages(values, ratio, np.array([4.0]), np.array([2]), 1.0)
    array([[2.25, 1.75, 0.  ]])
    """
    num_tokens = values.shape[1]
    inside = np.arange(num_tokens) < lengths[:, None]
    is_last = np.arange(num_tokens) == lengths[:, None] - 1
    after = np.concatenate([values[:, 1:], values[:, -1:]], axis=1)
    delta = np.where(inside, np.where(is_last, log_likelihood[:, None], after) - values - log_ratio, 0.0)
    found = np.zeros_like(delta)
    running = np.zeros(len(delta))
    for t in range(num_tokens - 1, -1, -1):
        running = delta[:, t] + discount * running
        found[:, t] = running
    return np.where(inside, found, 0.0)


class TwistCritic:
    """A fitted twist as a critic; it does not learn. V of the empty prefix is the twist's start value."""

    def __init__(self, twist: Twist, posterior: Posterior) -> None:
        self._twist, self._posterior = twist, posterior

    def values(self, rows: Rows) -> FloatArray:
        """See `Critic.values`."""
        found = np.zeros(rows.tokens.shape)
        for t in range(rows.tokens.shape[1]):
            there = np.flatnonzero(rows.lengths > t)
            if there.size:
                found[there, t] = self._twist(self._posterior, rows.prompt_index[there], rows.tokens[there, :t])
        return found

    def learn(self, rows: Rows, log_ratio: FloatArray, log_likelihood: FloatArray) -> None:
        """See `Critic.learn`."""
