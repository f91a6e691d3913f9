"""Problem P13: a proxy learned from preferences, and the true reward when the proxy is optimised (Gao et al. 2022).

    P(x preferred to x') = sigmoid(g(x) - g(x')),     r(x) = w . f(x),  w fitted to n such pairs of prior draws (Bradley-Terry)

Along the proxy's posteriors p*_b, b = 1 / alpha, the gold reward moves by d E[g] / db = Cov(g, r) (theory.md 1.6): it rises
while the two agree where the posterior is, and peaks at the b where their covariance crosses 0. Here all of it is enumerated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import enumerated_posterior
from bayes_klrl.models.automata.automaton import Automaton
from bayes_klrl.models.automata.reward import AutomatonReward
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems.gold import BOUNDS_SLACK, gold_table
from bayes_klrl.randomness import generator
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp, normalised

__all__ = [
    "Overoptimisation",
    "OveroptimisationCurve",
    "bradley_terry",
    "gold_reward",
    "overoptimisation",
    "token_counts",
]

_EOS = 3
_TEXT = (0, 1, 2)
_ANY = Automaton(np.zeros((1, 4), dtype=np.int64))  # counts need no memory
_HALVINGS = 80


@dataclass(frozen=True, eq=False)
class OveroptimisationCurve:
    """Both rewards along p*_b, as arrays over the given values of b.

    Parameters
    ----------
    b
        1 / alpha.
    proxy, gold
        The mean rewards E[r] and E[g].
    covariance
        Cov(g, r) = d E[g] / db.
    kl
        KL(p*_b || p0), in nats.
    """

    b: FloatArray
    proxy: FloatArray
    gold: FloatArray
    covariance: FloatArray
    kl: FloatArray


@dataclass(frozen=True, eq=False)
class Overoptimisation:
    """Problem P13, solved: the proxy's posterior, and the gold reward that it is judged by.

    Parameters
    ----------
    posterior
        Prior x exp(proxy / alpha).
    weights
        w, shape (3,): what the proxy pays for each of the tokens 0, 1, 2.
    enumeration
        Every completion, with its prior log-prob and proxy reward.
    gold
        g of each, shape (M,).
    """

    posterior: Posterior
    weights: FloatArray
    enumeration: Draws
    gold: FloatArray

    def curve(self, b: ArrayLike) -> OveroptimisationCurve:
        """Return both rewards at inverse temperatures b, shape (B,)."""
        grid = np.atleast_1d(np.asarray(b, dtype=np.float64))
        proxy, log_prior = self.enumeration.reward[0], self.enumeration.log_prior[0]
        log_joint = log_prior + grid[:, None] * proxy
        weights = normalised(log_joint)
        mean_proxy, mean_gold = weights @ proxy, weights @ self.gold
        covariance = weights @ (proxy * self.gold) - mean_proxy * mean_gold
        kl = grid * mean_proxy - logsumexp(log_joint)
        return OveroptimisationCurve(grid, mean_proxy, mean_gold, covariance, kl)

    def peak(self, largest: float = 1e3) -> float:
        """Return the first b at which Cov(g, r) crosses 0 from above, where the gold reward peaks; inf if it never does.

        Parameters
        ----------
        largest
            The largest b that is searched.
        """
        grid = np.concatenate([[0.0], np.geomspace(1e-3, largest, 400)])
        signs = self.curve(grid).covariance
        after = np.flatnonzero((signs[:-1] > 0) & (signs[1:] <= 0))
        if not after.size:
            return np.inf
        low, high = grid[after[0]], grid[after[0] + 1]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.curve(middle).covariance[0] > 0 else (low, middle)
        return float(high)


def overoptimisation(
    num_pairs: int = 200, *, alpha: float = 0.1, max_new_tokens: int = 8, penalty: float = 0.2, seed: int = 0
) -> Overoptimisation:
    """Return problem P13.

    Parameters
    ----------
    num_pairs
        n, the number of preferences between prior draws: the fewer there are, the more of the proxy is noise.
    alpha
        The alpha of the proxy's posterior; the default is past the peak, over-optimised.
    max_new_tokens
        T; fewer than 3**T completions are enumerated.
    penalty
        The penalty in `gold_reward`: a larger one makes many 2s bad sooner. The proxy is linear and cannot express it.
    seed
        Seed for the pairs and the preferences.

    Examples
    --------
    >>> problem = overoptimisation()
    >>> 0 < problem.peak() < 1 / problem.posterior.alpha
    True
    """
    check_count("num_pairs", num_pairs)
    check_positive("alpha", alpha)
    check_count("max_new_tokens", max_new_tokens, least=2)
    if max_new_tokens > 12:
        raise BayesKLRLError(
            f"max_new_tokens must be at most 12, since 3**T completions are enumerated; got {max_new_tokens}."
        )
    prior = NgramLM(gold_table(-0.5), eos_token_id=_EOS)
    everything = enumerated_posterior(_proxy_posterior(prior, np.zeros(3), 1.0, max_new_tokens), method="enumeration")
    tokens, lengths = everything.tokens[0], everything.lengths[0]
    features, gold = token_counts(tokens, lengths), gold_reward(tokens, lengths, penalty)
    rng = generator(seed)
    pairs = rng.choice(len(gold), size=(num_pairs, 2), p=normalised(everything.log_prior)[0])
    first_wins = rng.random(num_pairs) < 1 / (1 + np.exp(gold[pairs[:, 1]] - gold[pairs[:, 0]]))
    winners, losers = np.where(first_wins, pairs.T, pairs.T[::-1])
    weights = bradley_terry(features[winners] - features[losers])
    posterior = _proxy_posterior(prior, weights, alpha, max_new_tokens)
    return Overoptimisation(posterior, weights, enumerated_posterior(posterior, method="enumeration"), gold)


def gold_reward(tokens: IntArray, lengths: IntArray, penalty: float = 0.2) -> FloatArray:
    """Return g(x) = #2 - penalty (#2)^2 + 1["0, and right after it 1"], shape (N,): 2s are good, too many are not.

    Examples
    --------
    >>> gold_reward(np.array([[2, 2, 0, 1], [2, 2, 2, 2]]), np.array([4, 4]))
    array([2.2, 0.8])
    """
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    twos = ((tokens == 2) & inside).sum(axis=1)
    pattern = ((tokens[:, :-1] == 0) & (tokens[:, 1:] == 1) & inside[:, 1:]).any(axis=1)
    gold: FloatArray = twos - penalty * twos**2 + pattern
    return gold


def bradley_terry(differences: FloatArray, precision: float = 0.1) -> FloatArray:
    """Return argmax_w of sum_i log sigmoid(w . d_i) - precision |w|^2 / 2, by Newton's method, shape (J,).

    Parameters
    ----------
    differences
        f(winner) - f(loser) of each pair, shape (n, J).
    precision
        The precision of a Gaussian prior on w; without it, separable pairs would send w to infinity.
    """
    check_positive("precision", precision)
    weights = np.zeros(differences.shape[1])

    def objective(at: FloatArray) -> float:
        return float(-np.logaddexp(0.0, -differences @ at).sum() - precision * at @ at / 2)

    for _ in range(100):
        surprise = 1 / (1 + np.exp(differences @ weights))
        gradient = differences.T @ surprise - precision * weights
        if np.abs(gradient).max() < 1e-10:
            break
        curvature = (differences * (surprise * (1 - surprise))[:, None]).T @ differences
        step, size = np.linalg.solve(curvature + precision * np.eye(len(weights)), gradient), 1.0
        while objective(weights + size * step) < objective(weights) and size > 1e-9:
            size /= 2
        weights = weights + size * step
    return weights


def token_counts(tokens: IntArray, lengths: IntArray) -> FloatArray:
    """Return how often each of the tokens 0, 1, 2 occurs, shape (N, 3)."""
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    return np.stack([((tokens == a) & inside).sum(axis=1) for a in _TEXT], axis=1).astype(np.float64)


def _proxy_posterior(prior: NgramLM, weights: FloatArray, alpha: float, max_new_tokens: int) -> Posterior:
    """Return the posterior of the reward w . f, which an automaton pays token by token."""
    paid = np.append(weights, 0.0)
    bounds = (max_new_tokens * float(paid.min()) - BOUNDS_SLACK, max_new_tokens * float(paid.max()) + BOUNDS_SLACK)
    proxy = AutomatonReward(_ANY, token_rewards=paid, alpha=alpha, bounds=bounds, name="proxy of preferences")
    return Posterior(prior, proxy, max_new_tokens=max_new_tokens)
