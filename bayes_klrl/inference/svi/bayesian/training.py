"""The training loop of `BayesianSVI`: Adam on the mean and the scale of every parameter. Experimental."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor

from bayes_klrl.draws import Cost
from bayes_klrl.inference.svi.bayesian.programs import MeanField, PolicyELBO, PolicyPlan, policy_programs, predictive
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.inference.svi.loop import run_training
from bayes_klrl.inference.svi.pyro_backend.trust_region import TrustRegion
from bayes_klrl.inference.svi.steps import learning_rate_schedule
from bayes_klrl.models.programs.pyro_program import on_model_device
from bayes_klrl.models.programs.turns import PYRO_TURN, in_turn
from bayes_klrl.models.torch_lm.offsets import OffsetFamily, offset_family
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import check_seed
from bayes_klrl.typing import FloatArray

__all__ = ["default_learning_rate", "fit_policies", "training_steps"]

_SCALE_RATE = 0.05

FitT = TypeVar("FitT", bound=Fit)


@in_turn(PYRO_TURN)
def fit_policies(
    plan: PolicyPlan, posterior: Posterior, made: Callable[..., FitT], *, seed: int, progress: bool
) -> FitT:
    """Return the fit that `made` makes from the Gaussian after `plan.num_steps` steps; see `BayesianSVI.fit`.

    Parameters
    ----------
    plan, posterior
        The numbers of the training, and the posterior that policies approximate.
    made
        Function that makes a `BayesianFit` from all its fields but the recipe, given by keyword.
    seed, progress
        Seed for all random numbers, and whether to show progress.
    """
    start = time.perf_counter()
    seed = check_seed(seed)
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), on_model_device(posterior.prior):
        torch.manual_seed(seed)
        family = offset_family(posterior.prior, plan.parameters)
        start_scale = plan.initial_scale or plan.prior_scale / 10
        mean_field = MeanField.of(np.zeros(family.size), np.full(family.size, start_scale), family.device)

        def fit_so_far(history: Mapping[str, FloatArray], cost: Cost, interrupted: bool) -> FitT:
            mu, sigma = (value.detach().cpu().numpy().copy() for value in (mean_field.mu, mean_field.log_sigma.exp()))
            return made(
                guide=predictive(family, mu, sigma, plan.num_predictive, seed),
                history=history,
                posterior=posterior,
                training=cost,
                interrupted=interrupted,
                mu=mu,
                sigma=sigma,
                seed=seed,
                family=family,
            )

        def status(step: Mapping[str, float]) -> str:
            return f"E[ELBO] {step['elbo']:.3f} nats, KL of the policy's parameters {step['policy_kl']:.1f}"

        steps = training_steps(plan, posterior, family, mean_field)
        return run_training("BayesianSVI", plan.num_steps, steps, fit_so_far, status, start=start, progress=progress)


def training_steps(
    plan: PolicyPlan, posterior: Posterior, family: OffsetFamily, mean_field: MeanField
) -> Iterator[dict[str, float]]:
    """Train the Gaussian in place, one gradient step per item; each item holds the step's means by name, in nats."""
    model, guide = policy_programs(plan, posterior, family, mean_field)
    elbo = PolicyELBO(plan.num_policies)
    parameters = [mean_field.mu, mean_field.log_sigma]
    rate = plan.learning_rate or default_learning_rate(plan, family)
    optimiser = torch.optim.Adam([{"params": [mean_field.mu]}, {"params": [mean_field.log_sigma]}], lr=rate)
    optimiser.param_groups[1]["lr"] = max(rate, _SCALE_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate_schedule(plan.num_steps))
    noise: list[Tensor] = []
    trust_region = TrustRegion(parameters, plan.max_step_kl, lambda: elbo.guide_change(family, mean_field, noise))
    for _ in range(plan.num_steps):
        optimiser.zero_grad(set_to_none=True)
        elbo.loss_and_grads(model, guide)
        noise[:] = elbo.noise(mean_field)
        learning_rate = float(schedule.get_last_lr()[0])
        trust_region.step(optimiser)
        schedule.step()
        gradient = torch.cat([parameter.grad for parameter in parameters if parameter.grad is not None])
        yield {
            "elbo": float(elbo.log_weights.mean()),
            "reward": float(elbo.log_likelihood.mean()) * posterior.alpha,
            "kl": float((elbo.log_likelihood - elbo.log_weights).mean()),
            "policy_kl": elbo.policy_kl,
            "log_weight_sd": float(elbo.log_weights.std(dim=1).mean()),
            "gradient_norm": float(gradient.norm()),
            "learning_rate": learning_rate,
            "step_kl": trust_region.limit.last_kl,
            "tokens": elbo.model_tokens,
        }


def default_learning_rate(plan: PolicyPlan, family: OffsetFamily) -> float:
    """Return the default learning rate for the kind of parameters, as for `SVI`."""
    if isinstance(family.lm, TableLM):
        return 0.1
    return 2e-3 if plan.parameters == "all" else 5e-3
