"""A proxy learned from few preferences in problem P13, with everything enumerated along b = 1 / alpha.

Completions of equal features and equal gold reward are one of M classes: no target tells them apart. S draws of theta from
NUTS give the rewards r_theta; the plug-in reward r is their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.problems.preferences import Overoptimisation, token_counts
from bayes_klrl.reward_models.targets import reward_target_weights
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp, normalised

__all__ = ["GRID", "TARGETS", "Proxy", "divergence", "gold_features", "learned"]

GRID = np.concatenate([[0.0], np.geomspace(0.05, 30.0, 60)])  # b
TARGETS = ("plug-in", "cut", "joint", "conservative")


def gold_features(tokens: IntArray, lengths: IntArray) -> FloatArray:
    """Return counts, the square of that of token 2, and whether "0 1" occurs, (N, 5): they can express the gold reward."""
    counts = token_counts(tokens, lengths)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    pattern = ((tokens[:, :-1] == 0) & (tokens[:, 1:] == 1) & inside[:, 1:]).any(axis=1)
    return np.column_stack([counts, counts[:, 2] ** 2, pattern]).astype(float)


def learned(problem: Overoptimisation, features: Any, num_pairs: int, seed: int) -> bk.RewardPosterior:
    """Return the posterior of a proxy from preferences between draws of the prior that the features tell apart."""
    tokens, lengths = problem.enumeration.tokens[0], problem.enumeration.lengths[0]
    rng, raw, pairs = np.random.default_rng(seed), features(tokens, lengths), np.empty((0, 2), dtype=int)
    while len(pairs) < num_pairs:
        more = rng.choice(len(tokens), size=(num_pairs, 2), p=normalised(problem.enumeration.log_prior[0]))
        pairs = np.concatenate([pairs, more[(raw[more[:, 0]] != raw[more[:, 1]]).any(axis=1)]])[:num_pairs]
    wins = rng.random(num_pairs) < 1 / (1 + np.exp(problem.gold[pairs[:, 1]] - problem.gold[pairs[:, 0]]))
    first, second = ([tokens[i, : lengths[i]].tolist() for i in side] for side in pairs.T)
    data = bk.Preferences.labelled([[]] * num_pairs, first, second, wins)
    model = bk.RewardModel(bk.TokenFeatures(features))
    return model.fit(problem.posterior.prior, data, seed=seed, accept_unconverged=True)


@dataclass(frozen=True, eq=False)
class Proxy:
    """One data set: r_theta less its prior mean (S, M), log prior and gold reward (M,) of each class of completions."""

    rewards: FloatArray
    log_prior: FloatArray
    gold: FloatArray

    @classmethod
    def of(cls, problem: Overoptimisation, fit: bk.RewardPosterior, features: Any, num_thetas: int = 100) -> Proxy:
        """Return the classes of a fit."""
        raw = features(problem.enumeration.tokens[0], problem.enumeration.lengths[0])
        classes, which = np.unique(np.column_stack([raw, problem.gold]), axis=0, return_inverse=True)
        mass = np.bincount(which.ravel(), weights=normalised(problem.enumeration.log_prior[0]))
        rewards = fit.thetas(num_thetas) @ fit.features.standardised(classes[:, :-1]).T
        return cls(rewards - (rewards @ mass)[:, None], np.log(mass), classes[:, -1])

    def target(self, name: str) -> FloatArray:
        """Return the probability of each class along b under a target, (B, M)."""
        rewards, kind = self.rewards, name
        if name == "conservative":
            rewards, kind = (rewards.mean(axis=0) - rewards.std(axis=0))[None], "plug-in"
        options: Any = {"target": kind, "log_weights": self.log_prior}
        return np.stack([reward_target_weights(rewards * b, alpha=1.0, **options) for b in GRID])

    @cached_property
    def mean(self) -> FloatArray:
        """The plug-in reward r of each class, (M,)."""
        return np.asarray(self.rewards.mean(axis=0))

    @cached_property
    def plug_in(self) -> FloatArray:
        """The plug-in posterior of each class along b, (B, M)."""
        return self.target("plug-in")

    @property
    def kl(self) -> FloatArray:
        """KL of the plug-in policy to the prior along b, (B,)."""
        return divergence(self.plug_in, np.exp(self.log_prior))

    @property
    def gain(self) -> FloatArray:
        """The gold reward of the plug-in policy less the prior's, along b, (B,)."""
        along = self.plug_in @ self.gold
        gain: FloatArray = along - along[0]
        return gain

    def alarms(self) -> dict[str, FloatArray]:
        """Return each alarm's number along b, (B,); the gold reward is not read."""
        each = normalised(self.log_prior + GRID[:, None, None] * self.rewards)  # p*_theta, (B, S, M)
        cut = each.mean(axis=1)
        means = each @ self.mean
        within = (each @ np.square(self.mean) - np.square(means)).mean(axis=1)
        q = self.plug_in
        covariance = (q * (self.mean - (q @ self.mean)[:, None])) @ self.rewards.T  # (B, S)
        evidence = [logsumexp(self.log_prior + factor * GRID[:, None] * self.mean) for factor in (1, 2)]
        return {
            "certificate": divergence(q, cut),
            "share": means.var(axis=1) / (means.var(axis=1) + within),
            "information": divergence(each, cut[:, None]).mean(axis=1),
            "turn-over": (covariance < 0).mean(axis=1),
            "ESS": evidence[1] - 2 * evidence[0],  # log(N / ESS) of N draws of the prior
        }


def divergence(p: FloatArray, q: FloatArray) -> FloatArray:
    """Return KL(p || q) in nats over the last axis."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    total: FloatArray = terms.sum(axis=-1)
    return total
