"""Stochastic variational inference: train a guide q on the ELBO, which is KL-regularised RL, exactly.

    E_q[r] / alpha - KL(q || p0) = ELBO(q) = log Z - KL(q || p*)

The guide is a copy of the prior, or LoRA adapters over its frozen weights. `SVI` is the recipe, `Fit` what it made; the
training itself is in `svi_pyro`, and for a `JaxLM` in `svi_numpyro`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bayes_klrl.checks import check_count, check_positive, check_prompts_per_step
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, needs_jax
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import JaxModel

__all__ = ["ESTIMATORS", "OBJECTIVES", "SVI"]

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

    def trains_like(self, other: object) -> bool:
        """Return whether another recipe would train the same guide under one seed: all but `num_draws` is equal."""
        return isinstance(other, SVI) and replace(self, num_draws=other.num_draws) == other
