"""Stochastic variational inference: train a guide q on the ELBO, which is exactly KL-regularised RL.

    E_q[r] / alpha - KL(q || p0) = ELBO(q) = log Z - KL(q || p*)

The guide is a copy of the prior, or LoRA adapters over its frozen weights. `SVI` is the recipe and `Fit` its result; the
training itself is in `pyro_backend`, and for a `JaxLM` in `numpyro_backend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.checks import check_count, check_fraction, check_positive, check_posterior_given, check_prompts_per_step
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, needs_jax
from bayes_klrl.inference.svi.callbacks import Callback, Checkpoint
from bayes_klrl.inference.svi.callbacks.alphas import alpha_schedule
from bayes_klrl.inference.svi.checkpoint import fingerprint, lasting_name
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.inference.svi.loop import Habits
from bayes_klrl.inference.svi.objectives import ELBO, LogVariance, LossObjective, objective_of
from bayes_klrl.inference.svi.optimizers import Natural, optimizer_of
from bayes_klrl.inference.svi.ranks.group import launched_ranks
from bayes_klrl.inference.svi.ranks.start import check_can_share, check_same_training
from bayes_klrl.inference.svi.refusals import no_other_alpha
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import JaxModel

__all__ = ["ESTIMATORS", "SVI"]

ESTIMATORS = ("leave_one_out", "rao_blackwell")


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
        Adam's peak rate: 5 % warm-up, then linear decay to 0; giving it chooses Adam. None, where Adam is used: 2e-3 for a
        full copy of the prior, 5e-3 for adapters, 0.1 for an `NgramLM`.
    objective
        What is minimised: "elbo", "log_variance", "forward_kl", "js" or "tv" (see `svi.objectives`), an object with the
        method `weights` of these, or any loss that `bk.audit` takes: a function of `bk.LossInputs`, which gets the completions
        of one prompt at a time.
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
        Number of the P prompts that each step uses; None: all. They come in shuffled epochs, so each is used equally often,
        and which ones a step uses is a function of the seed and the number of the step alone.
    optimizer
        "adam", "kl_sgd", "natural", or a recipe such as `bk.KLSGD(momentum=0.9)`. None: "kl_sgd" for a `TorchLM` of at
        least 200,000 parameters with the ELBO, where it is measured to end nearer to the posterior with fewer completions;
        "adam" for smaller models, for tables, for a JaxLM, and wherever `learning_rate` is given. On small problems "natural"
        needs a tenth of Adam's steps, each of which takes several times as long.
    twist
        The critic: a twist or a recipe of one, as SMC takes them, which gives each token an advantage of its own (see
        `svi.objectives.critics`). `bk.PartialRewardTwist()` scores the prefixes of completions, and "hidden_states" is a
        linear head on the prior's hidden states (take discount=1 with it); both learn during the training. None: the former
        with "kl_sgd", unless rewards of prefixes would take much longer than the rest of a step, which a warning says; none
        with "adam". "none": every token of a completion has the weight of the completion.
    discount
        lambda of the critic's advantages, in [0, 1]. At 1 the gradient is unbiased whatever the critic; lower values have less
        variance.
    initial_guide
        A language model that the training starts from, such as the guide of an earlier fit, on JAX if the prior is; None: the
        prior. Of one with a trainable PEFT adapter the adapter alone is trained.
    particles_per_pass
        Completions per prompt that are differentiated at once, to bound memory; None: all. The gradient is the same up to
        rounding.
    gradient_checkpointing
        True, to bound memory: the backward pass computes the activations inside each block of the network again instead of
        reading stored ones. The gradient is the same up to rounding. For a `TorchLM` of any architecture whose blocks are in a
        list; it may be used together with `particles_per_pass`.

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
    objective: Any = "elbo"
    estimator: str = "leave_one_out"
    adapter: Any = field(default=None, hash=False)  # a peft configuration has no hash
    num_draws: int = 1000
    max_step_kl: float = 0.03
    prompts_per_step: int | None = None
    optimizer: Any = None
    twist: Any = None
    discount: float = 0.85
    initial_guide: Any = None
    particles_per_pass: int | None = None
    gradient_checkpointing: bool = False

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
        objective = objective_of(self.objective)
        if self.optimizer is not None:
            optimizer_of(self.optimizer)
        check_fraction("discount", self.discount)
        if self.particles_per_pass is not None:
            check_count("particles_per_pass", self.particles_per_pass)
        if not isinstance(self.gradient_checkpointing, bool):
            raise BayesKLRLError(f"gradient_checkpointing is True or False; got {self.gradient_checkpointing!r}.")
        if self.optimizer is not None and isinstance(optimizer_of(self.optimizer), Natural):
            own = self.twist in (None, "none") and isinstance(objective, ELBO) and self.estimator == "leave_one_out"
            if not own or self.particles_per_pass is not None or self.gradient_checkpointing:
                raise BayesKLRLError(
                    'optimizer="natural" has a gradient of its own, that of the ELBO from whole completions. Leave out twist, '
                    "objective, estimator, particles_per_pass and gradient_checkpointing."
                )
        if self.particles_per_pass is not None and isinstance(objective, LossObjective):
            raise BayesKLRLError("A loss reads all completions of a prompt at once. Leave particles_per_pass out.")
        if self.particles_per_pass is not None and getattr(objective, "sampler", None) is not None:
            raise BayesKLRLError(
                "particles_per_pass is for the guide's own draws; here its sampler draws. Leave it out."
            )
        if self.particles_per_pass is not None and isinstance(objective, LogVariance) and objective.replay:
            raise BayesKLRLError("particles_per_pass is for draws of the step alone; leave it out with replay.")
        has_critic = self.twist is not None and self.twist != "none"
        if has_critic and not isinstance(objective, ELBO):
            raise BayesKLRLError(
                f'A critic (twist=) is for objective="elbo"; got {self.objective!r}. Leave the twist out.'
            )
        if self.estimator != "leave_one_out" and (has_critic or not isinstance(objective, ELBO)):
            raise BayesKLRLError(
                f'estimator={self.estimator!r} is one of objective="elbo" without a critic. Leave estimator out.'
            )
        if self.estimator not in ESTIMATORS:
            raise BayesKLRLError(
                f"Unknown estimator {self.estimator!r}; choose one of {list(ESTIMATORS)}. Stock Pyro losses are not "
                "offered: RenyiELBO has gradient 0 on a sequence site, Trace_ELBO no baseline (use them on "
                "posterior.pyro_model() if you must)."
            )

    def fit(
        self,
        posterior: Posterior,
        *,
        seed: int,
        progress: bool = False,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | Path | Checkpoint | None = None,
        resume: str | Path | None = None,
    ) -> Fit:
        """Return the trained guide with its history. Ctrl-C ends training early and keeps what was learned.

        Parameters
        ----------
        posterior, seed, progress
            The posterior, the seed for all random numbers, and whether to show progress.
        callbacks
            Functions of each step's `StepRecord` and the guide so far, such as `EarlyStopping` and `CertifyEvery`; one that
            returns True ends the training. One with the method `next_alpha`, such as `AnnealedAlpha` and `AdaptiveAlpha`,
            chooses the alpha of each step; `Fit.posterior` is then that of the last one.
        checkpoint
            A folder, or a `Checkpoint`: the state of the training is written there every so many steps (10), whole or not at
            all.
        resume
            The folder of a checkpoint to go on from. The guide is then that of a training that was never interrupted, to the
            bit. It may be the same folder as `checkpoint`.

        It may be called in several threads, where it gives what it gives alone: Pyro, and NumPyro, keep one stack of effect
        handlers for the whole process, so that each runs one training at a time, and the others wait for their turn. Programs
        that you run yourself meanwhile, under handlers of your own, are not kept apart from it: use processes for these, and
        for trainings that run at the same time.

        In processes that `accelerate launch` has started they train one guide together: each draws and scores some of the
        completions of every step, rank 0 calls the callbacks and writes, and all return the same guide (docs/ranks.md).

        Raises
        ------
        UnboundedLossError
            If a draw has likelihood 0; the message names the completion and the cure. The attribute `fit` of this and of every
            other error that ends the training after its first step, one of a callback too, holds what was learned.
        """
        check_posterior_given(posterior)
        check_prompts_per_step(self.prompts_per_step, posterior.num_prompts)
        ranks = launched_ranks()
        with ranks.together():
            check_can_share(self, posterior.prior, ranks)
        if isinstance(posterior.prior, JaxModel):
            with needs_jax("SVI on a model on JAX"):
                from bayes_klrl.inference.svi.numpyro_backend.training import fit_guide
        else:
            from bayes_klrl.inference.svi.pyro_backend.training import fit_guide
        resume = resume.folder if isinstance(resume, Checkpoint) else resume
        if isinstance(callbacks, str) or not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
            raise BayesKLRLError(f"callbacks is a list of functions of (record, guide); got {callbacks!r}.")
        if alpha_schedule(callbacks) is not None:
            posterior.at_alpha(posterior.alpha)  # refused here, before any work
            if isinstance(posterior.prior, JaxModel):
                raise no_other_alpha()
        written = checkpoint if checkpoint is None or isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        is_needed = written is not None or resume is not None or ranks.size > 1
        with ranks.together():
            belonging = self._belonging(posterior, seed, alpha_schedule(callbacks), needed=is_needed)
        with ranks.together():
            check_same_training(belonging[0], ranks)
        habits = Habits(tuple(callbacks), written, resume, *belonging, ranks)
        return fit_guide(self, posterior, habits, seed=seed, progress=progress)

    def _belonging(
        self, posterior: Posterior, seed: int, schedule: Any, *, needed: bool
    ) -> tuple[Mapping[str, Any], str]:
        """Return what checkpoints belong to, if that is needed, and the framework of their arrays."""
        on_jax = isinstance(posterior.prior, JaxModel)
        backend, framework = ("numpyro", "np") if on_jax else ("pyro", "pt")
        if not needed:
            return {}, framework
        recipe = {f.name: lasting_name(getattr(self, f.name)) for f in fields(self) if f.name != "num_draws"}
        if self.initial_guide is not None:
            recipe["initial_guide"] = type(self.initial_guide).__name__
        if schedule is not None:
            recipe["schedule of alpha"] = lasting_name(schedule)
        return fingerprint(posterior, recipe, seed, backend, version("jax" if on_jax else "torch")), framework

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """Return draws from the trained guide, with `Draws.guide` set; see `Fit.run`."""
        return self.fit(posterior, seed=seed, progress=progress).run(self.num_draws, seed, progress=progress)

    def trains_like(self, other: object) -> bool:
        """Return whether another recipe would train the same guide under one seed: all but `num_draws` is equal."""
        return isinstance(other, SVI) and replace(self, num_draws=other.num_draws) == other
