"""The particles of sequential Monte Carlo: growing, weighting and resampling them, for plain and conditional SMC."""

from __future__ import annotations

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.smc.level import most_even_level
from bayes_klrl.inference.smc.outcome import Outcome
from bayes_klrl.models.decoding import Decoding
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import Advance
from bayes_klrl.prompts.part import in_whole
from bayes_klrl.randomness import Generators
from bayes_klrl.resampling import Scheme, multinomial
from bayes_klrl.typing import FloatArray, IntArray, Twist
from bayes_klrl.weights import check_log_weights, effective_sample_size, logmeanexp, normalised

__all__ = ["Population"]


class Population:
    """The particles of P prompts with their weights: M independent runs per prompt, N particles per run, R = P * M * N rows.

    Particle n stands for v_n = p0(x_1:t) / q(x_1:t) completions of the prior, and its weight is v_n psi_t(x_1:t). Resampling
    by these weights leaves v_n = (mean weight) / psi_t, with the mean weight kept in `log_evidence`.

    Parameters
    ----------
    posterior
        The posterior.
    prompts
        Indices of the P prompts among those of the posterior.
    decoding
        A decoding of M * N rows per prompt by (proposal, prior), before its first step.
    twist
        log psi of unfinished prefixes; None: one constant per run and step, see `most_even_level`.
    num_runs
        Number of runs per prompt, M. Each run has its own weights, resampling and evidence; all runs share the decoding.
    retained
        Tokens (P, M, T) that particle 0 of every run is forced to follow, for conditional SMC.
    """

    def __init__(
        self,
        posterior: Posterior,
        prompts: IntArray,
        decoding: Decoding,
        twist: Twist | None,
        num_runs: int = 1,
        retained: IntArray | None = None,
    ) -> None:
        self._retained, self._prompt_index = retained, prompts[decoding.prompt_index]
        self._whole, self._index_in_whole = in_whole(posterior, self._prompt_index)
        num_rows, width = decoding.finished.size, posterior.max_new_tokens
        self._posterior, self._decoding, self._twist = posterior, decoding, twist
        num_populations = prompts.size * num_runs
        self._shape = (num_populations, num_rows // num_populations)
        self.reward: FloatArray = np.full(num_rows, -np.inf)
        self._level: FloatArray = np.zeros(num_populations)
        self.log_ratio: FloatArray = np.zeros(num_rows)
        # of empty prefixes, so that a twist that is none is refused at once
        self.log_psi = self._log_twist(np.arange(num_rows))
        self.log_evidence: FloatArray = np.zeros(num_populations)
        self.family: IntArray = np.tile(np.arange(self._shape[1]), self._shape[0])
        # counts multinomial resampling only: with a correction for noise that other schemes do not add the error would be 0
        self.num_resampled = np.zeros(self._shape[0], dtype=np.int64)
        self.step_ess = np.full((self._shape[0], width), np.nan)
        self.ancestors = np.tile(np.arange(self._shape[1]), (self._shape[0], width, 1))

    @property
    def log_weights(self) -> FloatArray:
        """Log-weights of the particles since the last resampling, log v + log psi, (R,)."""
        return self.log_ratio + self.log_psi

    def grow(self, uniforms: FloatArray, threshold: float, scheme: Scheme, rngs: Generators, advance: Advance) -> None:
        """Step and resample until every particle has finished.

        Parameters
        ----------
        uniforms
            Uniform random numbers by which tokens are drawn, shape (T, R).
        threshold, scheme
            A population is resampled by this scheme when ESS < threshold * N.
        rngs
            The P * M generators for resampling, one per population.
        advance
            A function that reports progress, called once per token.
        """
        while not self._decoding.done:
            self.step(uniforms[self._decoding.step_count])
            if not self._decoding.done:
                self.resample_where_degenerate(threshold, scheme, rngs)
            advance()

    def step(self, uniforms: FloatArray) -> None:
        """Draw one token for every unfinished particle, by uniform numbers (R,), and update its weight."""
        decoding = self._decoding
        log_proposal, log_prior = decoding.log_probs.copy()
        ended = decoding.step(uniforms, self._forced_tokens())
        if ended.size:
            self.reward[ended] = self._posterior.reward_of_rows(
                decoding.tokens[ended], decoding.lengths[ended], self._prompt_index[ended]
            )
            self.log_psi[ended] = self._posterior.likelihood.log_likelihood(self.reward[ended])
        with np.errstate(invalid="ignore"):  # -inf - -inf: a particle of prior probability 0 keeps weight 0
            grown = self.log_ratio + (decoding.log_probs[1] - log_prior) - (decoding.log_probs[0] - log_proposal)
        self.log_ratio = np.where(np.isneginf(self.log_ratio), -np.inf, grown)
        growing = np.flatnonzero(~decoding.finished)
        if self._twist is None:
            shape = self._shape
            level = most_even_level(
                self.log_ratio.reshape(shape), self.log_psi.reshape(shape), decoding.finished.reshape(shape)
            )
            self._level = np.where(np.isfinite(level), level, self._level)
        if growing.size:
            self.log_psi[growing] = self._log_twist(growing)
            self.log_ratio[growing[np.isneginf(self.log_psi[growing])]] = -np.inf  # weight 0 for good
        self.step_ess[:, decoding.step_count - 1] = effective_sample_size(self.log_weights.reshape(self._shape))

    def resample_where_degenerate(self, threshold: float, scheme: Scheme, rngs: Generators) -> None:
        """Resample each run that has an ESS below the threshold and an unfinished particle."""
        num_populations, num_particles = self._shape
        log_weights = self.log_weights.reshape(self._shape)
        unfinished = ~self._decoding.finished.reshape(self._shape).all(axis=1)
        ess = self.step_ess[:, self._decoding.step_count - 1]
        chosen = np.flatnonzero(unfinished & (ess < threshold * num_particles) & (ess > 0))
        if not chosen.size:
            return
        local = np.tile(np.arange(num_particles), (num_populations, 1))
        for p in chosen:
            local[p] = scheme(normalised(log_weights[p]), rngs[int(p)])
            self.log_evidence[p] += logmeanexp(log_weights[p])
        self.ancestors[:, self._decoding.step_count - 1] = local
        self.num_resampled[chosen] += scheme is multinomial
        ancestors = (local + num_particles * np.arange(num_populations)[:, None]).ravel()
        self.reward, self.log_psi = self.reward[ancestors], self.log_psi[ancestors]
        self.family = self.family[ancestors]
        self.log_ratio.reshape(self._shape)[chosen] = -self.log_psi.reshape(self._shape)[chosen]
        self._decoding.reorder(ancestors)

    def outcome(self) -> Outcome:
        """Return the particles as they are, with the last weights; no particle may be unfinished."""
        log_proposal, log_prior = self._decoding.log_probs.reshape(2, *self._shape)
        return Outcome(
            tokens=self._decoding.tokens.reshape(*self._shape, -1),
            lengths=self._decoding.lengths.reshape(self._shape),
            reward=self.reward.reshape(self._shape),
            log_prior=log_prior,
            log_proposal=log_proposal,
            log_weights=self.log_weights.reshape(self._shape),
            log_evidence=self.log_evidence,
            family=self.family.reshape(self._shape),
            num_resampled=self.num_resampled,
            ancestors=self.ancestors,
            step_ess=self.step_ess,
        )

    def _forced_tokens(self) -> IntArray | None:
        """Return the next token of retained particles and -1 for all others, (R,); None if no particle is retained."""
        if self._retained is None:
            return None
        forced = np.full(self._shape, -1)
        forced[:, 0] = self._retained[:, :, self._decoding.step_count].ravel()
        return forced.ravel()

    def _log_twist(self, rows: IntArray) -> FloatArray:
        """Return log psi of unfinished rows, with shape and values checked."""
        decoding = self._decoding
        if self._twist is None:
            return self._level[rows // self._shape[1]]
        index, of_log_prior = self._index_in_whole[rows], getattr(self._twist, "of_log_prior", None)
        if of_log_prior is None:
            values = self._twist(self._whole, index, decoding.tokens[rows, : decoding.step_count])
        else:  # decoding has summed log p0 of every prefix, so no model needs to read them again
            values = of_log_prior(self._whole, index, decoding.step_count, decoding.log_probs[1, rows])
        values = check_log_weights(values)
        if values.shape != rows.shape:
            raise BayesKLRLError(
                f"The twist returned shape {values.shape} for {rows.size} prefixes; it must return one log psi per prefix."
            )
        return values
