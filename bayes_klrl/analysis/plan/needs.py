"""The memory of an algorithm's work, item by item, from the sizes of a transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bayes_klrl.analysis.plan.setting import Work
from bayes_klrl.inference.svi.optimizers import KLSGD, Natural, optimizer_of
from bayes_klrl.inference.svi.pyro_backend.training import default_optimizer
from bayes_klrl.inference.svi.svi import SVI
from bayes_klrl.models.memory import SHARE
from bayes_klrl.models.passes import FLOATS_PER_PASS, fits
from bayes_klrl.models.torch_lm.adapters import adapted
from bayes_klrl.models.torch_lm.lm import TorchLM
from bayes_klrl.models.torch_lm.scoring import BUDGET
from bayes_klrl.models.torch_lm.sizes import Sizes
from bayes_klrl.posterior import Posterior

__all__ = ["Needs", "kept_bytes", "needs_of", "parameter_bytes", "trained_parameters"]

_LOGIT_COPIES = 3  # logits, their log-softmax, and what the inverse distribution function takes
_OPTIMIZER_COPIES = 3  # Adam's two moments, or momentum and step, and the parameters before the step


@dataclass(frozen=True)
class Needs:
    """The memory of the phases of an algorithm, see `Plan`."""

    phases: Mapping[str, Mapping[str, int]]
    gradient_rows: int | None = None
    activation_bytes: int = 0
    checkpointed_bytes: int = 0


def parameter_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def trained_parameters(prior: TorchLM, recipe: SVI) -> tuple[int, int]:
    """Return the number of parameters that a training changes, and their bytes.

    Adapters are made, on the device "meta", and counted; the prior's weights are neither read nor copied.
    """
    if recipe.adapter is None:
        return sum(parameter.numel() for parameter in prior.module.parameters()), parameter_bytes(prior.module)
    with torch.device("meta"):
        guide: Any = adapted(prior.module, recipe.adapter)
    trained = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    return sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)


def kept_bytes(prior: TorchLM, recipe: SVI | None) -> tuple[dict[str, int], int]:
    """Return what is in memory all the time, and the number of trained parameters."""
    kept = {"parameters of the prior": parameter_bytes(prior.module)}
    if recipe is None:
        return kept, 0
    number, size = trained_parameters(prior, recipe)
    copies = _OPTIMIZER_COPIES
    kept["parameters of the guide" if recipe.adapter is None else "adapters of the guide"] = size
    kept |= {"gradients": size, f"optimizer ({optimizer_name(prior, recipe)})": copies * size}
    return kept, number


def optimizer_name(prior: TorchLM, recipe: SVI) -> str:
    """Return the name of the optimizer that a recipe would train by."""
    chosen = optimizer_of(recipe.optimizer or default_optimizer(recipe, prior))
    return "kl_sgd" if isinstance(chosen, KLSGD) else "natural" if isinstance(chosen, Natural) else "adam"


def needs_of(posterior: Posterior, work: Work, sizes: Sizes, budget: int | None) -> Needs:
    """Return the memory of the phases of some work.

    Parameters
    ----------
    posterior, work, sizes
        The posterior, the work, and the sizes of its prior.
    budget
        Bytes that one pass may take; None: no bound.
    """
    longest, num_tokens = max(len(ids) for ids in posterior.prompt_ids), posterior.max_new_tokens
    rows = max(1, work.rows)
    table = rows * sizes.vocab_size
    at_once = table if fits(rows, sizes.vocab_size) else FLOATS_PER_PASS
    prompts_at_once = min(posterior.num_prompts, rows)
    phases: dict[str, dict[str, int]] = {
        "decoding": {
            "key-value cache": work.num_models * rows * sizes.row_bytes(longest + num_tokens),
            "prompts": prompts_at_once * sizes.prompt_bytes(longest),
            "logits": _LOGIT_COPIES * 4 * at_once,
            "draws": posterior.num_prompts * work.num_draws * (8 * num_tokens + 48),
        }
    }
    if work.training is None:
        return Needs(phases)
    phases["decoding"]["key-value cache"] = rows * sizes.row_bytes(longest + num_tokens)  # the guide alone draws
    recompute, sizes = work.training.gradient_checkpointing, replace(sizes, adapted=work.training.adapter is not None)
    each = sizes.scoring_bytes(longest, num_tokens, gradient=True, recompute=recompute)
    most = BUDGET // (num_tokens * sizes.inner_size)
    within = work.rows_per_backward if budget is None else budget // each
    chunk = max(1, min(work.rows_per_backward, within, most))
    logits = min(chunk * num_tokens * sizes.vocab_size, BUDGET)
    phases["gradient"] = {
        "activations": chunk * each,
        "logits": _LOGIT_COPIES * 4 * logits,
        "scores": 8 * 4 * work.step_rows * num_tokens,
    }
    stored, less = (
        work.step_rows * sizes.scoring_bytes(longest, num_tokens, gradient=True, recompute=again)
        for again in (False, True)
    )
    return Needs(phases, chunk, stored, less)


def pass_budget(available: int | None, kept: int) -> int | None:
    """Return the bytes that one pass may take, once what is kept is in memory."""
    return None if available is None else max(1, int(SHARE * (available - kept)))
