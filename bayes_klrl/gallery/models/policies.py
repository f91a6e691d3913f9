"""Policies that do not see where they are, and the exact distribution over them that `bk.BayesianSVI` approximates.

Such a policy is one softmax over the four moves, with logits phi, used at every step. Its ELBO is a sum over how often a walk
makes each move, so the generalised posterior

    P(phi) prop. to Normal(phi; 0, prior_scale^2) exp(n ELBO(p_phi))

can be summed over a grid. Adding a constant to all logits changes nothing, so the grid has three dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bayes_klrl.gallery.models.worlds import Grid
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import logsumexp, normalised

__all__ = ["StatelessPolicies"]

_HALF_WIDTH, _POINTS = 4.5, 46  # of the grid, in prior standard deviations
_BASIS = np.linalg.svd(np.eye(4) - 0.25)[0][:, :3]  # of the logits that sum to 0


@dataclass(frozen=True)
class StatelessPolicies:
    """The distribution over the logits phi of stateless policies.

    Parameters
    ----------
    grid
        The gridworld.
    rewards
        The reward of each square in nats, shape (S,).
    weight
        n, the weight of the ELBO.
    prior_scale
        Standard deviation of each logit under the prior.
    """

    grid: Grid
    rewards: FloatArray
    weight: float
    prior_scale: float

    @cached_property
    def _counts(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """How often each kind of walk makes each move, (C, 4), the number of its walks and the sum of their rewards, (C,)."""
        actions = self.grid.all_actions
        per_walk = (actions[..., None] == np.arange(4)).sum(axis=1)
        kinds, which = np.unique(per_walk, axis=0, return_inverse=True)
        paid = self.rewards[self.grid.squares_of(actions)].sum(axis=1)
        which = which.ravel()
        return kinds.astype(float), np.bincount(which).astype(float), np.bincount(which, weights=paid).astype(float)

    def reward_and_entropy(self, phi: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return E[r] and the entropy of a walk, of policies with logits phi (R, 4), shape (R,) each."""
        kinds, _, paid = self._counts
        log_move = phi - logsumexp(phi)[:, None]
        entropy = -self.grid.steps * (np.exp(log_move) * log_move).sum(axis=1)
        return np.exp(log_move @ kinds.T) @ paid, entropy

    def elbo(self, phi: FloatArray) -> FloatArray:
        """Return the ELBO of policies with logits phi (R, 4), shape (R,)."""
        reward, entropy = self.reward_and_entropy(phi)
        elbo: FloatArray = reward + entropy - self.grid.steps * np.log(4)
        return elbo

    def summary(self, phi: FloatArray, probs: FloatArray) -> dict[str, float]:
        """Return what a distribution over policies says, given as points phi (R, 4) with probabilities (R,)."""
        kinds, multiplicity, _ = self._counts
        reward, entropy = self.reward_and_entropy(phi)
        log_move = phi - logsumexp(phi)[:, None]
        average = probs @ np.exp(log_move @ kinds.T)  # q-bar of one walk of each kind
        information = -(multiplicity * average * np.log(average)).sum() - probs @ entropy
        mean = float(probs @ reward)
        return {
            "E[r] (nats)": mean,
            "sd of E[r] over policies (nats)": float(np.sqrt(probs @ np.square(reward - mean))),
            "I(policy; walk) (nats)": float(information),
        }

    @cached_property
    def _grid(self) -> tuple[FloatArray, FloatArray]:
        """The points of the grid, (R, 4), and the log of prior mass x exp(n ELBO) at each, (R,)."""
        axis = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, _POINTS)
        z = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
        log_prior = -0.5 * np.square(z).sum(axis=1) + 3 * np.log((axis[1] - axis[0]) / np.sqrt(2 * np.pi))
        phi = self.prior_scale * z @ _BASIS.T
        return phi, log_prior + self.weight * self.elbo(phi)

    def truth(self) -> dict[str, float]:
        """Return the summary of the exact distribution."""
        phi, log_mass = self._grid
        return self.summary(phi, normalised(log_mass))

    def log_normaliser(self) -> float:
        """Return log E[exp(n ELBO(p_phi))] under the prior of phi."""
        return float(logsumexp(self._grid[1]))

    def of_gaussian(self, mu: FloatArray, sigma: FloatArray, seed: int, num_draws: int = 20_000) -> dict[str, float]:
        """Return the summary of Normal(mu, sigma^2), shape (4,) each, from draws, and its KL to the exact distribution."""
        phi = mu + sigma * np.random.default_rng(seed).normal(size=(num_draws, 4))
        variance = np.square(sigma / self.prior_scale)
        divergence = 0.5 * (variance + np.square(mu / self.prior_scale) - 1 - np.log(variance)).sum()
        bound = self.weight * float(self.elbo(phi).mean()) - float(divergence)
        found = self.summary(phi, np.full(num_draws, 1 / num_draws))
        return found | {"KL to the exact distribution (nats)": self.log_normaliser() - bound}
