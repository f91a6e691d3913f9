"""Quasi-rejection sampling: rejection with a bound that need not hold, and estimates of the resulting error.

    x ~ q,   w(x) = p0(x) exp(r(x) / alpha) / q(x),   accept with probability min(1, w(x) / B)
    output p_B(x) = min(p0(x) exp(r(x) / alpha), B q(x)) / Z_B,   acceptance rate Z_B / B

    TVD(p*, p_B) <= 1 - Z_B / Z,   KL(p_B || p*) <= log(Z / Z_B)                       (Eikema et al. 2022; theory.md 6.4)

A larger B gives draws closer to the posterior and accepts fewer of them: B trades quality against cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count, check_finite, check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.inference.sampling.accept_reject import accept_reject, check_max_proposals
from bayes_klrl.inference.sampling.drawing import Drawn
from bayes_klrl.inference.sampling.proposals import Proposal, resolve_proposal
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray

__all__ = ["QuasiRejection"]


@dataclass(frozen=True)
class QuasiRejection:
    """Independent draws from p_B, an approximation of the posterior, with estimates of its distance to the posterior.

    Parameters
    ----------
    num_draws
        Number of draws per prompt, N.
    bound
        log B in nats, any finite number, the same for all prompts. Where log w = log p0 + r / alpha - log q exceeds it,
        the posterior is cut down to B q. With the prior as proposal, r_max / alpha gives rejection sampling.
    proposal
        The model that proposes, as in `ImportanceSampling`.
    max_proposals
        The largest number of completions proposed per prompt.

    Notes
    -----
    `Draws.info` has these entries of shape (P,), estimated from all proposals: `acceptance_rate`, the mean of min(1, w / B);
    `tvd_bound`, 1 - Z_B / Z; `kl_bound`, log(Z / Z_B) in nats, which bounds KL(p_B || p*); `kl_prior`, KL(p_B || p0) in nats;
    `log_evidence_estimate`, the estimate of log Z; and `num_proposals` up to and including the N-th acceptance.

    These are importance-sampling estimates from q. If q hardly ever draws some mode of the posterior, the estimate of Z is too
    low and both bounds look better than they are, so they are not a certificate.

    Examples
    --------
    With B = exp(r_max / alpha) the draws are exact, and the bound on the total variation distance is 0.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> bk.QuasiRejection(5, bound=3.0).run(posterior, seed=0).info["tvd_bound"]
    array([0.])
    """

    num_draws: int
    bound: float
    proposal: Proposal = None
    max_proposals: int = 100_000

    def __post_init__(self) -> None:
        check_count("num_draws", self.num_draws)
        check_finite("bound", self.bound)
        check_max_proposals(self.max_proposals, self.num_draws)

    @property
    def rows_per_prompt(self) -> int:
        """Completions per prompt that are decoded at once; a prompt's draws do not depend on the others (`runners.blocks`)."""
        return self.num_draws

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; `log_proposal` is NaN, because the density of p_B contains the unknown log Z_B.

        Raises
        ------
        BudgetError
            If some prompt reaches `max_proposals` before its N-th acceptance. The error carries as many draws as all prompts
            have.
        """
        check_posterior_given(posterior)
        proposal, training = resolve_proposal(self.proposal, posterior, seed, progress)
        start = time.perf_counter()

        def log_weights(drawn: Drawn) -> FloatArray:
            log_proposal, log_prior = drawn.log_probs
            log_ratio = np.where(np.isneginf(log_prior), -np.inf, log_prior - log_proposal)
            weights: FloatArray = log_ratio + posterior.likelihood.log_likelihood(drawn.reward)
            return weights

        accepted = accept_reject(
            (proposal, posterior.prior),
            posterior,
            log_weights,
            float(self.bound),
            self.num_draws,
            self.max_proposals,
            Streams.of(seed),
            description="quasi-rejection",
            progress=progress,
        )
        cost = replace(training, seconds=time.perf_counter() - start)
        draws = accepted.draws(posterior, type(self).__name__, cost)
        # log Z - log Z_B from the same proposals, so negative only by rounding
        kl_bound = np.maximum(accepted.log_mean_weight - accepted.log_acceptance_rate - self.bound, 0.0)
        # log p_B - log p0 of the draws: log min(w, B) + log q - log p0 - log Z_B
        log_proposal, log_prior = accepted.log_probs
        log_ratio = np.minimum(draws.log_likelihood, self.bound + log_proposal - log_prior)
        kl_prior = log_ratio.mean(axis=1) - (accepted.log_acceptance_rate + self.bound)
        info = {
            "num_proposals": accepted.num_proposals,
            "kl_prior": kl_prior,
            "acceptance_rate": np.exp(accepted.log_acceptance_rate),
            "tvd_bound": 1.0 - np.exp(-kl_bound),
            "kl_bound": kl_bound,
            "log_evidence_estimate": accepted.log_mean_weight,
        }
        return replace(draws, info=info)
