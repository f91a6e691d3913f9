"""Best-of-n: draw n completions from the prior, keep the one of highest reward.

Best-of-n does not sample from the posterior; it is the baseline that most people run first. If rewards never tie,
KL(best-of-n || p0) = log n - (n - 1) / n; with ties it is smaller (Beirami et al. 2024), see `order_statistics`. The density
of a draw cannot be evaluated, so draws have no importance weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.inference.sampling.order_statistics import best_of_n_kl, best_of_n_win_rate
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.sequences import Sequences

__all__ = ["BestOfN"]


@dataclass(frozen=True)
class BestOfN:
    """Draws each of which is the best of n prior draws; among equal rewards the first one is taken.

    Parameters
    ----------
    n
        Number of candidates per draw.
    num_draws
        Number of draws per prompt, N; n * N completions per prompt are decoded.

    Notes
    -----
    `Draws.info` has two entries of shape (P,), estimated from the rewards of all n * N candidates: `kl_prior`, which is
    KL(best-of-n || p0) in nats with ties taken into account, and `win_rate`, the probability of a higher reward than one prior
    draw, with ties counted half.

    Examples
    --------
    The reward is the length; the best of 32 coin sequences has the largest length, 3.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> draws = bk.BestOfN(32, num_draws=4).run(bk.Posterior(coin, longer, max_new_tokens=3), seed=0)
    >>> draws.reward
    array([[3., 3., 3., 3.]])
    """

    n: int
    num_draws: int

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("num_draws", self.num_draws)

    @property
    def rows_per_prompt(self) -> int:
        """Completions per prompt that are decoded at once; a prompt's draws do not depend on the others (`runners.blocks`)."""
        return self.n * self.num_draws

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; `log_proposal` is NaN, because the density of best-of-n cannot be evaluated."""
        check_posterior_given(posterior)
        start = time.perf_counter()
        drawn = draw(
            (posterior.prior,),
            posterior,
            self.n * self.num_draws,
            Streams.of(seed),
            description="best of n",
            progress=progress,
        )
        candidates = drawn.reward.reshape(-1, self.num_draws, self.n)
        best = candidates.argmax(axis=2) + self.n * np.arange(self.num_draws)  # (P, N), the first among equals
        prompt = np.arange(len(best))[:, None]
        draws = Draws.equally_weighted(
            posterior,
            Sequences(drawn.sequences.tokens[prompt, best], drawn.sequences.lengths[prompt, best]),
            method=type(self).__name__,
            reward=drawn.reward[prompt, best],
            log_prior=drawn.log_probs[0][prompt, best],
            log_proposal=None,
            cost=Cost(time.perf_counter() - start, drawn.model_tokens),
        )
        info = {
            **drawn.info,
            "kl_prior": best_of_n_kl(drawn.reward, self.n),
            "win_rate": best_of_n_win_rate(drawn.reward, self.n),
        }
        return replace(draws, info=info)
