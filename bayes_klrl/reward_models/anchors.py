"""What the rewards of an ensemble amount to under the prior: log Z_theta(c), by which the cut posterior divides.

    Z_theta(c) = E_p0[exp(r_theta(x) / alpha) phi(x)],   phi the other factors of the likelihood

by enumeration where there are few completions, else from one frozen pool of prior draws. A pool's error is a fixed one: the
target is then the mixture of the p*_theta with weights Z_theta / Z-hat_theta in place of equal ones, off by the standard
error of log Z-hat_theta each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.batch import Batch
from bayes_klrl.errors import BayesKLRLError, SupportError
from bayes_klrl.inference.exact.enumeration import all_sequences, num_sequences
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.reward_models.features import FeatureMap
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import effective_sample_size, log_evidence_se, logsumexp

__all__ = ["Anchors", "measured_anchors", "posterior_batch"]

_LEAST_ESS = 10  # below it an estimate is refused (theory.md 7.1)
_STREAM = 18  # of the pool, apart from an algorithm's own


@dataclass(frozen=True, eq=False)
class Anchors:
    """What S rewards amount to under the prior, for each of P prompts.

    Parameters
    ----------
    log_evidence
        log Z_theta(c), shape (P, S).
    log_evidence_se
        Its standard error, 0 by enumeration, shape (P, S).
    ess
        How many draws from p*_theta the pool is worth, infinite by enumeration, shape (P, S).
    mean
        E_p0[r_theta], shape (P, S).
    exact
        Whether all completions were enumerated.
    """

    log_evidence: FloatArray
    log_evidence_se: FloatArray
    ess: FloatArray
    mean: FloatArray
    exact: bool

    def check_ess(self, alpha: float) -> None:
        """Refuse log Z_theta that too few draws of the pool count for.

        Raises
        ------
        BayesKLRLError
            Naming the theta, its effective sample size and the cures.
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
    """Return the anchors of r_theta = theta . z, thetas (S, J).

    Parameters
    ----------
    base
        Prior, prompts, and the other factors as its likelihood.
    features
        Completions to standardised features z.
    num_draws, seed
        Of the pool.
    most
        How many completions are enumerated at most, over all prompts.
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
        rewards = thetas @ features(posterior_batch(base, pool, p)).T  # (S, N)
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


def posterior_batch(posterior: Posterior, x: Sequences, p: int | None = None) -> Batch:
    """Return completions (P, N, T) of a posterior's prompts as feature functions see them; those of prompt `p` only."""
    prompts = np.arange(posterior.num_prompts) if p is None else np.array([p])
    return Batch(
        x.tokens[prompts].reshape(-1, x.tokens.shape[2]),
        x.lengths[prompts].ravel(),
        np.repeat(prompts, x.lengths.shape[1]),
        posterior.prompts,
        posterior.columns,
        posterior.prior,
    )
