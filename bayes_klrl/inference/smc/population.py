"""The particles of sequential Monte Carlo: growing, weighting and resampling them, for plain and conditional SMC."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np

from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, SupportError
from bayes_klrl.inference.smc.level import most_even_level
from bayes_klrl.models.decoding import Decoding, scoring_gap
from bayes_klrl.models.memory import rows_that_fit
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import Advance, track
from bayes_klrl.prompts.words import prompt_words
from bayes_klrl.randomness import Generators, Streams, prompt_keys
from bayes_klrl.resampling import Scheme, conditional_multinomial, multinomial, resampling_scheme
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, Twist
from bayes_klrl.weights import (
    check_log_weights,
    effective_sample_size,
    grouped_ess,
    log_evidence_se,
    logmeanexp,
    normalised,
)

__all__ = ["RESAMPLING_STREAM", "EvidenceRuns", "Population", "evidence_runs", "grown"]

RESAMPLING_STREAM = 3
"""Number of the streams used for resampling; tokens use the same streams as in importance sampling."""

_MAX_ROWS = 8192  # most particles decoded together, if runs can be split, and fewer where memory asks for it


class Prepared(Protocol):
    """The options of a run with proposal and twist fitted; `SMC.prepared` returns one."""

    @property
    def num_particles(self) -> int:
        """Number of particles per prompt and run, N."""

    @property
    def proposal(self) -> Any:
        """The language model that proposes tokens."""

    @property
    def twist(self) -> Any:
        """A `Twist`, log psi of unfinished prefixes; None: the constant at which the weights are most even."""

    @property
    def ess_threshold(self) -> float:
        """Resample when ESS < ess_threshold * N."""

    @property
    def resampling(self) -> str:
        """Name of the resampling scheme."""


@dataclass(frozen=True, eq=False)
class EvidenceRuns:
    """Estimates of the log evidence of P prompts by M independent runs.

    Parameters
    ----------
    log_evidence
        log Z-hat of each run, (P, M); -inf if all particles of a run have weight 0.
    cost
        The cost of all runs together.
    """

    log_evidence: FloatArray
    cost: Cost


class Population:
    """The particles of all prompts with their weights: M independent runs per prompt, N particles per run, R = P * M * N rows.

    Particle n stands for v_n = p0(x_1:t) / q(x_1:t) completions of the prior, and its weight is v_n psi_t(x_1:t). Resampling
    by these weights leaves v_n = (mean weight) / psi_t, with the mean weight kept in `log_evidence`.

    Parameters
    ----------
    posterior
        The posterior.
    decoding
        A decoding of M * N rows per prompt by (proposal, prior), before its first step.
    twist
        log psi of unfinished prefixes; None: one constant per run and step, see `most_even_level`.
    models
        The language models (proposal, prior).
    num_runs
        Number of runs per prompt, M. Each run has its own weights, resampling and evidence; all runs share the decoding.
    retained
        Completions (P, M, T) that particle 0 of every run is forced to follow, for conditional SMC.
    """

    def __init__(
        self,
        posterior: Posterior,
        decoding: Decoding,
        twist: Twist | None,
        models: tuple[LanguageModel, LanguageModel],
        num_runs: int = 1,
        retained: Sequences | None = None,
    ) -> None:
        self._models, self._num_runs, self._retained = models, num_runs, retained
        num_rows, width = decoding.finished.size, posterior.max_new_tokens
        self._posterior, self._decoding, self._twist = posterior, decoding, twist
        num_populations = posterior.num_prompts * num_runs
        self._shape = (num_populations, num_rows // num_populations)
        self.reward: FloatArray = np.full(num_rows, -np.inf)
        self._level: FloatArray = np.zeros(num_populations)
        self.log_ratio: FloatArray = np.zeros(num_rows)
        self.log_psi = self._log_twist(
            np.arange(num_rows)
        )  # of empty prefixes: a twist that is none is refused at once
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
                decoding.tokens[ended], decoding.lengths[ended], decoding.prompt_index[ended]
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

    def log_evidences(self) -> FloatArray:
        """Return log Z-hat of every run, (P, M)."""
        log_mean: FloatArray = logmeanexp(self.log_weights.reshape(self._shape)) + self.log_evidence
        return log_mean.reshape(-1, self._num_runs)

    def draws(self, method: str, cost: Cost) -> Draws:
        """Return the particles of one run per prompt, their final weights including the accumulated log evidence."""
        log_proposal, log_prior = self._decoding.log_probs.reshape(2, *self._shape)
        log_weights = self.log_weights.reshape(self._shape)
        draws = Draws.weighted(
            self._posterior,
            self._decoding.sequences(),
            method=method,
            reward=self.reward.reshape(self._shape),
            log_prior=log_prior,
            log_proposal=log_proposal,
            cost=cost,
        )
        families = self.family.reshape(self._shape)
        ess = np.array([grouped_ess(row, family) for row, family in zip(log_weights, families, strict=True)])
        log_weights = log_weights + self.log_evidence[:, None]
        return replace(
            draws,
            log_weights=log_weights,
            log_evidence=logmeanexp(log_weights),
            log_evidence_se=log_evidence_se(ess, self._shape[1], self.num_resampled),
            elbo=np.full(self._shape[0], np.nan),
            ess=ess,
            info={"ancestors": self.ancestors, "step_ess": self.step_ess, **self._decoding_gap()},
        )

    def retained_log_weights(self) -> FloatArray:
        """Return the final log-weight of particle 0 of every run, (P, M)."""
        return self.log_weights.reshape(self._shape)[:, 0].reshape(-1, self._num_runs)

    def _forced_tokens(self) -> IntArray | None:
        """Return the next token of retained particles and -1 for all others, (R,); None if no particle is retained."""
        if self._retained is None:
            return None
        forced = np.full(self._shape, -1)
        forced[:, 0] = self._retained.tokens[:, :, self._decoding.step_count].ravel()
        return forced.ravel()

    def _decoding_gap(self) -> dict[str, FloatArray]:
        """Return {"scoring_gap": (P,)} if a model has half precision, else an empty dict."""
        models = self._models
        if not any(getattr(model, "half_precision", False) for model in models):
            return {}
        return {"scoring_gap": scoring_gap(self._decoding, models, self._posterior.prompt_ids)}

    def _log_twist(self, rows: IntArray) -> FloatArray:
        """Return log psi of unfinished rows, with shape and values checked."""
        decoding = self._decoding
        if self._twist is None:
            return self._level[rows // self._shape[1]]
        prefixes = decoding.tokens[rows, : decoding.step_count]
        values = check_log_weights(self._twist(self._posterior, decoding.prompt_index[rows], prefixes))
        if values.shape != rows.shape:
            raise BayesKLRLError(
                f"The twist returned shape {values.shape} for {rows.size} prefixes; it must return one log psi per prefix."
            )
        return values


def grown(
    ready: Prepared,
    posterior: Posterior,
    num_runs: int,
    retained: Sequences | None,
    streams: Streams,
    progress: bool,
    *,
    first_run: int = 0,
) -> tuple[Population, int]:
    """Return the finished particles of M runs of a prepared `SMC`, and the number of model tokens they took.

    With `retained` (P, M, T), particle 0 of every run follows these tokens, and resampling is conditional multinomial.
    `first_run` is the number of the first run, which selects its random numbers.
    """
    assert ready.twist is None or callable(ready.twist), "this SMC is not prepared"
    models = (cast("LanguageModel", ready.proposal), posterior.prior)
    num_rows = num_runs * ready.num_particles
    read_before = getattr(ready.twist, "model_tokens", 0)
    decoding = Decoding(models, posterior.prompt_ids, num_rows, posterior.max_new_tokens)
    scheme = resampling_scheme(ready.resampling) if retained is None else conditional_multinomial
    runs = range(first_run, first_run + num_runs)
    uniforms = streams.uniforms(
        prompt_keys(posterior.prompt_ids), first_run * ready.num_particles, num_rows, posterior.max_new_tokens
    )
    rngs = streams.beside(RESAMPLING_STREAM).generators(posterior.prompt_ids, runs)
    population = Population(posterior, decoding, ready.twist, models, num_runs, retained)
    with track("SMC", posterior.max_new_tokens, progress) as advance:
        population.grow(uniforms, ready.ess_threshold, scheme, rngs, advance)
    if retained is not None:
        _require_alive(population.retained_log_weights(), posterior)
    read_by_twist = getattr(ready.twist, "model_tokens", 0) - read_before
    return population, decoding.model_tokens + read_by_twist


def evidence_runs(
    ready: Prepared,
    posterior: Posterior,
    num_runs: int,
    retained: Sequences | None,
    streams: Streams,
    training: Cost,
    progress: bool,
) -> EvidenceRuns:
    """Return log Z-hat of M runs of a prepared `SMC`, run in blocks; conditional on `retained` (P, M, T) if given."""
    start, tokens, first = time.perf_counter(), 0, 0
    blocks = []
    lengths = [len(ids) for ids in posterior.prompt_ids]
    most = min(_MAX_ROWS, rows_that_fit((ready.proposal, posterior.prior), lengths, posterior.max_new_tokens))
    for num in _runs_per_block(num_runs, posterior.num_prompts * ready.num_particles, most):
        runs = slice(first, first + num)
        part = None if retained is None else Sequences(retained.tokens[:, runs], retained.lengths[:, runs])
        population, used = grown(ready, posterior, num, part, streams, progress, first_run=first)
        blocks.append(population.log_evidences())
        tokens, first = tokens + used, first + num
    cost = replace(
        training, seconds=training.seconds + time.perf_counter() - start, model_tokens=training.model_tokens + tokens
    )
    return EvidenceRuns(np.concatenate(blocks, axis=1), cost)


def _require_alive(log_weights: FloatArray, posterior: Posterior) -> None:
    """Raise a `SupportError` if a retained completion has weight 0 under posterior, proposal or twist."""
    if np.isneginf(log_weights).any():
        p, run = np.argwhere(np.isneginf(log_weights))[0]
        raise SupportError(
            f"Retained completion {run} of prompt {p} ({prompt_words(posterior.prompts[p])}) has weight 0: its likelihood "
            "or prior is 0, so it is not a posterior draw, or the twist is -inf on one of its prefixes. Retain an exact "
            "draw, for example from bk.RejectionSampling."
        )


def _runs_per_block(num_runs: int, num_rows: int, most_rows: int) -> list[int]:
    """Return the number of runs in each block of at most so many rows; one run has `num_rows` particles over all prompts."""
    most = max(1, most_rows // num_rows)
    return [min(most, num_runs - start) for start in range(0, num_runs, most)]
