"""Stochastic variational inference: train a guide q on the ELBO, which is KL-regularised RL, exactly.

    E_q[r] / alpha - KL(q || p0) = ELBO(q) = log Z - KL(q || p*)

The guide is a copy of the prior, or LoRA adapters over its frozen weights. `SVI` is the recipe, `Fit` what it made; the
training itself is in `svi_pyro`, and for a `JaxLM` in `svi_numpyro`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bayes_klrl.checks import check_count, check_positive, check_prompts_per_step
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, needs_jax
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import generator
from bayes_klrl.typing import FloatArray, JaxModel, LanguageModel

__all__ = ["ESTIMATORS", "OBJECTIVES", "SVI", "Fit"]

ESTIMATORS = ("leave_one_out", "rao_blackwell")
OBJECTIVES = ("elbo",)


@dataclass(frozen=True)
class SVI:
    """Train a guide on the ELBO by score-function gradients.

    Parameters
    ----------
    num_steps
        Gradient steps.
    num_particles
        N completions a prompt and step, at least 2.
    learning_rate
        Of Adam, at its highest: it rises over the first steps and falls linearly to 0. None: 2e-3, for adapters 5e-3, for
        an `NgramLM` 0.1.
    objective
        "elbo".
    estimator
        "leave_one_out", of variance zero at the posterior, or "rao_blackwell", of lower variance far from it
        (see `bayes_klrl.inference.svi.pyro_backend.elbo`).
    adapter
        None: every parameter of a copy of the prior is trained. "lora" or a `peft` configuration: adapters over the
        frozen prior.
    num_draws
        N of `run`.
    max_step_kl
        A step that would move the guide by more nats is shortened to that (see `pyro_backend.trust_region`); inf:
        never. Without it, a learning rate that suits one model collapses another onto one short completion.
    prompts_per_step
        Train on as many of the P prompts a step, drawn at random; None: on all.
    """

    num_steps: int
    num_particles: int = 64
    learning_rate: float | None = None
    objective: str = "elbo"
    estimator: str = "leave_one_out"
    adapter: Any = None
    num_draws: int = 1000
    max_step_kl: float = 0.03
    prompts_per_step: int | None = None

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_count("num_particles", self.num_particles, least=2)
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        check_count("num_draws", self.num_draws)
        if self.max_step_kl != np.inf:
            check_positive("max_step_kl", self.max_step_kl)
        if self.prompts_per_step is not None:
            check_count("prompts_per_step", self.prompts_per_step)
        if self.objective not in OBJECTIVES:
            raise BayesKLRLError(f"Unknown objective {self.objective!r}; choose one of {list(OBJECTIVES)}.")
        if self.estimator not in ESTIMATORS:
            raise BayesKLRLError(
                f"Unknown estimator {self.estimator!r}; choose one of {list(ESTIMATORS)}. Stock Pyro losses are not "
                "offered: RenyiELBO has gradient 0 on a sequence site, Trace_ELBO no baseline (use them on "
                "posterior.pyro_model() if you must)."
            )

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Fit:
        """Return the trained guide with its history. Ctrl-C ends training early and keeps what was learned.

        Raises
        ------
        UnboundedLossError
            If a draw has likelihood 0: names the completion and the cure. This and any other error of ours after the first
            step carries what was learned as its attribute `fit`.
        """
        check_prompts_per_step(self.prompts_per_step, posterior.num_prompts)
        if isinstance(posterior.prior, JaxModel):
            with needs_jax("SVI on a model on JAX"):
                from bayes_klrl.inference.svi.numpyro_backend.training import fit_guide
        else:
            from bayes_klrl.inference.svi.pyro_backend.training import fit_guide
        return fit_guide(self, posterior, seed=seed, progress=progress)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """Return draws from the trained guide, with `Draws.guide` set; see `Fit.run`."""
        return self.fit(posterior, seed=seed, progress=progress).run(self.num_draws, seed, progress=progress)


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained guide.

    Parameters
    ----------
    guide
        The approximate posterior q.
    history
        Of every step, means over prompts in nats: "elbo", "reward" (in its own units), "kl" (to the prior),
        "log_weight_sd", "gradient_norm", "learning_rate", "step_kl" (as taken; NaN where it was not looked at), "seconds".
    posterior
        What it approximates.
    training
        Seconds and tokens of the training.
    interrupted
        Whether Ctrl-C ended it early.
    """

    guide: LanguageModel
    history: Mapping[str, FloatArray] = field(repr=False)
    posterior: Posterior
    training: Cost
    interrupted: bool = False

    method: ClassVar[str] = "SVI"

    @property
    def training_tokens(self) -> int:
        """Tokens that went through a model in training."""
        return self.training.training_tokens

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.training.training_seconds

    def save(self, folder: str | Path) -> Path:
        """Write the guide as `from_pretrained` reads it, adapters merged, and return the folder."""
        if not hasattr(self.guide, "save_pretrained"):
            raise BayesKLRLError(f"A {type(self.guide).__name__} has no save_pretrained, so it cannot be saved.")
        self.guide.save_pretrained(folder)
        return Path(folder)

    def run(self, num_draws: int, seed: int, *, progress: bool = False) -> Draws:
        """Return draws from the guide, weighing equally; `elbo` is their mean log-weight, the log-weights are not used.

        To correct them for what the guide got wrong, `ImportanceSampling(num_draws, proposal=fit.guide)`.
        """
        check_count("num_draws", num_draws)
        start, posterior = time.perf_counter(), self.posterior
        drawn = draw(
            (self.guide, posterior.prior),
            posterior,
            num_draws,
            generator(seed),
            description="drawing from the guide",
            progress=progress,
        )
        log_guide, log_prior = drawn.log_probs
        draws = Draws.equally_weighted(
            posterior,
            drawn.sequences,
            method=self.method,
            reward=drawn.reward,
            log_prior=log_prior,
            log_proposal=log_guide,
            cost=Cost(time.perf_counter() - start, drawn.model_tokens, self.training_tokens, self.seconds),
        )
        elbo = (log_prior + draws.log_likelihood - log_guide).mean(axis=1)
        return replace(draws, elbo=elbo, guide=self.guide, info=drawn.info)
