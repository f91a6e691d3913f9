"""What an agent believes about the reward of squares that it sees with noise: two exact posteriors.

`GaussianBelief` is a Gaussian last layer, that is Bayesian linear regression on features phi of a square, with a reward and
noise of sd `strength` nats:

    r(s) = strength phi(s) . w,    w ~ Normal(0, I),    y = r(s) + strength e,    p(w | data) = Normal(A^-1 b, A^-1),

A = I + sum phi phi^T and b = sum phi y / strength. `FiniteBelief` has W possible worlds, and a probability for each by Bayes'
rule; `DrawnWorlds` are draws of it, as the weights of a `bk.EnsembleReward`. Rewards are arrays over the S squares, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import bayes_klrl as bk
from bayes_klrl.gallery.models.worlds import Grid
from bayes_klrl.reward_models.features import FeatureMap
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import normalised

__all__ = ["DrawnWorlds", "FiniteBelief", "GaussianBelief"]


@dataclass
class GaussianBelief:
    """The Gaussian posterior of w, and an ensemble of regressions with randomised priors (Osband et al. 2018).

    Member k is regressed from a prior draw of its own to rewards with noise of its own. So it is a draw of the posterior, too,
    but one that stays the same agent from walk to walk.

    Parameters
    ----------
    features
        phi of each square, shape (S, F).
    strength
        Standard deviation of the noise, and scale of the reward, in nats.
    rng
        Generator of the draws and of the ensemble.
    num_members
        K, the size of the ensemble.
    """

    features: FloatArray
    strength: float
    rng: np.random.Generator
    num_members: int = 10
    precision: FloatArray = field(init=False)  # A, (F, F)
    shift: FloatArray = field(init=False)  # b, (F,)
    members: FloatArray = field(init=False)  # b of each member, (K, F)

    def __post_init__(self) -> None:
        num_features = self.features.shape[1]
        self.precision, self.shift = np.eye(num_features), np.zeros(num_features)
        self.members = self.rng.normal(size=(self.num_members, num_features))

    def see(self, squares: IntArray, observed: FloatArray) -> None:
        """Learn from the squares of a walk and their noisy rewards, shape (T,) each."""
        phi, scaled = self.features[squares], observed / self.strength
        self.precision = self.precision + phi.T @ phi
        self.shift = self.shift + scaled @ phi
        self.members = self.members + (scaled + self.rng.normal(size=(self.num_members, len(squares)))) @ phi

    def mean(self) -> FloatArray:
        """Return the posterior mean of the reward of each square, shape (S,)."""
        return self._rewards(self.shift)

    def sd(self) -> FloatArray:
        """Return the posterior standard deviation of the reward of each square, shape (S,)."""
        variance = (self.features * np.linalg.solve(self.precision, self.features.T).T).sum(axis=1)
        sd: FloatArray = self.strength * np.sqrt(variance)
        return sd

    def draws(self, num: int) -> FloatArray:
        """Return rewards drawn from the posterior, shape (num, S)."""
        root = np.linalg.cholesky(self.precision)
        return self._rewards(self.shift + self.rng.normal(size=(num, len(root))) @ root.T)

    def ensemble(self) -> FloatArray:
        """Return the rewards that the members believe in, shape (K, S)."""
        return self._rewards(self.members)

    def _rewards(self, shifts: FloatArray) -> FloatArray:
        """Return strength phi . A^-1 b of each b (..., F)."""
        rewards: FloatArray = self.strength * (np.linalg.solve(self.precision, shifts.T).T @ self.features.T)
        return rewards


@dataclass
class FiniteBelief:
    """The probability of each of W possible worlds, equal before anything was seen.

    Parameters
    ----------
    worlds
        The rewards of each world, shape (W, S).
    noise
        Standard deviation of the noise, in nats.
    """

    worlds: FloatArray
    noise: float
    log_weights: FloatArray = field(init=False)  # unnormalised, (W,)

    def __post_init__(self) -> None:
        self.log_weights = np.zeros(len(self.worlds))

    def see(self, squares: IntArray, observed: FloatArray) -> None:
        """Learn from the squares of a walk and their noisy rewards, shape (T,) each."""
        misses = (observed - self.worlds[:, squares]) / self.noise
        self.log_weights = self.log_weights - 0.5 * np.square(misses).sum(axis=1)

    @property
    def weights(self) -> FloatArray:
        """The probability of each world, shape (W,)."""
        return normalised(self.log_weights)


@dataclass(frozen=True)
class DrawnWorlds:
    """Worlds drawn from a belief, as the uncertain weights theta of a `bk.EnsembleReward`: r_theta(x) = theta . visits(x).

    Parameters
    ----------
    grid
        The gridworld.
    rewards
        The rewards of each drawn world, shape (draws, S).
    features
        How often a walk enters each square.
    """

    grid: Grid
    rewards: FloatArray
    features: FeatureMap
    from_preferences: bool = False

    @classmethod
    def of(cls, grid: Grid, belief: FiniteBelief, num: int, seed: int) -> DrawnWorlds:
        """Return `num` draws of a belief."""
        drawn = np.random.default_rng(seed).choice(len(belief.worlds), size=num, p=belief.weights)
        squares = np.arange(grid.side**2)

        def visits(tokens: IntArray, lengths: IntArray) -> FloatArray:  # noqa: ARG001
            counts: FloatArray = (grid.squares_of(tokens)[..., None] == squares).sum(axis=1).astype(float)
            return counts

        as_they_are = FeatureMap(bk.TokenFeatures(visits), np.zeros(len(squares)), None, np.ones(len(squares)))
        return cls(grid, belief.worlds[drawn], as_they_are)

    def thetas(self, num: int | None = None) -> FloatArray:
        """Return the first `num` draws."""
        return self.rewards[:num]

    def mixture(self) -> bk.MixtureLM:
        """Return the average of the posteriors of the drawn worlds."""
        worlds, counts = np.unique(self.rewards, axis=0, return_counts=True)
        return bk.MixtureLM([self.grid.policy(each) for each in worlds], counts.astype(float))
