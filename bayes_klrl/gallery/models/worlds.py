"""Gridworlds as language models over actions: exact values, distances and walks for any reward of the squares.

A token is one of four moves, a completion a walk of T steps, and a reward in nats belongs to every square that is entered
(alpha is 1). All actions are equally probable under the prior. With a reward r the soft values and the posterior are

    V_t(s) = log mean_a exp(r(s') + V_{t+1}(s')),     V_T = 0,     pi_t(a | s) = 1/4 exp(r(s') + V_{t+1}(s') - V_t(s)),

and the distance of any policy q to the posterior is log Z - ELBO(q), both by messages. S is the number of squares; rewards
may have axes before theirs, such as the draws of a belief.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import bayes_klrl as bk
from bayes_klrl.inference.exact.enumeration import all_sequences
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["MOVES", "Arrows", "Grid"]

MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # up, down, left, right


class Arrows:
    """A tokenizer that writes a walk as arrows.

    Examples
    --------
    >>> Arrows().decode([0, 3, 1]), Arrows().encode("←↑")
    ('↑→↓', [2, 0])
    """

    characters = "↑↓←→"
    eos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Return the action of every arrow."""
        return [self.characters.index(arrow) for arrow in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return an arrow for every action."""
        return "".join(self.characters[action] for action in ids)


@dataclass(frozen=True)
class Grid:
    """A square grid, whose border keeps a walk inside.

    Parameters
    ----------
    side
        Number of rows and of columns; S = side**2.
    steps
        T, the number of steps of a walk.
    start
        The square on which a walk begins.
    """

    side: int
    steps: int
    start: int = 0

    @cached_property
    def places(self) -> IntArray:
        """Row and column of each square, shape (S, 2)."""
        return np.stack(np.divmod(np.arange(self.side**2), self.side), axis=1)

    @cached_property
    def after(self) -> IntArray:
        """The square that each action leads to, shape (S, 4)."""
        there = np.clip(self.places[:, None] + MOVES, 0, self.side - 1)
        squares: IntArray = there[..., 0] * self.side + there[..., 1]
        return squares

    def values(self, rewards: FloatArray) -> FloatArray:
        """Return V_t(s) for rewards (..., S) in nats, shape (..., T + 1, S)."""
        values = np.zeros((*rewards.shape[:-1], self.steps + 1, self.side**2))
        for t in reversed(range(self.steps)):
            gain = (rewards + values[..., t + 1, :])[..., self.after]
            top = gain.max(axis=-1)
            values[..., t, :] = top + np.log(np.exp(gain - top[..., None]).mean(axis=-1))
        return values

    def log_policy(self, rewards: FloatArray) -> FloatArray:
        """Return log pi_t(a | s) of the posterior under rewards (..., S), shape (..., T, S, 4)."""
        values = self.values(rewards)
        gain = (rewards[..., None, :] + values[..., 1:, :])[..., self.after]
        log_policy: FloatArray = gain - values[..., :-1, :, None] - np.log(4)
        return log_policy

    def elbo(self, log_policy: FloatArray, rewards: FloatArray) -> float:
        """Return E_q[r] - KL(q || p0) in nats of a policy (T, S, 4), under rewards (S,)."""
        elbo = np.zeros(self.side**2)
        for step in reversed(log_policy):
            elbo = (np.exp(step) * ((rewards + elbo)[self.after] - np.log(4) - step)).sum(axis=1)
        return float(elbo[self.start])

    def distance(self, log_policy: FloatArray, rewards: FloatArray) -> float:
        """Return KL(q || posterior) in nats of a policy (T, S, 4), where the rewards (S,) are true."""
        return float(self.values(rewards)[0, self.start]) - self.elbo(log_policy, rewards)

    def expected_reward(self, log_policy: FloatArray, rewards: FloatArray) -> float:
        """Return E_q[r] in nats of a policy (T, S, 4)."""
        value = np.zeros(self.side**2)
        for step in reversed(log_policy):
            value = (np.exp(step) * (rewards + value)[self.after]).sum(axis=1)
        return float(value[self.start])

    def walk(self, log_policy: FloatArray, rng: np.random.Generator) -> IntArray:
        """Return the squares that a walk drawn from a policy enters, shape (T,)."""
        squares, at = np.empty(self.steps, dtype=np.int64), self.start
        cumulative = np.exp(log_policy).cumsum(axis=-1)
        for t, uniform in enumerate(rng.random(self.steps)):
            action = min(int(np.searchsorted(cumulative[t, at], uniform, side="right")), 3)
            at = squares[t] = self.after[at, action]
        return squares

    @cached_property
    def all_actions(self) -> IntArray:
        """The actions of every walk, in the order of `bk.Exact`, shape (4**T, T): for walks of few steps."""
        actions: IntArray = all_sequences(4, (), self.steps).tokens[0]
        return actions

    def squares_of(self, actions: IntArray) -> IntArray:
        """Return the squares that walks enter, of actions (N, T), shape (N, T)."""
        squares, at = np.empty_like(actions), np.full(len(actions), self.start)
        for t, action in enumerate(actions.T):
            at = squares[:, t] = self.after[at, action]
        return squares

    def prior(self) -> bk.NgramLM:
        """Return the prior: every action is equally probable."""
        return bk.NgramLM(np.log(np.full(4, 0.25)), eos_token_id=None, tokenizer=Arrows())

    def posterior(self, rewards: FloatArray, name: str = "gridworld") -> bk.Posterior:
        """Return the posterior over walks under rewards (S,)."""
        paid = bk.AutomatonReward(
            bk.Automaton(self.after, start=self.start), token_rewards=rewards[self.after], alpha=1.0, name=name
        )
        return bk.Posterior(self.prior(), paid, max_new_tokens=self.steps)

    def policy(self, rewards: FloatArray) -> bk.LanguageModel:
        """Return the posterior under rewards (S,) as a language model."""
        return backward_messages(self.posterior(rewards)).policy()

    def twist(self, rewards: FloatArray) -> Callable[..., FloatArray]:
        """Return log psi of a prefix under rewards (S,): the reward so far, and the value of where it has led."""
        values = self.values(rewards)

        def twist(_posterior: bk.Posterior, _prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
            squares = self.squares_of(prefixes)
            at = squares[:, -1] if squares.shape[1] else np.full(len(prefixes), self.start)
            log_psi: FloatArray = rewards[squares].sum(axis=1) + values[squares.shape[1], at]
            return log_psi

        return twist
