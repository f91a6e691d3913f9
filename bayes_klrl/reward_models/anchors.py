"""The evidence log Z_theta(c) of each reward of an ensemble under the prior, by which the cut posterior divides.

    Z_theta(c) = E_p0[exp(r_theta(x) / alpha) phi(x)],   phi the other factors of the likelihood

by enumeration where there are few completions, otherwise from one fixed pool of prior draws. The error of a pool is fixed,
too: the target is then the mixture of the p*_theta with weights Z_theta / Z-hat_theta instead of equal weights, and the log of
each weight is wrong by about the standard error of log Z-hat_theta.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.batch import Batch
from bayes_klrl.errors import BayesKLRLError, SupportError
from bayes_klrl.inference.exact.enumeration import all_sequences, num_sequences
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.likelihood import check_nats
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.reward_models.features import FeatureMap
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import effective_sample_size, log_evidence_se, logsumexp

__all__ = ["Anchors", "measured_anchors", "posterior_batch"]

_LEAST_ESS = 10  # below it an estimate is refused (theory.md 7.1)
_STREAM = 18  # stream of the pool, apart from the streams of algorithms


@dataclass(frozen=True, eq=False)
class Anchors:
    """The evidence and the mean of S rewards under the prior, for each of P prompts.

    Parameters
    ----------
    log_evidence
        log Z_theta(c) in nats, shape (P, S).
    log_evidence_se
        The standard error of `log_evidence`, shape (P, S); 0 for an enumeration.
    ess
        Effective sample size of the pool for p*_theta, shape (P, S); infinite for an enumeration.
    mean
        E_p0[r_theta], in units of reward, shape (P, S).
    exact
        Whether all completions were enumerated.
    """

    log_evidence: FloatArray
    log_evidence_se: FloatArray
    ess: FloatArray
    mean: FloatArray
    exact: bool

    def check_ess(self, alpha: float) -> None:
        """Refuse estimates of log Z_theta that rest on too few effective draws of the pool.

        Raises
        ------
        BayesKLRLError
            If an effective sample size is below 10; the message names the theta, the number and the cures.
        """
        least = np.unravel_index(int(self.ess.argmin()), self.ess.shape)
        if self.ess[least] < _LEAST_ESS:
            p, s = (int(i) for i in least)
            raise BayesKLRLError(
                f"log Z of theta {s} for prompt {p} rests on {self.ess[least]:.1f} effective draws of the pool, fewer than "
                f"{_LEAST_ESS} ({int((self.ess < _LEAST_ESS).sum())} of {self.ess.size} do), so that the cut posterior is "
                f"unknown. Take a larger pool (num_draws=), or a larger alpha than {alpha:.4g}."
            )


def measured_anchors(
    base: Posterior, features: FeatureMap, thetas: FloatArray, alpha: float, *, num_draws: int, seed: int, most: int
) -> Anchors:
    """Return the anchors of the rewards r_theta = theta . z.

    Parameters
    ----------
    base
        The posterior whose likelihood holds the other factors only.
    features
        Function from completions to standardised features z.
    thetas
        The S draws of theta, shape (S, J).
    alpha
        Units of reward per nat.
    num_draws, seed
        Draws per prompt in the pool, and their seed.
    most
        The largest number of completions, over all prompts, that is enumerated; with more of them the pool is used.
    """
    prior = base.prior
    exact = num_sequences(prior.vocab_size, len(prior.eos_token_ids), base.max_new_tokens) * base.num_prompts <= most
    if exact:
        one = all_sequences(prior.vocab_size, prior.eos_token_ids, base.max_new_tokens)
        pool = Sequences(
            np.repeat(one.tokens, base.num_prompts, axis=0), np.repeat(one.lengths, base.num_prompts, axis=0)
        )
        log_prior, others = base.log_prior(pool), base.log_likelihood(pool)
    else:
        drawn = draw((prior,), base, num_draws, Streams.of(seed, _STREAM), description="pool", progress=False)
        pool, others = drawn.sequences, base.likelihood.log_likelihood(drawn.reward)
        log_prior = np.full(others.shape, -np.log(num_draws))
    shape = (base.num_prompts, len(thetas))
    log_z, ess, mean = np.empty(shape), np.empty(shape), np.empty(shape)
    for p in range(base.num_prompts):
        rewards = rewards_of(thetas, features, posterior_batch(base, pool, p), alpha)  # (S, N)
        log_w = log_prior[p] + others[p] + rewards / alpha
        log_z[p], ess[p] = logsumexp(log_w), effective_sample_size(log_w)
        mean[p] = rewards @ np.exp(log_prior[p])
    if np.isneginf(log_z).any():
        p = int(np.isneginf(log_z).any(axis=1).argmax())
        raise SupportError(
            f"No completion of prompt {p} that was seen is possible under the other factors: relax them."
        )
    se = np.zeros(shape) if exact else log_evidence_se(ess, num_draws)
    return Anchors(log_z, se, np.full(shape, np.inf) if exact else ess, mean, exact)


def rewards_of(
    thetas: FloatArray, features: FeatureMap, batch: Batch, alpha: float, label: str = "r_theta"
) -> FloatArray:
    """Return r_theta(x) of S thetas and M completions, shape (S, M); refuse what is more nats than float64 resolves."""
    with np.errstate(over="ignore", invalid="ignore"):
        rewards: FloatArray = thetas @ features(batch).T
    check_nats(np.nan_to_num(rewards, nan=np.inf, neginf=-np.finfo(np.float64).max), alpha, label, batch)
    return rewards


def posterior_batch(posterior: Posterior, x: Sequences, p: int | None = None) -> Batch:
    """Return completions (P, N, T) of a posterior as a batch for feature functions; only those of prompt `p` if given."""
    prompts = np.arange(posterior.num_prompts) if p is None else np.array([p])
    tokens = x.tokens[prompts].reshape(-1, x.tokens.shape[2])
    return posterior.batch(tokens, x.lengths[prompts].ravel(), np.repeat(prompts, x.lengths.shape[1]))
