"""What an algorithm would take on a posterior, before anything runs: `plan`."""

from __future__ import annotations

from typing import Any

import torch

from bayes_klrl.analysis.plan.needs import Needs, kept_bytes, needs_of, pass_budget
from bayes_klrl.analysis.plan.record import Plan
from bayes_klrl.analysis.plan.setting import Setting
from bayes_klrl.analysis.plan.work import work_of
from bayes_klrl.checks import check_finite, check_positive
from bayes_klrl.inference.svi.svi import SVI
from bayes_klrl.models.memory import free_memory
from bayes_klrl.models.torch_lm.lm import TorchLM
from bayes_klrl.posterior import Posterior

__all__ = ["plan"]


def plan(
    posterior: Posterior, algorithm: Any, *, memory: float | None = None, log_evidence: float | None = None
) -> Plan:
    """Return what an algorithm would take on a posterior: parameters, tokens, and the memory of each phase. Nothing is run.

    The prior need not be loaded: `bk.TorchLM.from_pretrained(folder, device="meta")` reads the configuration alone, and a
    `transformers` model that was made under `torch.device("meta")` does as well. The memory is an estimate from the model's
    configuration, for the peak beyond Python, torch and the reward function; measured peaks were 0.5 to 2 times as large.

    Parameters
    ----------
    posterior
        The posterior.
    algorithm
        `ImportanceSampling`, `BestOfN`, `RejectionSampling`, `QuasiRejection`, `SMC`, `AnnealedSMC`, `SuffixMH`, `Exact` or
        `SVI`; an `SVI` may also be the proposal of the others.
    memory
        The bytes that there are. None: the memory that is free now and what the prior has taken already, on the prior's
        device; of a prior that is not loaded, on the GPU if there is one, else the main memory.
    log_evidence
        log Z in nats, on which the number of proposals of rejection sampling depends. None: its worst case.

    Raises
    ------
    BayesKLRLError
        If there are no plans for the algorithm, or an argument is wrong.

    Examples
    --------
    Seven billion parameters, of which nothing is loaded:

    >>> import bayes_klrl as bk, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with torch.device("meta"):
    ...     prior = bk.TorchLM(LlamaForCausalLM(LlamaConfig()).to(torch.bfloat16))
    >>> ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    >>> posterior = bk.Posterior(prior, ones, prompts=[[1, 2, 3]], max_new_tokens=32)
    >>> planned = bk.plan(posterior, bk.SVI(num_steps=100, adapter="lora"), memory=24 * 2**30)
    >>> f"{planned.num_parameters:,}", planned.fits(), planned.fits(12 * 2**30)
    ('6,738,415,616', True, False)
    """
    for name, value, check in (("memory", memory, check_positive), ("log_evidence", log_evidence, check_finite)):
        if value is not None:
            check(name, value)
    prior: Any = posterior.prior
    is_torch = isinstance(prior, TorchLM)
    recipe = algorithm if isinstance(algorithm, SVI) else getattr(algorithm, "proposal", None)
    kept, num_trained = kept_bytes(prior, recipe if isinstance(recipe, SVI) else None) if is_torch else ({}, 0)
    available = int(memory) if memory is not None else memory_at_hand(prior, kept)
    budget = pass_budget(available, sum(kept.values()))
    work = work_of(algorithm, Setting(posterior, budget, log_evidence))
    sizes = prior.sizes if is_torch else None
    notes = work.notes
    if sizes is None:
        notes += (f"the memory of a {type(prior).__name__} is not estimated",)
    needs = Needs({}) if sizes is None or work.refusal else needs_of(posterior, work, sizes, budget)
    return Plan(
        type(algorithm).__name__,
        sum(parameter.numel() for parameter in prior.module.parameters()) if is_torch else 0,
        num_trained,
        work.tokens,
        work.training_tokens,
        kept,
        needs.phases,
        work.rows,
        needs.gradient_rows,
        needs.activation_bytes,
        needs.checkpointed_bytes,
        available,
        work.refusal,
        notes,
        work.is_bound,
    )


def memory_at_hand(prior: Any, kept: dict[str, int]) -> int | None:
    """Return the bytes that are free on the prior's device, with those that the prior has taken; None if not known."""
    if not isinstance(prior, TorchLM):
        return free_memory()
    if prior.unloaded:
        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else free_memory()
    free = prior.free_bytes()
    return None if free is None else free + kept["parameters of the prior"]
