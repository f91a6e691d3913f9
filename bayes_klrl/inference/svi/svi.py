"""Stochastic variational inference: train a guide q on the ELBO, which is exactly KL-regularised RL.

    E_q[r] / alpha - KL(q || p0) = ELBO(q) = log Z - KL(q || p*)

The guide is a copy of the prior, or LoRA adapters over its frozen weights. `SVI` is the recipe and `Fit` its result; the
training itself is in `pyro_backend`, and for a `JaxLM` in `numpyro_backend`.
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
        Number of gradient steps.
    num_particles
        Completions per prompt that each step draws, at least 2.
    learning_rate
        Adam's peak rate: 5 % warm-up, then linear decay to 0. None: 2e-3 for a full copy of the prior, 5e-3 for adapters,
        0.1 for an `NgramLM`.
    objective
        Name of the objective; "elbo" is the only one.
    estimator
        Name of the gradient estimator: "leave_one_out", which has variance zero at the posterior, or "rao_blackwell", which
        has a lower variance far from it (see `bayes_klrl.inference.svi.pyro_backend.elbo`).
    adapter
        None: every parameter of a copy of the prior is trained. "lora" or a `peft` configuration: adapters over the
        frozen prior are trained.
    num_draws
        Completions per prompt that `run` draws.
    max_step_kl
        The most nats that a step may move the guide; a longer step is shortened (see `pyro_backend.trust_region`). inf: no
        limit. Without a limit, a learning rate that suits one model makes another collapse onto one short completion.
    prompts_per_step
        Number of the P prompts that each step uses, drawn at random; None: all.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(num_steps=30).fit(posterior, seed=0)

    The guide as a proposal, whose draws are then corrected by importance weights:

    >>> draws = bk.ImportanceSampling(1000, proposal=fit.guide).run(posterior, seed=1)
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> bool(abs(draws.log_evidence[0] - exact.log_evidence[0]) < 0.1)
    True
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

        It may be called in several threads, where it gives what it gives alone: Pyro, and NumPyro, keep one stack of effect
        handlers for the whole process, so that each runs one training at a time, and the others wait for their turn. Programs
        that you run yourself meanwhile, under handlers of your own, are not kept apart from it: use processes for these, and for
        trainings that run at the same time.

        Raises
        ------
        UnboundedLossError
            If a draw has likelihood 0; the message names the completion and the cure. The attribute `fit` of this and of every
            other `BayesKLRLError` that ends the training after its first step holds what was learned.
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
