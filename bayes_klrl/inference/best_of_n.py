"""Best-of-n: draw n completions from the prior, keep the one of highest reward.

No posterior, but what most people run first. With rewards that do not tie, KL(best-of-n || p0) = log n - (n - 1) / n; with
ties it is lower (Beirami et al. 2024). Its draws have no density that can be evaluated, hence no weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.models.decoding import draw_blocks
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import generator
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
    """

    n: int
    num_draws: int

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("num_draws", self.num_draws)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; `log_proposal` is NaN, for best-of-n has no density that can be evaluated."""
        start, model_tokens = time.perf_counter(), 0
        rng = generator(seed)
        num_prompts, num_candidates = posterior.num_prompts, self.n * self.num_draws
        width = posterior.max_new_tokens
        tokens = np.full((num_prompts, self.num_draws, width), posterior.pad_token, dtype=np.int64)
        lengths = np.ones((num_prompts, self.num_draws), dtype=np.int64)
        rewards = np.full((num_prompts, self.num_draws), -np.inf)
        log_prior = np.zeros((num_prompts, self.num_draws))
        first = 0
        with track("best of n", num_candidates, progress) as advance:
            for block in draw_blocks((posterior.prior,), posterior.prompt_ids, num_candidates, width, rng):
                drawn = block.sequences()
                shape = drawn.lengths.shape
                reward = posterior.reward_of_rows(block.tokens, block.lengths, block.prompt_index).reshape(shape)
                log_prob = block.log_probs[0].reshape(shape)
                for column in range(shape[1]):  # the running best of draw k, candidate by candidate
                    k, is_first = divmod(first + column, self.n)
                    better = (reward[:, column] > rewards[:, k]) | (is_first == 0)
                    rewards[better, k] = reward[better, column]
                    tokens[better, k] = drawn.tokens[better, column]
                    lengths[better, k] = drawn.lengths[better, column]
                    log_prior[better, k] = log_prob[better, column]
                first += shape[1]
                model_tokens += block.model_tokens
                advance(shape[1])
        return Draws.equally_weighted(
            posterior,
            Sequences(tokens, lengths),
            method=type(self).__name__,
            reward=rewards,
            log_prior=log_prior,
            log_proposal=None,
            cost=Cost(time.perf_counter() - start, model_tokens),
        )
