"""Rewards and constraints that an automaton computes, and products of them as one automaton.

r(x) = sum_t r_a(d_t, x_t) + r_T(d_final),      d_{t+1} = delta(d_t, x_t)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.batch import Batch
from bayes_klrl.errors import BayesKLRLError, RewardError
from bayes_klrl.likelihood import Factor, Likelihood, check_alpha_and_bounds, check_nats
from bayes_klrl.models.automata.automaton import Automaton
from bayes_klrl.models.automata.tables import minimal, product_machine
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["AutomatonConstraint", "AutomatonPotential", "AutomatonReward", "automaton_potential"]


class _AutomatonFactor(Factor):
    """A factor that is a function of the states that an automaton visits."""

    automaton: Automaton

    @property
    def label(self) -> str:
        """The given name, or the name of the class."""
        return self.name or type(self).__name__

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`: the automaton must read the prior's tokens."""
        if prior.vocab_size != self.automaton.vocab_size:
            raise RewardError(
                f"{self.label!r} has an automaton over {self.automaton.vocab_size} tokens, the prior has "
                f"{prior.vocab_size}. Build it with vocab_size={prior.vocab_size}."
            )


@dataclass(frozen=True, eq=False)
class AutomatonReward(_AutomatonFactor):
    """The likelihood exp(r(x) / alpha) of a reward that is a sum over the transitions of an automaton.

        r(x) = sum_t r_a(d_t, x_t) + r_T(d_final),      d_{t+1} = delta(d_t, x_t)

    It is an ordinary likelihood for every algorithm. With an n-gram or hidden Markov prior, and if all other factors are
    automata too, `Exact` solves its posterior at any length.

    Parameters
    ----------
    automaton
        The automaton, with D states over V tokens.
    token_rewards
        r_a, the reward of each token: shape (V,), or (D, V) if it depends on the state before the token. None: zero.
    final_rewards
        r_T, the reward of the state after the last token, shape (D,). None: zero. -inf is legal in both.
    alpha, bounds, name
        The KL coefficient, the declared range of r and the name in tables and errors, as for `Reward`.

    Raises
    ------
    BayesKLRLError
        If a shape does not fit the automaton, or a reward is NaN or +inf.

    Examples
    --------
    Reward 1 for an even number of zeros, on a prior that never ends before 100 tokens:

    >>> import bayes_klrl as bk
    >>> even = bk.Automaton.counts(0, modulo=2, vocab_size=2)
    >>> reward = bk.AutomatonReward(even, final_rewards=[1.0, 0.0], alpha=0.5)
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> exact = bk.Exact(num_draws=10).run(bk.Posterior(coin, reward, max_new_tokens=100), seed=0)
    >>> bool(np.isclose(exact.log_evidence[0], np.log((np.exp(2) + 1) / 2)))
    True
    """

    automaton: Automaton
    token_rewards: ArrayLike | None = field(default=None, kw_only=True)
    final_rewards: ArrayLike | None = field(default=None, kw_only=True)
    alpha: float = field(kw_only=True)
    bounds: tuple[float, float] | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_automaton(self.automaton)
        check_alpha_and_bounds(self)
        shape = self.automaton.transitions.shape
        token_rewards = _rewards("token_rewards", self.token_rewards, (shape[1:], shape))
        object.__setattr__(self, "token_rewards", _frozen(np.broadcast_to(token_rewards, shape)))
        object.__setattr__(self, "final_rewards", _frozen(_rewards("final_rewards", self.final_rewards, (shape[:1],))))
        for name in ("token_rewards", "final_rewards"):
            check_nats(getattr(self, name), self.alpha, f"{name} of {self.label}")

    def tempered(self, gamma: float) -> AutomatonReward:
        """Return the same reward at alpha / gamma."""
        return AutomatonReward(
            self.automaton,
            token_rewards=self.token_rewards,
            final_rewards=self.final_rewards,
            alpha=self.alpha / gamma,
            bounds=self.bounds,
            name=self.name,
        )

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`."""
        states = self.automaton.states(batch.tokens, batch.lengths)
        total: FloatArray = np.asarray(self.final_rewards)[states[:, -1]]
        paid = np.asarray(self.token_rewards)
        if paid.any():
            counted = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
            total = total + np.where(counted, paid[states[:, :-1], batch.tokens], 0.0).sum(axis=1)
        return self.checked(total, batch)


@dataclass(frozen=True, eq=False)
class AutomatonConstraint(_AutomatonFactor):
    """The likelihood 1[the automaton ends in an accepting state], a hard constraint without alpha.

    Parameters
    ----------
    automaton
        The automaton, with D states over V tokens.
    accepting
        The states that fulfil the constraint; None: the accepting states of the automaton.
    name
        The name in tables and errors.

    Raises
    ------
    BayesKLRLError
        If no state accepts.

    Examples
    --------
    Completions of 3 tokens without two zeros in a row:

    >>> import bayes_klrl as bk
    >>> never_00 = bk.AutomatonConstraint(bk.Automaton.forbids([0, 0], vocab_size=2))
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> exact = bk.Exact().run(bk.Posterior(coin, never_00, max_new_tokens=3), seed=0)
    >>> bool(np.isclose(exact.log_evidence[0], np.log(5 / 8)))
    True
    """

    automaton: Automaton
    accepting: Collection[int] | None = None
    name: str | None = field(default=None, kw_only=True)
    alpha: None = field(default=None, init=False)
    bounds: tuple[float, float] = field(default=(-np.inf, 0.0), init=False)

    def __post_init__(self) -> None:
        _check_automaton(self.automaton)
        given = self.automaton.accepting if self.accepting is None else self.accepting
        checked = Automaton(self.automaton.transitions, self.automaton.start, given).accepting
        if not checked:
            raise BayesKLRLError(
                "An AutomatonConstraint needs accepting states: give `accepting`, or an automaton that has some."
            )
        object.__setattr__(self, "accepting", checked)

    @property
    def log_values(self) -> FloatArray:
        """0 for accepting states, -inf for others, shape (D,)."""
        accepted = np.isin(np.arange(self.automaton.num_states), np.array(self.accepting))
        return np.where(accepted, 0.0, -np.inf)

    def tempered(self, gamma: float) -> AutomatonConstraint:
        """Return itself: 0 and 1 to any positive power are 0 and 1."""
        return self

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`."""
        return self.log_values[self.automaton.final_states(batch.tokens, batch.lengths)]


@dataclass(frozen=True, eq=False)
class AutomatonPotential:
    """A log-likelihood in nats as weights on one automaton: sum_t token[d_t, x_t] + final[d_final].

    Parameters
    ----------
    transitions
        The next states, shape (D, V); state 0 is the start.
    token
        The weight of each token in each state, in nats, shape (D, V).
    final
        The weight of the state after the last token, in nats, shape (D,).
    """

    transitions: Any
    token: FloatArray
    final: FloatArray

    def scaled(self, power: float) -> AutomatonPotential:
        """Return the log-likelihood times a positive power; -inf stays -inf."""
        return AutomatonPotential(self.transitions, power * self.token, power * self.final)

    def times(self, other: AutomatonPotential) -> AutomatonPotential:
        """Return the sum of two log-likelihoods on the product of their automata."""
        transitions, pairs = product_machine(self.transitions, other.transitions, (0, 0))
        left, right = pairs.T
        return AutomatonPotential(
            transitions, self.token[left] + other.token[right], self.final[left] + other.final[right]
        ).minimal()

    def minimal(self) -> AutomatonPotential:
        """Return the same log-likelihood on the smallest automaton; all states of likelihood 0, for example, become one."""
        weights, which = np.unique(np.column_stack([self.final, self.token]), axis=0, return_inverse=True)
        transitions, kept = minimal(self.transitions, which.ravel())
        return AutomatonPotential(transitions, weights[kept, 1:], weights[kept, 0])


def automaton_potential(likelihood: Likelihood) -> AutomatonPotential | None:
    """Return a likelihood as log-potentials of one automaton, in nats; None if a factor has no automaton.

    Factors may have different alphas: each one's reward is divided by its own alpha.

    Examples
    --------
    >>> even = AutomatonReward(Automaton.counts(0, modulo=2, vocab_size=3), final_rewards=[1, 0], alpha=0.5)
    >>> never_2 = AutomatonConstraint(Automaton.forbids([2], vocab_size=3))
    >>> automaton_potential(even * never_2).final.tolist()
    [2.0, -inf, 0.0]
    """
    whole: AutomatonPotential | None = None
    for factor in likelihood.factors:
        if isinstance(factor, AutomatonReward):
            weights = (np.asarray(factor.token_rewards) / factor.alpha, np.asarray(factor.final_rewards) / factor.alpha)
        elif isinstance(factor, AutomatonConstraint):
            weights = (np.zeros(factor.automaton.transitions.shape), factor.log_values)
        else:
            return None
        part = AutomatonPotential(*_from_start(factor.automaton, *weights)).minimal()
        whole = part if whole is None else whole.times(part)
    return whole


def _from_start(automaton: Automaton, token: FloatArray, final: FloatArray) -> tuple[Any, FloatArray, FloatArray]:
    """Return (transitions, token, final) restricted to the states that can be reached, the start first."""
    loop = np.zeros((1, automaton.vocab_size), dtype=np.int64)
    transitions, pairs = product_machine(automaton.transitions, loop, (automaton.start, 0))
    return transitions, token[pairs[:, 0]], final[pairs[:, 0]]


def _check_automaton(automaton: object) -> None:
    """Refuse anything but an `Automaton`."""
    if not isinstance(automaton, Automaton):
        raise BayesKLRLError(f"The first argument must be a bk.Automaton; got {automaton!r}.")


def _rewards(what: str, given: ArrayLike | None, shapes: tuple[tuple[int, ...], ...]) -> FloatArray:
    """Return rewards as float64 of one of the shapes, zeros if none are given; refuse NaN and +inf."""
    try:
        rewards = np.zeros(shapes[0]) if given is None else np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise BayesKLRLError(f"{what} must be an array of numbers; got {given!r}.") from None
    if rewards.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise BayesKLRLError(f"{what} must have shape {expected}; got {rewards.shape}.")
    bad = np.isnan(rewards) | np.isposinf(rewards)
    if bad.any():
        raise BayesKLRLError(
            f"{what} must be finite or -inf; got {rewards[bad][0]} at {tuple(np.argwhere(bad)[0].tolist())}."
        )
    return rewards


def _frozen(array: FloatArray) -> FloatArray:
    """Return a read-only copy."""
    copy = array.copy()
    copy.setflags(write=False)
    return copy
