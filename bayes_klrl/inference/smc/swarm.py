"""The state of `AnnealedSMC`: particles that are whole completions, tempered from the prior to the posterior."""

from __future__ import annotations

import numpy as np

from bayes_klrl.inference.mcmc.suffix_moves import States, suffix_move, tempered
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Generators, Streams
from bayes_klrl.resampling import Scheme, multinomial
from bayes_klrl.typing import FloatArray, LanguageModel
from bayes_klrl.weights import effective_sample_size, logmeanexp, logsumexp, normalised

__all__ = ["Swarm", "next_powers"]


class Swarm:
    """N weighted completions for each of P prompts, and their estimates along the path.

    At s = 0 they are prior draws. Those of likelihood 0 get weight 0, because they are impossible at every s > 0.

    Parameters
    ----------
    posterior
        The posterior.
    models
        The language models (q, p0), where q draws the suffixes of moves.
    num_particles
        Number of particles per prompt, N.
    streams
        Random numbers for the prior draws.
    """

    def __init__(
        self,
        posterior: Posterior,
        models: tuple[LanguageModel, LanguageModel],
        num_particles: int,
        streams: Streams,
    ) -> None:
        drawn = draw(models[::-1], posterior, num_particles, streams, description="annealing", progress=False)
        self._posterior, self._models = posterior, models
        self.shape = drawn.reward.shape
        self.states = States(
            drawn.sequences.tokens.reshape(drawn.reward.size, -1),
            drawn.sequences.lengths.ravel(),
            drawn.reward.ravel(),
            drawn.log_probs[::-1].reshape(2, -1),
        )
        self.model_tokens = drawn.model_tokens
        num_prompts = posterior.num_prompts
        self.power: FloatArray = np.zeros(num_prompts)
        self.log_weights: FloatArray = tempered(self.log_likelihood, 0.0)
        self.log_evidence: FloatArray = np.zeros(num_prompts)
        self.family = np.tile(np.arange(num_particles), (num_prompts, 1))
        self.num_resampled = np.zeros(num_prompts, dtype=np.int64)
        self.path: dict[str, list[FloatArray]] = {}
        self._record()
        self._add(acceptance_rate=np.full(num_prompts, np.nan))

    @property
    def log_likelihood(self) -> FloatArray:
        """Log-likelihood r / alpha of the current particles, (P, N)."""
        return self._posterior.likelihood.log_likelihood(self.states.reward.reshape(self.shape))

    def temper(self, power: FloatArray) -> None:
        """Go from s to `power` (P,): log-weights gain (power - s) r / alpha of the particles before they move."""
        self.log_weights = self.log_weights + tempered(self.log_likelihood, (power - self.power)[:, None])
        self.power = power
        self._record()

    def resample_where_degenerate(self, threshold: float, scheme: Scheme, rngs: Generators) -> None:
        """Resample each prompt whose ESS is below the threshold, adding the log of its mean weight to its log evidence."""
        num_prompts, num_particles = self.shape
        local = np.tile(np.arange(num_particles), (num_prompts, 1))
        ess = effective_sample_size(self.log_weights)
        chosen = np.flatnonzero((ess < threshold * num_particles) & (ess > 0))
        for p in chosen:
            local[p] = scheme(normalised(self.log_weights[p]), rngs[int(p)])
            self.log_evidence[p] += logmeanexp(self.log_weights[p])
            self.log_weights[p] = 0.0
        self.num_resampled[chosen] += scheme is multinomial
        self.family = np.take_along_axis(self.family, local, axis=1)
        self.states = self.states.taken((local + num_particles * np.arange(num_prompts)[:, None]).ravel())

    def move(self, num_moves: int, cut: str, rngs: Generators) -> None:
        """Move every particle at its s; weights do not change, because moves leave the target at s invariant."""
        power = np.repeat(self.power, self.shape[1])
        proposed, accepted = np.zeros(len(self.power)), np.zeros(len(self.power))
        for _ in range(num_moves):
            moved = suffix_move(self._posterior, self._models, self.states, power, cut, rngs)
            self.states = moved.states
            self.model_tokens += moved.model_tokens
            proposed += moved.proposed.reshape(self.shape).sum(axis=1)
            accepted += moved.accepted.reshape(self.shape).sum(axis=1)
        self._add(acceptance_rate=accepted / np.maximum(proposed, 1))

    def _record(self) -> None:
        """Append the estimates at this s to the path: log Z(s), E[r], KL(p_s || p0) and ESS."""
        log_evidence = self.log_evidence + logmeanexp(self.log_weights)
        total = logsumexp(self.log_weights)
        with np.errstate(invalid="ignore"):  # 0 * -inf, and prompts whose particles all have weight 0
            weights = np.exp(self.log_weights - total[:, None])
            weighted = np.where(weights > 0, weights * self.states.reward.reshape(self.shape), 0.0)
        reward = np.where(np.isneginf(total), np.nan, weighted.sum(axis=1))
        self._add(
            schedule=self.power,
            path_log_evidence=log_evidence,
            path_reward=reward,
            path_kl=self.power * self._posterior.likelihood.log_likelihood(reward) - log_evidence,
            path_ess=effective_sample_size(self.log_weights),
        )

    def _add(self, **values: FloatArray) -> None:
        """Append named values of shape (P,) to the path."""
        for name, value in values.items():
            self.path.setdefault(name, []).append(value)


def next_powers(swarm: Swarm, conditional_ess: float, least: float = 0.0) -> FloatArray:
    """Return the largest next s of each prompt, (P,), that keeps the conditional ESS at its target or above.

        CESS(s') / N = (sum_n W_n v_n)^2 / sum_n W_n v_n^2,   v_n = exp((s' - s) r(x_n) / alpha)

    falls from 1 as s' grows from s; bisection finds where it equals `conditional_ess` (Zhou, Johansen and Aston 2016).

    Parameters
    ----------
    swarm
        The particles at s.
    conditional_ess
        Target of CESS / N, a number between 0 and 1.
    least
        Smallest step, as a share of the remaining distance to 1, so that the path ends.
    """
    left = 1.0 - swarm.power
    log_w, log_likelihood = swarm.log_weights, swarm.log_likelihood

    def is_even(step: FloatArray) -> np.ndarray:
        log_v = tempered(log_likelihood, step[:, None])
        with np.errstate(invalid="ignore"):  # all weights 0: NaN counts as not even
            log_share = 2 * logsumexp(log_w + log_v) - logsumexp(log_w) - logsumexp(log_w + 2 * log_v)
        even: np.ndarray = log_share >= np.log(conditional_ess)
        return even

    low, high = np.zeros_like(left), left.copy()
    whole = is_even(left) | np.isneginf(logsumexp(log_w))
    for _ in range(50):
        middle = (low + high) / 2
        even = is_even(middle)
        low, high = np.where(even, middle, low), np.where(even, high, middle)
    step = np.where(whole, left, np.maximum(low, least * left))
    return np.where(step >= left, 1.0, swarm.power + step)
