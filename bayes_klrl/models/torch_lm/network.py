"""The interface between `TorchLM` and a network, and the comparison of two networks.

A network turns tokens into *features*, one vector per position, from which `logits` predicts the next token. Sampling
(`prefill`, `step`, `select`) and scoring (`features`) share the forward pass, so they cannot disagree.

There are two implementations. The tight network (`tight`) is two to three times faster than Hugging Face's `generate` on
small models, but supports two families of architectures only. The general one (`general`) calls the forward of the model
itself and supports all others. The choice is made by an allow-list and by comparing the two on a small ragged batch, once per
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bayes_klrl.typing import TokenIds

__all__ = ["Network", "agree", "base_model", "left_padded", "model_device", "probe", "tolerance"]


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
    return torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(padding, device=device)


@torch.no_grad()
def agree(first: Network, second: Network, vocab_size: int) -> bool:
    """Return whether two networks give the same log-probs, up to rounding, on a ragged batch of two prompts."""
    prompts, owners, tokens = probe(vocab_size)
    device = second.prefill(prompts)[0].device
    scores = [
        network.logits(network.features(prompts, owners.to(device), tokens.to(device))).log_softmax(-1)
        for network in (first, second)
    ]
    return bool((scores[0] - scores[1]).abs().max() <= tolerance(scores[1]))


def probe(vocab_size: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Return two prompts of lengths 3 and 1, and a continuation of two tokens for each."""
    ids = [index % vocab_size for index in range(1, 9)]
    tokens = torch.tensor([ids[4:6], ids[6:8]], device="cpu")
    return [ids[:3], ids[3:4]], torch.tensor([0, 1], device="cpu"), tokens


def tolerance(log_probs: Tensor) -> float:
    """Return the largest difference by rounding between two correct computations of these log-probs."""
    return 1e-4 * max(1.0, float(log_probs.abs().max()))
