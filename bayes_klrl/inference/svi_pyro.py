"""The training loop of `SVI`: a Pyro model, a Pyro guide, our ELBO, Adam."""

from __future__ import annotations

import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch

from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.inference.svi_trust_region import TrustRegion
from bayes_klrl.models.ngram_lm import NgramLM
from bayes_klrl.models.pyro_model import on_model_device, pyro_guide, pyro_model
from bayes_klrl.models.torch_table import TableLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import check_seed
from bayes_klrl.typing import LanguageModel

if TYPE_CHECKING:
    from bayes_klrl.inference.svi import SVI, Fit

__all__ = ["fit_guide", "trainable_guide"]

_ELBOS = {"leave_one_out": LeaveOneOutELBO, "rao_blackwell": RaoBlackwellELBO}
_WARM_UP = 0.05
_MAX_GRADIENT_NORM = 1.0


def fit_guide(svi: SVI, posterior: Posterior, *, seed: int, progress: bool) -> Fit:
    """Return the guide after `svi.num_steps` steps; see `SVI.fit`."""
    from bayes_klrl.inference.svi import Fit

    start = time.perf_counter()
    history: dict[str, list[float]] = defaultdict(list)
    interrupted: list[bool] = []

    def fit_so_far() -> Fit:
        return Fit(
            guide=guide.to_ngram() if isinstance(guide, TableLM) else guide,
            history={name: np.array(values) for name, values in history.items() if name != "tokens"},
            posterior=posterior,
            training=Cost(training_tokens=int(sum(history["tokens"])), training_seconds=time.perf_counter() - start),
            interrupted=bool(interrupted),
        )

    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), on_model_device(posterior.prior):
        torch.manual_seed(check_seed(seed))
        guide = trainable_guide(posterior.prior, svi.adapter)
        try:
            with kept_on_interrupt(history, interrupted), track("SVI", svi.num_steps, progress) as advance:
                for step in training_steps(svi, posterior, guide):
                    for name, value in step.items():
                        history[name].append(value)
                    history["seconds"].append(time.perf_counter() - start)
                    advance(status=f"ELBO {step['elbo']:.3f} nats, E[r] {step['reward']:.3f}, KL {step['kl']:.3f}")
        except BayesKLRLError as error:
            if history["seconds"]:
                error.fit = fit_so_far()
                error.add_note(f"The guide after the {len(history['seconds'])} steps before is in this error's `fit`.")
            raise
    return fit_so_far()


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
        norm = torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
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
            "step_kl": trust_region.last_kl,
            "tokens": terms.model_tokens,
        }


def default_learning_rate(svi: SVI, guide: Any) -> float:
    """Return what suits the kind of guide: a table of logits, adapters, or all the weights of a transformer."""
    if isinstance(guide, TableLM):
        return 0.1
    return 2e-3 if svi.adapter is None else 5e-3


def learning_rate_schedule(num_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: up over the first 5 %, then linearly down to 0."""
    warm_up = max(1, round(_WARM_UP * num_steps))
    return lambda step: min((step + 1) / warm_up, (num_steps - step) / max(1, num_steps - warm_up), 1.0)


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
    if adapter is not None:
        raise BayesKLRLError(f"Adapters are for a bk.TorchLM; the prior is a {type(prior).__name__}. Use adapter=None.")
    return guide


@contextmanager
def kept_on_interrupt(history: dict[str, list[float]], interrupted: list[bool]) -> Iterator[None]:
    """Turn Ctrl-C after the first step into the end of training, and note it in `interrupted`."""
    try:
        yield
    except KeyboardInterrupt:
        if not history["seconds"]:
            raise
        interrupted.append(True)
        with suppress(UserWarning):  # where warnings are errors: what was learned matters more
            warnings.warn(
                f"SVI was interrupted after {len(history['seconds'])} steps. What it learned is kept: the guide so far is "
                "in the returned Fit (fit.guide), and fit.save(folder) writes it.",
                stacklevel=4,
            )
