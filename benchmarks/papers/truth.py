"""The exact numbers of a guide on a posterior whose M completions are enumerated: both KLs, reward, entropy, frontier gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import bayes_klrl as bk
from bayes_klrl.inference.exact.enumeration import all_sequences
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.typing import FloatArray, LanguageModel
from bayes_klrl.weights import logsumexp

__all__ = ["EnumeratedTruth", "best_of_n_law", "entropy", "kl"]

_HALVINGS = 80


def kl(log_q: FloatArray, log_p: FloatArray) -> float:
    """Return KL(q || p) in nats of two laws on the same M completions; q may have zeros.

    Examples
    --------
    >>> round(kl(np.log([0.5, 0.5]), np.log([0.25, 0.75])), 4)
    0.1438
    """
    some = np.isfinite(log_q)
    return float((np.exp(log_q[some]) * (log_q[some] - log_p[some])).sum())


def entropy(log_q: FloatArray) -> float:
    """Return -E_q[log q] in nats."""
    some = np.isfinite(log_q)
    return float(-(np.exp(log_q[some]) * log_q[some]).sum())


def best_of_n_law(reward: FloatArray, n: int, log_prior: FloatArray) -> FloatArray:
    """Return log p_n(x) = log p0(x) + log((F^n - F-^n) / (F - F-)), F the prior's distribution function of the reward, (M,).

    Examples
    --------
    >>> np.exp(best_of_n_law(np.array([0.0, 1.0]), 2, np.log([0.5, 0.5])))
    array([0.25, 0.75])
    """
    _, level = np.unique(reward, return_inverse=True)
    mass = np.bincount(level, weights=np.exp(log_prior))
    upper = np.minimum(mass.cumsum() / mass.sum(), 1.0)
    lower = np.concatenate([[0.0], upper[:-1]])
    with np.errstate(divide="ignore"):  # far below the best level the law is 0 in float64
        log_ratio = np.log(upper**n - lower**n) - np.log(mass)
    log_law: FloatArray = log_prior + log_ratio[level]
    return log_law


@dataclass(frozen=True, eq=False)
class EnumeratedTruth:
    """A posterior of one prompt, enumerated.

    Parameters
    ----------
    posterior
        The posterior.
    sequences
        Its M completions, shape (1, M, T).
    log_prior, reward, log_posterior
        log p0(x), r(x) and log p*(x), shape (M,) each.
    log_evidence
        log Z, in nats.
    """

    posterior: bk.Posterior
    sequences: bk.Sequences
    log_prior: FloatArray
    reward: FloatArray
    log_posterior: FloatArray
    log_evidence: float

    @classmethod
    def of(cls, posterior: bk.Posterior) -> EnumeratedTruth:
        """Return the truth about a posterior with one prompt."""
        prior = posterior.prior
        sequences = all_sequences(prior.vocab_size, prior.eos_token_ids, posterior.max_new_tokens)
        log_prior, reward = posterior.log_prior(sequences)[0], posterior.reward(sequences)[0]
        log_joint = log_prior + reward / posterior.alpha
        log_evidence = float(logsumexp(log_joint))
        return cls(posterior, sequences, log_prior, reward, log_joint - log_evidence, log_evidence)

    def log_probs(self, lm: LanguageModel) -> FloatArray:
        """Return log q(x) of every completion, shape (M,)."""
        log_q: FloatArray = completion_log_probs(lm, self.posterior.prompt_ids, self.sequences)[0]
        return log_q

    def both_kls(self, lm: LanguageModel) -> tuple[float, float]:
        """Return KL(q || p*) and KL(p* || q) in nats."""
        log_q = self.log_probs(lm)
        return kl(log_q, self.log_posterior), kl(self.log_posterior, log_q)

    def mean_reward(self, log_q: FloatArray) -> float:
        """Return E_q[r]."""
        return float(np.exp(log_q) @ self.reward)

    def tilted(self, inverse_alpha: float) -> FloatArray:
        """Return log p*_b of every completion at b = `inverse_alpha`, shape (M,)."""
        log_joint = self.log_prior + inverse_alpha * self.reward
        log_p: FloatArray = log_joint - logsumexp(log_joint)
        return log_p

    def frontier_kl(self, reward: float) -> float:
        """Return K(b) with R(b) = `reward`: the least KL to the prior at which a policy can earn it (theory.md 1.6)."""
        largest = 500.0 / float(np.ptp(self.reward))
        low, high = -largest, largest
        for _ in range(_HALVINGS):  # R(b) grows in b
            middle = (low + high) / 2
            low, high = (middle, high) if self.mean_reward(self.tilted(middle)) < reward else (low, middle)
        return kl(self.tilted(high), self.log_prior)

    def gap(self, log_q: FloatArray) -> float:
        """Return KL(q || p0) - K(b*), the nats that q paid beyond the price of its reward (theory.md 1.7)."""
        return kl(log_q, self.log_prior) - self.frontier_kl(self.mean_reward(log_q))
