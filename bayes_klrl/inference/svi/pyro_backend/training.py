"""The training loop of `SVI`: a Pyro model, a Pyro guide, our ELBO, Adam."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyro
import torch

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.loop import MAX_GRADIENT_NORM, learning_rate_schedule, no_adapter, trained
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.inference.svi.pyro_backend.trust_region import TrustRegion
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.models.programs.pyro_program import on_model_device, pyro_guide, pyro_model
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import check_seed
from bayes_klrl.typing import LanguageModel

if TYPE_CHECKING:
    from bayes_klrl.inference.svi.svi import SVI, Fit

__all__ = ["fit_guide", "trainable_guide"]

_ELBOS = {"leave_one_out": LeaveOneOutELBO, "rao_blackwell": RaoBlackwellELBO}


def fit_guide(svi: SVI, posterior: Posterior, *, seed: int, progress: bool) -> Fit:
    """Return the guide after `svi.num_steps` steps; see `SVI.fit`."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), on_model_device(posterior.prior):
        torch.manual_seed(check_seed(seed))
        guide = trainable_guide(posterior.prior, svi.adapter)
        steps = training_steps(svi, posterior, guide)
        so_far = guide.to_ngram if isinstance(guide, TableLM) else lambda: guide
        return trained(svi, posterior, steps, so_far, start=start, progress=progress)


def training_steps(svi: SVI, posterior: Posterior, guide: Any) -> Iterator[dict[str, float]]:
    """Train the guide in place, one gradient step an item; each item says what the step saw, in nats."""
    model = pyro_model(posterior, svi.prompts_per_step)
    program = pyro_guide(posterior, guide, svi.prompts_per_step)
    elbo = _ELBOS[svi.estimator](svi.num_particles)
    parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=svi.learning_rate or default_learning_rate(svi, guide))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate_schedule(svi.num_steps))
    trust_region = TrustRegion(parameters, svi.max_step_kl, elbo.guide_change)
    for _ in range(svi.num_steps):
        optimiser.zero_grad(set_to_none=True)
        elbo.loss_and_grads(model, program)
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        learning_rate = float(schedule.get_last_lr()[0])
        trust_region.step(optimiser)
        schedule.step()
        terms = elbo.last
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


def default_learning_rate(svi: SVI, guide: Any) -> float:
    """Return what suits the kind of guide: a table of logits, adapters, or all the weights of a transformer."""
    if isinstance(guide, TableLM):
        return 0.1
    return 2e-3 if svi.adapter is None else 5e-3


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
