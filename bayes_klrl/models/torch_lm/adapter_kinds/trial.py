"""The check of a guide with an adapter, and the short trial of a kind that is not among the known ones, on a copy.

A kind may start as the prior and fail later: its log-probs depend on later tokens once it is trained, or its folder lacks what
its log-probs need. So the copy is moved as a training would move it; then its numbers are checked as those of any model are,
and it is saved, loaded by `peft` alone, and compared.
"""

from __future__ import annotations

import warnings
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.torch_lm.adapter_kinds.known import is_tried
from bayes_klrl.models.torch_lm.adapters import (
    can_be_merged,
    check_starts_as,
    duplicated,
    frozen,
    import_peft,
    merged,
    quiet_peft,
)
from bayes_klrl.models.torch_lm.self_check import apart, choose_network, own_log_probs, tolerance

__all__ = ["check_guide"]

STEP = 0.05
"""The standard deviation by which each trainable parameter is moved."""

CURE = "Use a kind of docs/adapters.md, such as peft.LoraConfig(r=8)."


def check_guide(guide: nn.Module, module: nn.Module, config: Any, vocab_size: int) -> None:
    """Refuse an adapter that does not start as the model under it, or is of a new kind that cannot be scored or saved.

    Parameters
    ----------
    guide
        The model with its untrained adapter; it does not change.
    module
        The model without it.
    config
        The adapter's configuration.
    vocab_size
        The width V of the logits.

    Raises
    ------
    BayesKLRLError
        If the log-probs differ before the training; if a moved copy has no log-probs of its own, or if its folder, or its
        merged weights, have others.
    """
    check_starts_as(guide, module, config, vocab_size)
    if not is_tried(config):
        try_kind(guide, module, config, vocab_size)


def try_kind(guide: nn.Module, module: nn.Module, config: Any, vocab_size: int) -> None:
    """Refuse an adapter that cannot be scored or saved once it is trained; see `check_guide`."""
    name = f"An adapter of {type(config).__name__}, which this version of bayes_klrl does not know,"
    with torch.random.fork_rng(), warnings.catch_warnings(), quiet_peft():
        warnings.simplefilter("ignore")  # what peft says of a folder that is gone at once
        trained = moved(guide)
        try:
            choose_network(trained, vocab_size, ())
        except CheckpointError as error:
            raise BayesKLRLError(f"{name} cannot be scored once it is trained. {CURE} ({error})") from error
        ids = [index * vocab_size // 5 for index in (1, 2, 3, 4)]
        own = own_log_probs(trained, ids[:2], ids[2:])
        copies = {"saved apart and loaded by peft": reloaded(trained, module)}
        if can_be_merged(trained):
            copies["merged"] = merged_or_none(trained)
    for way, other in copies.items():
        if other is None:
            continue
        if (gap := float(apart(own, own_log_probs(other, ids[:2], ids[2:])).max())) > tolerance(module, own):
            raise BayesKLRLError(f"{name} is another model by {gap:.2g} nats once it is {way}. {CURE}")


def moved(guide: nn.Module) -> nn.Module:
    """Return a copy whose trainable parameters are moved, the same way each time."""
    trained = duplicated(guide, {})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(STEP * noise.to(parameter))
    return trained.eval()


def reloaded(trained: Any, module: nn.Module) -> nn.Module:
    """Return a copy of the base with the adapter that was written to a folder and read from it."""
    with TemporaryDirectory() as folder:
        trained.save_pretrained(folder, save_embedding_layers=False)
        loaded: nn.Module = import_peft().PeftModel.from_pretrained(frozen(module, shared=False), folder)
        return loaded.eval()


def merged_or_none(trained: nn.Module) -> Any:
    """Return the model with the adapter in its weights; None if peft cannot merge it, as some kinds cannot."""
    try:
        return merged(trained).eval()
    except BayesKLRLError:
        return None
