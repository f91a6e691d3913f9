"""Problem P13 with an uncertain proxy: the gold reward when the proxy is optimised, by the treatment of its uncertainty.

Along b = 1 / alpha, each of plug-in, cut, joint and conservative (theory.md 1.10) has its posteriors; E[g] and KL to the prior
are enumerated, theta comes from NUTS, and data sets are averaged over.

What to expect: E_theta E_q[r_theta] is linear in q, so that no policy of the same KL has more of it than the plug-in
posterior, p0 exp(b E_theta r_theta). Where the model can express the gold reward, cut therefore earns less of it on average;
what it keeps is the spread, which the plug-in hides: the worst of the data sets lose less by it where b is large. The
conservative target leaves the average too, away from where theta is unknown, and earns more than all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.problems.preferences import Overoptimisation, overoptimisation, token_counts
from bayes_klrl.randomness import generator
from bayes_klrl.reward_models.features import TokenFeatures
from bayes_klrl.reward_models.model import RewardModel
from bayes_klrl.reward_models.posterior import RewardPosterior
from bayes_klrl.reward_models.preferences import Preferences
from bayes_klrl.reward_models.targets import reward_target_weights
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import normalised

__all__ = ["TARGETS", "GoldStudy", "UncertainProxy", "gold_study", "uncertain_proxy"]

TARGETS = ("conservative", "plug-in", "cut", "joint")
Knows = Literal["counts", "gold"]
_NUM_DRAWS = 500
"""Of each chain: many more than the weights that are used, and a study fits many data sets."""
_GRID = np.concatenate([[0.0], np.geomspace(0.1, 30.0, 31)])


@dataclass(frozen=True, eq=False)
class UncertainProxy:
    """One data set of P13: the posterior of the proxy, and everything enumerated.

    Completions with the same features and the same gold reward are one of M classes: no target tells them apart.

    Parameters
    ----------
    fit
        The posterior of the proxy's weights.
    rewards
        r_theta of each class minus its prior mean, shape (S, M).
    log_prior, gold
        Prior log-probability and gold reward of each class, shape (M,).
    """

    fit: RewardPosterior
    rewards: FloatArray
    log_prior: FloatArray
    gold: FloatArray

    def weights(self, target: str, b: float) -> FloatArray:
        """Return the target's probability of each class at b = 1 / alpha, shape (M,)."""
        if target not in TARGETS:
            raise BayesKLRLError(f"target must be one of {TARGETS}; got {target!r}.")
        if b == 0:
            return normalised(self.log_prior)
        rewards, kind = self.rewards, target
        if target == "conservative":
            rewards, kind = (rewards.mean(axis=0) - rewards.std(axis=0))[None], "plug-in"
        options: Any = {"target": kind, "log_weights": self.log_prior}
        return reward_target_weights(rewards, alpha=1.0 / b, **options)

    def curve(self, target: str, b: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return KL to the prior, E[g] and E_theta E[r_theta] at each b, shape (B,) each."""
        rows = [self.weights(target, float(each)) for each in np.atleast_1d(np.asarray(b, dtype=np.float64))]
        mean = self.rewards.mean(axis=0)
        kl = [float(w[w > 0] @ (np.log(w[w > 0]) - self.log_prior[w > 0])) for w in rows]
        return np.array(kl), np.array([w @ self.gold for w in rows]), np.array([w @ mean for w in rows])


@dataclass(frozen=True, eq=False)
class GoldStudy:
    """The gold reward of each target along b, over D data sets.

    Parameters
    ----------
    b
        1 / alpha, shape (B,).
    kl, gold
        KL to the prior and E[g], by target, shape (D, B).
    num_pairs
        Preferences of each data set.
    knows
        "gold" or "counts": the rewards that the proxy's features can express, see `uncertain_proxy`.
    """

    b: FloatArray
    kl: Mapping[str, FloatArray]
    gold: Mapping[str, FloatArray]
    num_pairs: int
    knows: str

    def at_kl(self, target: str, kl: ArrayLike) -> FloatArray:
        """Return E[g] of each data set at given KLs, (D, K), linear between the b's; NaN past what the target reaches."""
        wanted = np.atleast_1d(np.asarray(kl, dtype=np.float64))
        curves = zip(self.kl[target], self.gold[target], strict=True)
        return np.stack([np.interp(wanted, x, y, right=np.nan) for x, y in curves])

    def gain(self, target: str, over: str, kl: float) -> tuple[float, float]:
        """Return how much more gold one target has than another at equal KL, mean over data sets and standard error."""
        difference = (self.at_kl(target, kl) - self.at_kl(over, kl))[:, 0]
        known = difference[np.isfinite(difference)]
        if known.size < 2:
            raise BayesKLRLError(f"Fewer than two data sets reach a KL of {kl} by both {target!r} and {over!r}.")
        return float(known.mean()), float(known.std(ddof=1) / np.sqrt(known.size))

    def plot(self, file: str | Path) -> Path:
        """Draw gold against KL and against b into a PNG, and return the file."""
        from picture import plot_gold_study

        return plot_gold_study(self, file)

    def __str__(self) -> str:
        kls = np.array([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
        lines = [
            f"Gold reward, mean of {len(self.gold['cut'])} data sets of {self.num_pairs} preferences; features: {self.knows}",
            "at a KL to the prior of " + "".join(f"{kl:8.2f}" for kl in kls) + "   best   worst tenth at b = 30",
        ]
        for name in TARGETS:
            gold, at = self.gold[name], self.at_kl(name, kls)
            reached = [bool(np.isfinite(column).all()) for column in at.T]
            cells = "".join(f"{m:8.2f}" if ok else "       -" for m, ok in zip(at.mean(axis=0), reached, strict=True))
            lines.append(f"{name:24}{cells}{gold.max(axis=1).mean():7.2f}{np.quantile(gold[:, -1], 0.1):12.2f}")
        return "\n".join(lines)


def uncertain_proxy(
    num_pairs: int = 30,
    *,
    knows: Knows = "gold",
    num_thetas: int = 100,
    max_new_tokens: int = 8,
    penalty: float = 0.2,
    seed: int = 0,
) -> UncertainProxy:
    """Return one data set of P13 with the posterior of its proxy.

    Parameters
    ----------
    num_pairs
        Preferences between prior draws that features can tell apart.
    knows
        "gold": the features can express the gold reward (counts, the square of one, the pattern); "counts": they are P13's own
        counts, and the proxy cannot know that there can be too much of a good thing.
    num_thetas
        S.
    max_new_tokens, penalty
        The options of the same names of `overoptimisation`.
    seed
        Seed for the pairs, the preferences and the chains.
    """
    check_count("num_pairs", num_pairs, least=2)
    if knows not in get_args(Knows):
        raise BayesKLRLError(f"knows must be one of {get_args(Knows)}; got {knows!r}.")
    task = _task(max_new_tokens, penalty)
    tokens, lengths = task.enumeration.tokens[0], task.enumeration.lengths[0]
    log_prior = task.enumeration.log_prior[0]
    features = token_counts if knows == "counts" else gold_features
    raw = features(tokens, lengths)
    rng = generator(seed)
    pairs = _distinct_pairs(raw, normalised(log_prior), num_pairs, rng)
    first = rng.random(num_pairs) < 1 / (1 + np.exp(task.gold[pairs[:, 1]] - task.gold[pairs[:, 0]]))
    winners, losers = np.where(first, pairs.T, pairs.T[::-1])
    texts = [[tuple(tokens[i, : lengths[i]].tolist()) for i in side] for side in (winners, losers)]
    data = Preferences([()] * num_pairs, texts[0], texts[1])
    model = RewardModel(TokenFeatures(features), num_draws=_NUM_DRAWS, num_warmup=_NUM_DRAWS)
    fit = model.fit(task.posterior.prior, data, seed=seed)
    classes, of_each = np.unique(np.column_stack([raw, task.gold]), axis=0, return_inverse=True)
    mass = np.bincount(of_each.ravel(), weights=normalised(log_prior))
    rewards = fit.thetas(num_thetas) @ fit.features.standardised(classes[:, :-1]).T
    return UncertainProxy(fit, rewards - (rewards @ mass)[:, None], np.log(mass), classes[:, -1])


def gold_study(
    num_pairs: int = 30, *, seeds: Sequence[int], knows: Knows = "gold", b: ArrayLike = _GRID, **options: Any
) -> GoldStudy:
    """Return the gold reward along each target, for one data set per seed; the options are those of `uncertain_proxy`."""
    grid = np.sort(np.atleast_1d(np.asarray(b, dtype=np.float64)))
    kl: dict[str, list[FloatArray]] = {name: [] for name in TARGETS}
    gold: dict[str, list[FloatArray]] = {name: [] for name in TARGETS}
    for seed in seeds:
        proxy = uncertain_proxy(num_pairs, knows=knows, seed=seed, **options)
        for name in TARGETS:
            each = proxy.curve(name, grid)
            kl[name].append(each[0])
            gold[name].append(each[1])
    stacked_kl, stacked_gold = ({name: np.stack(rows) for name, rows in each.items()} for each in (kl, gold))
    return GoldStudy(grid, stacked_kl, stacked_gold, num_pairs, knows)


@lru_cache(maxsize=4)
def _task(max_new_tokens: int, penalty: float) -> Overoptimisation:
    """Return P13, of which the completions and their gold rewards are used."""
    return overoptimisation(max_new_tokens=max_new_tokens, penalty=penalty)


def gold_features(tokens: IntArray, lengths: IntArray) -> FloatArray:
    """Return the counts, the square of that of 2, and whether 0 and right after it 1 occurs, shape (N, 5)."""
    counts = token_counts(tokens, lengths)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    pattern = ((tokens[:, :-1] == 0) & (tokens[:, 1:] == 1) & inside[:, 1:]).any(axis=1)
    result: FloatArray = np.column_stack([counts, counts[:, 2] ** 2, pattern])
    return result


def _distinct_pairs(features: FloatArray, probs: FloatArray, num: int, rng: np.random.Generator) -> IntArray:
    """Return pairs of draws that the features can tell apart, shape (num, 2)."""
    kept = np.empty((0, 2), dtype=np.int64)
    while len(kept) < num:
        pairs = rng.choice(len(probs), size=(num, 2), p=probs)
        kept = np.concatenate([kept, pairs[(features[pairs[:, 0]] != features[pairs[:, 1]]).any(axis=1)]])
    return kept[:num]
