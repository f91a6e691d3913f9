"""Sequential Monte Carlo over tokens, with twists (THEORY 3; Zhao et al. 2024).

Intermediate targets gamma_t(x_1:t) = p0(x_1:t) psi_t(x_1:t); psi of a finished completion is its likelihood. A particle's
log-weight grows by

    log p0(x_t | x_<t) + log psi_t(x_1:t) - log psi_{t-1}(x_<t) - log q(x_t | x_<t),

and log Z-hat collects logmeanexp of the weights whenever they are spent on resampling. exp(log Z-hat) is unbiased for
every scheme, adaptive or not; averaging log Z-hat over runs is a lower bound, not an estimate.

psi = 1 on unfinished prefixes beside psi = likelihood on finished ones would be a mismatch of scale: whoever ends first
takes the population (about 1.2 nats lost on a problem of 1093 strings). So the default twist is the constant Z of a small
pilot, all particles of a prompt are resampled together, only while one of them is unfinished, and never at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from bayes_klrl.checks import check_count, check_finite, check_fraction
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.importance import require_positive_weight
from bayes_klrl.inference.proposals import Proposal, resolve_proposal
from bayes_klrl.inference.resampling import multinomial, resampling_scheme
from bayes_klrl.models.decoding import Decoding, scoring_gap
from bayes_klrl.models.twist import ConstantTwist, pilot_twist
from bayes_klrl.models.twisted_lm import TwistedLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import generator
from bayes_klrl.typing import Algorithm, FloatArray, IntArray, LanguageModel, Twist, TwistRecipe
from bayes_klrl.weights import (
    check_log_weights,
    effective_sample_size,
    grouped_ess,
    log_evidence_se,
    logmeanexp,
    normalised,
)

if TYPE_CHECKING:
    from bayes_klrl.inference.resampling import Scheme

__all__ = ["SMC"]


@dataclass(frozen=True)
class SMC:
    """Particles that grow token by token and are resampled when their weights degenerate.

    Parameters
    ----------
    num_particles
        N for each prompt; every prompt has a population of its own.
    proposal
        See `ImportanceSampling`; or "twisted": the prior times the twist, one token ahead (`TwistedLM`).
    twist
        log psi of unfinished prefixes: a `Twist`, a recipe such as `LearnedTwist`, which is fitted first under the same
        seed, a number (a constant log psi), or None: the constant log Z of a 64-draw pilot from the prior, with a seed of
        its own (not run where nothing can end early).
    ess_threshold
        Resample when ESS < ess_threshold * N. 0: never; 1: whenever weights differ.
    resampling
        "systematic", "stratified", "residual" or "multinomial".

    Notes
    -----
    `Draws.ess` counts families by first ancestor, so that it does not read N of N right after resampling; the usual ESS
    of every step is in `Draws.info["step_ess"]` (P, T), the ancestors in `Draws.info["ancestors"]` (P, T, N).
    """

    num_particles: int
    proposal: Proposal | Literal["twisted"] = None
    twist: Twist | TwistRecipe | float | None = None
    ess_threshold: float = 0.5
    resampling: str = "systematic"

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        check_fraction("ess_threshold", self.ess_threshold)
        resampling_scheme(self.resampling)
        is_recipe = isinstance(self.twist, TwistRecipe) and not isinstance(self.twist, Algorithm | LanguageModel)
        if self.twist is not None and not callable(self.twist) and not is_recipe:
            check_finite("A twist that is neither None nor a function", self.twist)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`.

        Raises
        ------
        BudgetError
            If all particles of some prompt have likelihood 0; it carries the draws.
        """
        if isinstance(self.proposal, str) and self.proposal == "twisted":
            proposal, training = None, Cost()
        else:
            proposal, training = resolve_proposal(self.proposal, posterior, seed, progress)
        twist, twist_training = self._fitted_twist(posterior, seed, progress)
        training = training + twist_training
        start = time.perf_counter()
        twist, pilot_tokens = self._resolved_twist(twist, posterior, seed)
        read_before = getattr(twist, "model_tokens", 0)
        proposal = TwistedLM(posterior, twist) if proposal is None else proposal
        decoding = Decoding(
            (proposal, posterior.prior), posterior.prompt_ids, self.num_particles, posterior.max_new_tokens
        )
        population = _Population(posterior, decoding, twist, (proposal, posterior.prior))
        rng, scheme = generator(seed), resampling_scheme(self.resampling)
        with track("SMC", posterior.max_new_tokens, progress) as advance:
            while not decoding.done:
                population.step(rng)
                if not decoding.done:
                    population.resample_where_degenerate(self.ess_threshold, scheme, rng)
                advance()
        read_by_twist = getattr(twist, "model_tokens", 0) - read_before
        seconds, model_tokens = time.perf_counter() - start, decoding.model_tokens + pilot_tokens + read_by_twist
        cost = replace(training, seconds=seconds, model_tokens=model_tokens)
        return require_positive_weight(population.draws(type(self).__name__, cost))

    def _fitted_twist(self, posterior: Posterior, seed: int, progress: bool) -> tuple[Twist | float | None, Cost]:
        """Return the twist, fitted if it is a recipe, and what that cost."""
        if callable(self.twist) or not isinstance(self.twist, TwistRecipe):
            return self.twist, Cost()
        fitted = self.twist.fit(posterior, seed=seed, progress=progress)
        return fitted, getattr(fitted, "training", Cost())

    def _resolved_twist(self, twist: Twist | float | None, posterior: Posterior, seed: int) -> tuple[Twist, int]:
        """Return the twist to ask, and the model tokens of the pilot if there is one."""
        if callable(twist):
            return twist, 0
        if twist is not None:
            return ConstantTwist(np.full(posterior.num_prompts, float(twist))), 0
        if not posterior.prior.eos_token_ids:  # all particles end together: a constant changes nothing, so any will do
            return ConstantTwist(np.zeros(posterior.num_prompts)), 0
        return pilot_twist(posterior, seed)


class _Population:
    """The particles of all prompts with their weights, R = P * N rows, prompt by prompt."""

    def __init__(
        self, posterior: Posterior, decoding: Decoding, twist: Twist, models: tuple[LanguageModel, LanguageModel]
    ) -> None:
        self._models = models
        num_rows, width = decoding.finished.size, posterior.max_new_tokens
        self._posterior, self._decoding, self._twist = posterior, decoding, twist
        self._shape = (posterior.num_prompts, num_rows // posterior.num_prompts)
        self.reward: FloatArray = np.full(num_rows, -np.inf)
        self.log_psi = self._log_twist(np.arange(num_rows))
        # the first increment divides by psi_0, so the start value is where log Z begins
        self.log_evidence = self.log_psi.reshape(self._shape)[:, 0].copy()
        self.log_weights: FloatArray = np.zeros(num_rows)
        self.family: IntArray = np.tile(np.arange(self._shape[1]), self._shape[0])
        # multinomial ones only: corrected for noise that the even schemes do not add, the standard error would read 0
        self.num_resampled = np.zeros(self._shape[0], dtype=np.int64)
        self.step_ess = np.full((self._shape[0], width), np.nan)
        self.ancestors = np.tile(np.arange(self._shape[1]), (self._shape[0], width, 1))

    def step(self, rng: np.random.Generator) -> None:
        """Draw one token for every unfinished particle and update its weight."""
        decoding = self._decoding
        live = ~decoding.finished
        log_proposal, log_prior = decoding.log_probs.copy()
        ended = decoding.step(rng.random(live.size))
        log_psi = self.log_psi.copy()
        if ended.size:
            self.reward[ended] = self._posterior.reward_of_rows(
                decoding.tokens[ended], decoding.lengths[ended], decoding.prompt_index[ended]
            )
            log_psi[ended] = self._posterior.likelihood.log_likelihood(self.reward[ended])
        growing = np.flatnonzero(~decoding.finished)
        if growing.size:
            log_psi[growing] = self._log_twist(growing)
        with np.errstate(invalid="ignore"):  # a particle that was dead before stays dead: -inf - -inf
            prior_term = decoding.log_probs[1] - log_prior
            increment = prior_term - (decoding.log_probs[0] - log_proposal) + (log_psi - self.log_psi)
            grown = np.where(live, self.log_weights + increment, self.log_weights)
        dead = np.isneginf(self.log_weights) | np.isneginf(self.log_psi)
        self.log_weights = np.where(dead, -np.inf, grown)
        self.log_psi = log_psi
        self.step_ess[:, decoding.step_count - 1] = effective_sample_size(self.log_weights.reshape(self._shape))

    def resample_where_degenerate(self, threshold: float, scheme: Scheme, rng: np.random.Generator) -> None:
        """Resample each prompt whose ESS is below the threshold and which has an unfinished particle."""
        num_prompts, num_particles = self._shape
        log_weights = self.log_weights.reshape(self._shape)
        unfinished = ~self._decoding.finished.reshape(self._shape).all(axis=1)
        ess = self.step_ess[:, self._decoding.step_count - 1]
        chosen = np.flatnonzero(unfinished & (ess < threshold * num_particles) & (ess > 0))
        if not chosen.size:
            return
        local = np.tile(np.arange(num_particles), (num_prompts, 1))
        for p in chosen:
            local[p] = scheme(normalised(log_weights[p]), rng)
            self.log_evidence[p] += logmeanexp(log_weights[p])
            log_weights[p] = 0.0
        self.ancestors[:, self._decoding.step_count - 1] = local
        self.num_resampled[chosen] += scheme is multinomial
        ancestors = (local + num_particles * np.arange(num_prompts)[:, None]).ravel()
        self.reward, self.log_psi = self.reward[ancestors], self.log_psi[ancestors]
        self.family = self.family[ancestors]
        self._decoding.reorder(ancestors)

    def draws(self, method: str, cost: Cost) -> Draws:
        """Return the particles with their final weights and the accumulated log evidence in them."""
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

    def _decoding_gap(self) -> dict[str, FloatArray]:
        """Return `scoring_gap` for models in half precision."""
        models = self._models
        if not any(getattr(model, "half_precision", False) for model in models):
            return {}
        return {"scoring_gap": scoring_gap(self._decoding, models, self._posterior.prompt_ids)}

    def _log_twist(self, rows: IntArray) -> FloatArray:
        """Return log psi of unfinished rows, checked."""
        decoding = self._decoding
        prefixes = decoding.tokens[rows, : decoding.step_count]
        values = check_log_weights(self._twist(self._posterior, decoding.prompt_index[rows], prefixes))
        if values.shape != rows.shape:
            raise BayesKLRLError(
                f"The twist returned shape {values.shape} for {rows.size} prefixes; it must return one log psi a prefix."
            )
        return values
