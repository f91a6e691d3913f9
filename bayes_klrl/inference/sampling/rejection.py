"""Rejection sampling: exact posterior draws, for rewards with a known maximum.

    x ~ p0,   accept with probability exp((r(x) - r_max) / alpha),   acceptance rate Z exp(-r_max / alpha)

Accepted completions follow the posterior exactly, whatever the number of proposals (theory.md 6.3). One draw takes
exp(r_max / alpha) / Z proposals on average, so this is for posteriors near the prior, and for the few exact draws that make a
certificate two-sided.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.sampling.accept_reject import Accepted, accept_reject, check_max_proposals
from bayes_klrl.inference.sampling.drawing import Drawn
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray

__all__ = ["RejectionSampling"]


@dataclass(frozen=True)
class RejectionSampling:
    """Independent draws from the exact posterior.

    The likelihood must declare `bounds` with a finite upper end; a reward above it raises an error. A bound that is not tight
    costs more proposals, and the draws remain exact. A `Constraint` has the upper end 0.

    Parameters
    ----------
    num_draws
        Number of draws per prompt, N.
    max_proposals
        The largest number of completions proposed per prompt.

    Notes
    -----
    `Draws.info` has three entries of shape (P,): `num_proposals` up to and including the N-th acceptance; `acceptance_rate`,
    the mean acceptance probability of all proposals; and `log_evidence_estimate`, the log of an unbiased estimate of Z,

        Z-hat = exp(r_max / alpha) (N - 1) / (num_proposals - 1),

    which holds because the number of proposals is negative binomial; it is NaN for N = 1.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 3))
    >>> draws = bk.RejectionSampling(5).run(bk.Posterior(coin, longer, max_new_tokens=3), seed=0)
    >>> draws.shape, bool((draws.info["num_proposals"] >= 5).all())
    ((1, 5), True)
    """

    num_draws: int
    max_proposals: int = 100_000

    def __post_init__(self) -> None:
        check_count("num_draws", self.num_draws)
        check_max_proposals(self.max_proposals, self.num_draws)

    @property
    def rows_per_prompt(self) -> int:
        """Completions per prompt that are decoded at once; a prompt's draws do not depend on the others (`runners.blocks`)."""
        return self.num_draws

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; `log_proposal` is NaN, because the density of an exact draw contains the unknown log Z.

        Raises
        ------
        BayesKLRLError
            If the reward declares no upper bound; this is checked before any model runs.
        BudgetError
            If some prompt reaches `max_proposals` before its N-th acceptance. The error carries as many draws as all prompts
            have; these are exact. It comes early if the likelihood has a `Power` of the prior and the proposals show
            that none will be accepted (theory.md 6.3).
        """
        check_posterior_given(posterior)
        start = time.perf_counter()
        log_bound = largest_log_likelihood(posterior)
        streams = Streams.of(seed)

        def log_likelihood(drawn: Drawn) -> FloatArray:
            return posterior.likelihood.log_likelihood(drawn.reward)

        accepted = accept_reject(
            (posterior.prior,),
            posterior,
            log_likelihood,
            log_bound,
            self.num_draws,
            self.max_proposals,
            streams,
            description="rejection sampling",
            progress=progress,
            prior_power=posterior.likelihood.prior_power,
        )
        draws = accepted.draws(posterior, type(self).__name__, Cost(time.perf_counter() - start))
        return replace(draws, info=_info(accepted, log_bound, self.num_draws))


def largest_log_likelihood(posterior: Posterior) -> float:
    """Return r_max / alpha in nats from the declared bounds; raise a `BayesKLRLError` if there are none."""
    bounds = posterior.likelihood.bounds
    if bounds is None or np.isposinf(bounds[1]):
        raise BayesKLRLError(
            f"Rewards unbounded above given to rejection sampling: {posterior.likelihood.name or 'the reward'!r} has bounds = "
            f"{bounds}. Declare them, bk.Reward(fn, alpha=..., bounds=(low, high)), in every factor, or use "
            "bk.QuasiRejection or bk.SMC, which need none."
        )
    return bounds[1] / posterior.alpha


def _info(accepted: Accepted, log_bound: float, num_draws: int) -> dict[str, np.ndarray]:
    """Return the entries of `Draws.info`; see `RejectionSampling`."""
    with np.errstate(divide="ignore", invalid="ignore"):  # N = 1 has no unbiased estimate of this form
        rate = np.log(np.float64(num_draws - 1)) - np.log(accepted.num_proposals - 1)
    return {
        "num_proposals": accepted.num_proposals,
        "acceptance_rate": np.exp(accepted.log_acceptance_rate),
        "log_evidence_estimate": rate + log_bound if num_draws > 1 else np.full(len(rate), np.nan),
    }
