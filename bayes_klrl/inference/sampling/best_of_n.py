"""Best-of-n: draw n completions from the prior, keep the one of highest reward.

No posterior, but what most people run first. With rewards that do not tie, KL(best-of-n || p0) = log n - (n - 1) / n; with
ties it is lower (Beirami et al. 2024), see `order_statistics`. Its draws have no density that can be evaluated, hence no
weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.inference.sampling.order_statistics import best_of_n_kl, best_of_n_win_rate
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.sequences import Sequences

__all__ = ["BestOfN"]


@dataclass(frozen=True)
class BestOfN:
    """Draws that each are the best of n prior draws; ties go to the first.

    Parameters
    ----------
    n
        Candidates for each draw.
    num_draws
        N for each prompt, so that n * N completions are decoded.

    Notes
    -----
    `Draws.info`, each of shape (P,) and estimated from the rewards of all n * N candidates: `kl_prior`, KL(best-of-n || p0)
    in nats, ties included, and `win_rate` against one prior draw.
    """

    n: int
    num_draws: int

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("num_draws", self.num_draws)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; `log_proposal` is NaN, for best-of-n has no density that can be evaluated."""
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
        best = candidates.argmax(axis=2) + self.n * np.arange(self.num_draws)  # (P, N), the first of equals
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
            "kl_prior": best_of_n_kl(drawn.reward, self.n),
            "win_rate": best_of_n_win_rate(drawn.reward, self.n),
        }
        return replace(draws, info=info)
