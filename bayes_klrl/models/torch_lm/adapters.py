"""Guides made from a prior: an independent copy, or a LoRA adapter on shared frozen weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from bayes_klrl.errors import BayesKLRLError, needs
from bayes_klrl.models.torch_lm.adapter_kinds.known import ZERO_START, cannot_be_merged, check_can_be_guide, kind_of
from bayes_klrl.models.torch_lm.network import base_model
from bayes_klrl.models.torch_lm.self_check import apart, own_log_probs, tolerance

__all__ = [
    "adapted",
    "can_be_merged",
    "check_starts_as",
    "frozen",
    "import_peft",
    "merged",
    "quiet_peft",
    "shared_copy",
    "trainable_copy",
]


def trainable_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy with all parameters trainable."""
    check_has_gradients(module)
    duplicate = duplicated(module, {}).requires_grad_(True)
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
    return duplicated(module, memo)


def duplicated(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy; peft keeps views of tied weights in its layers, which torch alone refuses to copy."""
    for part in module.modules():
        tied = getattr(part, "kwargs", {}).get("tied_adapter") or {}
        memo |= {id(view): view.detach().clone() for view in tied.values()}
    return copy.deepcopy(module, memo)


def frozen(module: nn.Module, *, shared: bool) -> Any:
    """Return a frozen model to put an adapter on, with earlier adapters merged; the given module does not change.

    Parameters
    ----------
    module
        The model, with or without adapters.
    shared
        True: the weights are the given module's own; False: they are copied, for adapters that write into them.
    """
    if hasattr(module, "peft_config"):
        return merged(module)
    return shared_copy(module) if shared else duplicated(module, {}).requires_grad_(False)


def leaves_base_alone(config: Any) -> bool:
    """Return whether an adapter is known to write nothing into the weights of its base, when it is made or trained.

    Biases that are trained are the base's own; OLoRA and its like begin with a decomposition of the base's weights.
    """
    if config == "lora":
        return True
    kind = str(getattr(getattr(config, "peft_type", ""), "value", getattr(config, "peft_type", "")))
    plain = kind == "LORA" or getattr(config, "is_prompt_learning", False)
    return (
        plain
        and getattr(config, "bias", "none") == "none"
        and getattr(config, "init_lora_weights", True)
        in (
            True,
            False,
            "gaussian",
        )
    )


def adapted(module: nn.Module, config: Any) -> nn.Module:
    """Return a PEFT model that gives exactly the outputs of `module` until its adapter is trained."""
    peft = import_peft()
    check_has_gradients(module)
    check_can_be_guide(config)
    base = frozen(module, shared=leaves_base_alone(config))
    if config == "lora":
        config = default_lora(peft, base)
    if not isinstance(config, peft.PeftConfig):
        raise BayesKLRLError(f"adapter is 'lora' or a peft configuration such as peft.LoraConfig(r=8); got {config!r}.")
    try:
        with quiet_peft():
            wrapped: nn.Module = peft.get_peft_model(base, config)
    except (
        AttributeError,
        ImportError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # the errors of peft for a model that it cannot adapt
        if isinstance(error, ImportError):
            raise BayesKLRLError(f"peft cannot make an adapter of {type(config).__name__}: {error}") from error
        raise BayesKLRLError(
            f"peft cannot put this adapter on a {type(base).__name__}: {error}. Name its layers in "
            "peft.LoraConfig(target_modules=[...]), or train a full copy (adapter=None)."
        ) from error
    return wrapped.eval()


def check_starts_as(guide: nn.Module, module: nn.Module, config: Any, vocab_size: int) -> None:
    """Refuse an adapter that changes the model before it is trained, as virtual tokens do."""
    ids = [index * vocab_size // 5 for index in (1, 2, 3, 4)]
    own, started = (own_log_probs(each, ids[:2], ids[2:]) for each in (module, guide))
    if (gap := float(apart(own, started).max())) > 0.1 * tolerance(module, own):
        option = ZERO_START.get(kind_of(config))
        raise BayesKLRLError(
            f"An adapter of {type(config).__name__} changes log-probs by {gap:.2g} nats before it is trained, so the guide "
            f"would not start as this model. {f'Give it {option}, or use' if option else 'Use'} an adapter that starts at 0, "
            "such as peft.LoraConfig(r=8); or start from a model that you wrap yourself: "
            "bk.SVI(initial_guide=bk.TorchLM(peft.get_peft_model(model, config)))."
        )


def default_lora(peft: Any, module: Any) -> Any:
    """Return a LoRA configuration of rank 8 on all linear layers, the head among them, without dropout.

    peft's own "all-linear" leaves out the head, which says which tokens the reward likes: on the shipped model the guide then
    ends 2.3 nats from its posterior instead of 1.5 (`benchmarks/bench_posterior.py lora`).
    """
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    return peft.LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=linear,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
        task_type="SEQ_2_SEQ_LM" if module.config.is_encoder_decoder else "CAUSAL_LM",
    )


def check_has_gradients(module: nn.Module) -> None:
    """Refuse to make a guide of a model that has no gradients without dropout."""
    if any(type(part).__name__ == "ReformerModel" for part in module.modules()):
        raise BayesKLRLError(
            "A Reformer computes gradients in training mode only, where dropout is on, so it cannot be a guide. It can be a "
            "prior: use SMC, importance sampling or SuffixMH."
        )


def can_be_merged(module: nn.Module) -> bool:
    """Return whether a model's adapters can be added to its weights; virtual tokens cannot."""
    if not hasattr(module, "peft_config"):
        return True
    return hasattr(getattr(module, "base_model", None), "merge_and_unload") and not cannot_be_merged(module)


def merged(module: nn.Module) -> Any:
    """Return the Hugging Face model with its adapters added to the weights; the given module does not change.

    Raises
    ------
    BayesKLRLError
        If an adapter cannot be added to the weights.
    """
    if not hasattr(module, "peft_config"):
        return base_model(module)
    if getattr(module, "_hf_peft_config_loaded", False):
        raise BayesKLRLError(
            "This model has an adapter that transformers put on it (model.add_adapter). Put it on with peft.get_peft_model or "
            "peft.PeftModel.from_pretrained instead, so that it can be merged."
        )
    kinds = ", ".join(sorted({type(config).__name__ for config in module.peft_config.values()}))  # type: ignore[operator]
    refused = (
        f"An adapter of {kinds} cannot be added to the model's weights. Train another adapter from the model without it, or "
        "save it as an adapter."
    )
    if not can_be_merged(module):
        raise BayesKLRLError(refused)
    duplicate: Any = duplicated(module, {})
    untie_adapted(duplicate)
    tied = getattr(base_model(duplicate).config, "tie_word_embeddings", False)
    try:
        model = duplicate.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError) as error:  # peft's, for what it cannot merge
        raise BayesKLRLError(f"{refused} ({error})") from error
    if any(
        len(places) > 1 for places in places_of_weights(model)
    ):  # peft compares the head with the encoder's embedding
        model.config.tie_word_embeddings = tied
    return model


def untie_adapted(module: Any) -> None:
    """Give every layer under an adapter weights of its own; shared ones would change in another layer, too."""
    adapted_layers = {id(part.base_layer) for part in module.modules() if hasattr(part, "base_layer")}
    for places in places_of_weights(module):
        if len(places) > 1 and any(id(part) in adapted_layers for part, _ in places):
            for part, name in places[1:]:
                part._parameters[name] = nn.Parameter(getattr(part, name).detach().clone(), requires_grad=False)
            for config in (base_model(module).config, base_model(module).config.get_text_config()):
                config.tie_word_embeddings = False


def places_of_weights(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return for each parameter the layers that hold it, with its name there; several for tied weights."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, name))
    return list(places.values())


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what peft 0.21 says of an attribute that will be renamed, of a tied head, and of layers of two kinds.

    A tied head matters when adapters are merged, and `merged` gives it weights of its own. GPT-2 has Conv1D layers and a
    Linear head, for each of which peft sets `fan_in_fan_out` as it has to be.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        for message in ("Model has `tie_word_embeddings=True`", "fan_in_fan_out is set to"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def import_peft() -> Any:
    """Return the peft package; raise an error that says how to install it if it is missing."""
    with needs("An adapter", "lora", "peft"):
        import peft
    return peft
