"""The training loop of `SVI`: a Pyro model, a Pyro guide, our ELBO, Adam."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pyro
import torch

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.inference.svi.loop import TrainingPlan, trained
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.inference.svi.pyro_backend.trust_region import TrustRegion
from bayes_klrl.inference.svi.refusals import no_adapter
from bayes_klrl.inference.svi.steps import MAX_GRADIENT_NORM, learning_rate_schedule
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.models.programs.pyro_program import on_model_device, pyro_guide, pyro_model
from bayes_klrl.models.programs.turns import PYRO_TURN, in_turn
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import check_seed
from bayes_klrl.typing import LanguageModel

__all__ = ["fit_guide", "trainable_guide"]

_ELBOS = {"leave_one_out": LeaveOneOutELBO, "rao_blackwell": RaoBlackwellELBO}


@in_turn(PYRO_TURN)
def fit_guide(plan: TrainingPlan, posterior: Posterior, *, seed: int, progress: bool) -> Fit:
    """Return the guide after `plan.num_steps` steps; see `SVI.fit`."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), on_model_device(posterior.prior):
        torch.manual_seed(check_seed(seed))
        guide = trainable_guide(posterior.prior, plan.adapter)
        steps = training_steps(plan, posterior, guide)
        so_far = guide.to_ngram if isinstance(guide, TableLM) else lambda: guide
        return trained(plan, posterior, steps, so_far, start=start, progress=progress)


def training_steps(plan: TrainingPlan, posterior: Posterior, guide: Any) -> Iterator[dict[str, float]]:
    """Train the guide in place, one gradient step per item; each item holds the step's means by name, in nats."""
    model = pyro_model(posterior, plan.prompts_per_step)
    program = pyro_guide(posterior, guide, plan.prompts_per_step)
    elbo = _ELBOS[plan.estimator](plan.num_particles)
    parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=plan.learning_rate or default_learning_rate(plan, guide))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate_schedule(plan.num_steps))
    trust_region = TrustRegion(parameters, plan.max_step_kl, elbo.guide_change)
    for _ in range(plan.num_steps):
        optimiser.zero_grad(set_to_none=True)
        elbo.loss_and_grads(model, program)
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        learning_rate = float(schedule.get_last_lr()[0])
        trust_region.step(optimiser)
        schedule.step()
        terms = elbo.last
        check_finite_weights(terms.log_weights, posterior)
        yield {
            "elbo": float(terms.log_weights.mean()),
            "reward": float(terms.log_likelihood.mean()) * posterior.alpha,
            "kl": float((terms.log_likelihood - terms.log_weights).mean()),
            "log_weight_sd": float(terms.log_weights.std(dim=0).mean()),
            "gradient_norm": float(norm),
            "learning_rate": learning_rate,
            "step_kl": trust_region.limit.last_kl,
            "tokens": terms.model_tokens,
        }


def check_finite_weights(log_weights: torch.Tensor, posterior: Posterior) -> None:
    """Refuse to go on once the guide's log-probs are NaN."""
    if not torch.isfinite(log_weights).all():
        half = getattr(posterior.prior, "half_precision", False)
        cure = (
            "Load the prior in float32: its weights have fewer bits." if half else "Lower learning_rate or max_step_kl."
        )
        raise BayesKLRLError(f"The guide's log-probs are no longer finite, so the training has diverged. {cure}")


def default_learning_rate(plan: TrainingPlan, guide: Any) -> float:
    """Return the default learning rate for the kind of guide: a table of logits, adapters, or all weights of a transformer."""
    if isinstance(guide, TableLM):
        return 0.1
    return 2e-3 if plan.adapter is None else 5e-3


def trainable_guide(prior: LanguageModel, adapter: Any) -> Any:
    """Return a trainable model that starts as the prior.

    An `NgramLM` becomes a torch table of logits; a `TorchLM` a copy of itself, or with `adapter` LoRA layers over its
    own frozen weights; any other model with torch parameters is copied.
    """
    if isinstance(prior, NgramLM):
        guide: Any = TableLM(prior)
    elif hasattr(prior, "with_adapter"):
        return prior.copy() if adapter is None else prior.with_adapter(adapter)  # type: ignore[attr-defined]
    elif hasattr(prior, "parameters"):
        guide = copy.deepcopy(prior)
        for parameter in guide.parameters():
            parameter.requires_grad_(True)
    else:
        raise BayesKLRLError(
            f"SVI needs a prior with torch parameters (a bk.TorchLM, a bk.NgramLM, or a language model with a "
            f"`parameters()` method); got a {type(prior).__name__}."
        )
    no_adapter(prior, adapter)
    return guide
