"""What is known of each kind of peft's adapters (0.21): tried as a guide, or refused by name before anything is computed.

The reasons why an adapter is refused are three. It reads more than the text, or later tokens than the one that it predicts, so
that a completion has no log-prob. It begins with random changes of the base's weights that its folder does not hold, so that
nothing can read the policy from there. Or it needs a preparation that a prior does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.torch_lm.network import adapter_configs

__all__ = [
    "ZERO_START",
    "cannot_be_merged",
    "check_can_be_guide",
    "check_is_whole_in_its_folder",
    "is_tried",
    "kind_of",
]

TRIED = frozenset(
    [
        "ADALORA",
        "ADAPTION_PROMPT",
        "BEFT",
        "BOFT",
        "C3A",
        "CARTRIDGE",
        "CPT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "PSOFT",
        "PVERA",
        "P_TUNING",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    ]
)
"""The kinds of docs/adapters.md that need no trial."""

LORA_OPTIONS = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    ]
)
"""The options of `peft.LoraConfig` that need no trial."""

TASK_IDS = "it reads the number of a task beside the text. Use peft.LoraConfig, one adapter for each task."
UNREADABLE = {
    "LILY": (
        "its router takes a mean over all tokens of a text, so a later token changes earlier log-probs, and no completion "
        "has a log-prob. Use peft.LoraConfig."
    ),
    "MULTITASK_PROMPT_TUNING": TASK_IDS,
    "POLY": TASK_IDS,
}
"""Kinds that give no completion a log-prob, as guides and as policies of others."""

ZERO_START = {"C3A": "init_weights=True", "FOURIERFT": "init_weights=True"}
"""The option with which a kind starts as the model that it is put on."""

NEVER_MERGED = frozenset({"LILY", "SHADOW", "XLORA"})
"""Kinds for which peft has no merging although they have its method."""


def kind_of(config: Any) -> str:
    """Return the name of an adapter's kind in peft's list `PeftType`, from a configuration or what a file says of one."""
    kind = config.get("peft_type") if isinstance(config, Mapping) else getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind or ""))


def initial_weights(config: Any) -> Any:
    """Return how a LoRA's weights begin; None for other kinds."""
    if kind_of(config) != "LORA":
        return None
    name = "init_lora_weights"
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def is_tried(config: Any) -> bool:
    """Return whether an adapter of this kind, with these options, was tried as a guide; `trial` checks all others."""
    if config == "lora":
        return True
    if kind_of(config) != "LORA" or not dataclasses.is_dataclass(config):
        return kind_of(config) in TRIED
    new = [field for field in dataclasses.fields(config) if field.name not in LORA_OPTIONS]
    return all(getattr(config, field.name) in (None, False, field.default) for field in new)


def check_can_be_guide(config: Any) -> None:
    """Refuse a configuration whose guide could not be scored, started or saved.

    Raises
    ------
    BayesKLRLError
        If the kind is known to fail; the message names it, with the reason and what to use in its place.
    """
    name = type(config).__name__
    if (reason := UNREADABLE.get(kind_of(config))) is not None:
        raise BayesKLRLError(f"An adapter of {name} cannot be a guide: {reason}")
    if kind_of(config) == "XLORA":
        raise BayesKLRLError(
            f"An adapter of {name} cannot be a guide: it mixes adapters that are trained already. Use peft.LoraConfig, or "
            "bk.MixtureLM of several policies."
        )
    if getattr(config, "arrow_config", None) is not None:
        raise BayesKLRLError(
            "A LoRA with arrow_config cannot be a guide: it chooses among adapters that are trained already, and trains "
            "nothing. Leave arrow_config out."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise BayesKLRLError(
            "An activated LoRA (alora_invocation_tokens) cannot be a guide: it changes a text from its last invocation on, so "
            "a later token changes earlier log-probs. Leave alora_invocation_tokens out."
        )
    if (reason := changes_base(initial_weights(config))) is not None:
        raise BayesKLRLError(
            f"A LoRA with init_lora_weights={config.init_lora_weights!r} cannot be a guide: {reason}, so its folder would "
            "hold another policy than the one that was trained. Use init_lora_weights=True, 'eva', 'olora' or 'pissa'."
        )


def changes_base(init: Any) -> str | None:
    """Return why what LoRA's first weights took from the base cannot be found again from a folder; None if it can."""
    if not isinstance(init, str):
        return None
    if init.startswith("pissa_niter"):
        return "it takes a random approximation of a decomposition away from the base's weights, another one at each loading"
    if init in ("corda", "lora_ga"):
        return (
            "it takes away from the base's weights what it computes from data, which the adapter's folder does not hold"
        )
    if init == "loftq":
        return "it replaces the base's weights by rounded ones, which the adapter's folder does not hold"
    return None


def check_is_whole_in_its_folder(config: Mapping[str, Any], folder: str) -> None:
    """Refuse an adapter's adapter_config.json if no policy can be read from its folder, or not the one that was trained.

    Raises
    ------
    CheckpointError
        If the kind is known to fail; the message names it, with the reason and the cure.
    """
    kind = kind_of(config)
    if kind in UNREADABLE:
        raise CheckpointError(
            f"The adapter in {folder!r} is of the kind {kind}, which cannot be a policy: {UNREADABLE[kind]}"
        )
    if kind == "XLORA":
        raise CheckpointError(
            f"The adapter in {folder!r} is of the kind XLORA, a mixture of adapters, and peft reads another policy from its "
            "folder than the one that was saved. Give the model itself: bk.TorchLM(model), with model the one in memory."
        )
    init = initial_weights(config)
    if (change := changes_base(init)) is not None:
        raise CheckpointError(
            f"The adapter in {folder!r} was trained with init_lora_weights={init!r}: {change}. With the base alone it is "
            "another policy than the one that was trained. Save it again as a plain LoRA "
            "(save_pretrained(folder, path_initial_model_for_weight_conversion=...)), or merged into its base."
        )


def cannot_be_merged(module: nn.Module) -> bool:
    """Return whether a model has an adapter that peft cannot add to the weights, although it has the method for it.

    There is no place for an adapter's bias in a layer that has none.
    """
    kinds = {kind_of(config) for config in adapter_configs(module)}
    if kinds & NEVER_MERGED:
        return True
    for part in module.modules():
        layer = getattr(part, "base_layer", None)
        has_bias = layer is None or getattr(layer, "bias", None) is not None
        if not has_bias and (hasattr(part, "beft_bias") or any(dict(getattr(part, "lora_bias", {})).values())):
            return True
    return False
