"""Guides made from a prior: an independent copy, or a LoRA adapter on shared frozen weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.torch_lm.network import base_model

__all__ = ["adapted", "frozen", "import_peft", "merged", "quiet_peft", "shared_copy", "trainable_copy"]


def trainable_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy with all parameters trainable."""
    duplicate = copy.deepcopy(module).requires_grad_(True)
    return duplicate.eval()


def shared_copy(module: nn.Module) -> nn.Module:
    """Return a copy of the modules around the same weights, frozen; layers of the copy may be replaced.

    Its parameters share storage with the original ones, so an in-place change of one changes the other. Tied parameters stay
    tied.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in module.parameters()
    }
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def frozen(module: nn.Module) -> Any:
    """Return a frozen model to put an adapter on, with earlier adapters merged; the given module does not change."""
    return merged(module) if hasattr(module, "peft_config") else shared_copy(module)


def adapted(module: nn.Module, config: Any) -> nn.Module:
    """Return a PEFT model that gives exactly the outputs of `module` until its adapter is trained."""
    peft = import_peft()
    base = frozen(module)
    if config == "lora":
        config = default_lora(peft, base)
    if not isinstance(config, peft.PeftConfig):
        raise BayesKLRLError(f"adapter is 'lora' or a peft configuration such as peft.LoraConfig(r=8); got {config!r}.")
    try:
        with quiet_peft():
            wrapped: nn.Module = peft.get_peft_model(base, config)
    except (KeyError, RuntimeError, ValueError) as error:  # the errors of peft for a model that it cannot adapt
        raise BayesKLRLError(
            f"peft cannot put this adapter on a {type(base).__name__}: {error}. Name its layers in "
            "peft.LoraConfig(target_modules=[...]), or train a full copy (adapter=None)."
        ) from error
    return wrapped.eval()


def default_lora(peft: Any, module: Any) -> Any:
    """Return a LoRA configuration of rank 8 on all linear layers except the head, without dropout."""
    return peft.LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
        task_type="SEQ_2_SEQ_LM" if module.config.is_encoder_decoder else "CAUSAL_LM",
    )


def merged(module: nn.Module) -> Any:
    """Return the Hugging Face model with its adapters added to the weights; the given module does not change."""
    if not hasattr(module, "peft_config"):
        return base_model(module)
    duplicate: Any = copy.deepcopy(module)
    return duplicate.merge_and_unload()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence a warning of transformers 5.23 about an attribute that peft 0.21 reads and that will be renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def import_peft() -> Any:
    """Return the peft package; raise an error that says how to install it if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise BayesKLRLError("Adapters need the peft package: pip install 'bayes_klrl[lora]'") from error
    return peft
