"""The interface between `TorchLM` and a network, and what every network asks of a Hugging Face model.

A network turns tokens into *features*, one vector per position, from which `logits` predicts the next token. Sampling
(`prefill`, `step`, `select`) and scoring (`features`) share the forward pass, so they cannot disagree.

The tight network (`tight`) is two to three times faster than Hugging Face's `generate` on small models, but supports two
families of architectures only. The general ones (`general`) call the forward of the model itself and support all others. The
choice is made by their numbers, once per model (`self_check`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bayes_klrl.arrays import to_device
from bayes_klrl.typing import TokenIds

__all__ = [
    "Network",
    "accepted",
    "adapter_configs",
    "base_model",
    "context_limit",
    "decoder_start",
    "forward_parameters",
    "has_virtual_tokens",
    "left_padded",
    "model_device",
    "nested",
]


_LENGTHS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)
"""The names of a configuration's largest length."""


class Network(Protocol):
    """A neural network as a step function with a cache; R rows, P prompts, F the width of a feature vector."""

    vocab_size: int
    width: int
    """Number of floats per token at the widest layer; it determines how many rows a chunk has."""

    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, Any]:
        """Return the features after each prompt, shape (P, F), and the cache; without a gradient."""

    def step(self, cache: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the features after one more token per row, shape (R, F), and the new cache; the old one stays valid."""

    def select(self, cache: Any, rows: Tensor) -> Any:
        """Return the cache of the given rows."""

    def features(self, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
        """Return the features that predict each token, shape (R, T, F), differentiable.

        Parameters
        ----------
        prompts
            Token ids of the P prompts.
        owners
            Index of the prompt that each row continues, shape (R,).
        tokens
            The completions, shape (R, T). The last column is predicted but never an input.
        """

    def logits(self, features: Tensor) -> Tensor:
        """Return the next-token logits (..., V) of features (..., F), in float32."""


def base_model(module: nn.Module) -> Any:
    """Return the Hugging Face model inside a PEFT wrapper, with its adapter layers; any other module as it is."""
    get_base_model = getattr(module, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else module


def model_device(module: nn.Module) -> torch.device:
    """Return the device of the embedding, on which token ids must be."""
    embedding = base_model(module).get_input_embeddings()
    return next((parameter.device for parameter in embedding.parameters()), torch.device("cpu"))


def left_padded(prompts: Sequence[TokenIds], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the prompts as one array (P, L), padded on the left with token 0, and the padding of each, shape (P,)."""
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return to_device(rows, device, torch.long), to_device(padding, device, torch.long)


def decoder_start(module: nn.Module) -> int:
    """Return the token that an encoder-decoder model's decoder reads first; 0 if no configuration names one.

    It may stand in the model's configuration, in its generation configuration, or in the decoder's own configuration.
    """
    model = base_model(module)
    sources = (model.config, getattr(model, "generation_config", None), getattr(model.config, "decoder", None))
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for source in sources:
            if isinstance(token := getattr(source, name, None), int):
                return token
    return 0


def context_limit(module: nn.Module) -> int | None:
    """Return the largest number of tokens that a model reads under one rule; None if it has no limit.

    Some models compute other log-probs for a text's first tokens once the text is longer than a certain length. No
    distribution over completions has such log-probs, so the limit is that length:

    * rotary embeddings of the type "longrope" use other frequencies for all positions past the original length;
    * an index that selects `index_topk` positions to attend to breaks ties in another way in every batch.

    Virtual tokens of an adapter count.
    """
    config = base_model(module).config
    parts = {id(part): part for part in (config, config.get_text_config(), *coders(config))}.values()
    lengths = [getattr(part, name, None) for part in parts for name in _LENGTHS]
    for entry in nested(config.to_dict()):
        if entry.get("rope_type") == "longrope":
            original = entry.get("original_max_position_embeddings")
            lengths.append(original or getattr(config, "original_max_position_embeddings", None))
        lengths.append(entry.get("index_topk"))
    limits = [length for length in lengths if isinstance(length, int) and length > 0]
    return max(1, min(limits) - num_virtual_tokens(module)) if limits else None


def coders(config: Any) -> list[Any]:
    """Return the configurations of encoder and decoder, if the model has one each."""
    found = (getattr(config, name, None) for name in ("encoder", "decoder"))
    return [part for part in found if hasattr(part, "to_dict")]


def adapter_configs(module: nn.Module) -> list[Any]:
    """Return peft's configurations of the adapters around a model; none for a model without adapters."""
    configs = getattr(module, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def has_virtual_tokens(module: nn.Module) -> bool:
    """Return whether an adapter puts tokens of its own before the text."""
    return any(config.is_prompt_learning for config in adapter_configs(module))


def num_virtual_tokens(module: nn.Module) -> int:
    """Return the number of tokens that an adapter puts before the text."""
    virtual = [config for config in adapter_configs(module) if config.is_prompt_learning]
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in virtual), default=0)


def forward_parameters(module: nn.Module) -> frozenset[str]:
    """Return the parameter names of the model's forward."""
    return frozenset(inspect.signature(base_model(module).forward).parameters)


def accepted(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Return those options that the model's forward accepts."""
    return {name: value for name, value in options.items() if name in forward_parameters(module)}


def nested(entries: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and all configurations in it."""
    yield entries
    for value in entries.values():
        if isinstance(value, Mapping):
            yield from nested(value)
