"""Teacher-forced log-probs in bounded memory.

    log p(x_t | c, x_<t) = logit of x_t - log sum of exp of all logits, in float32

The full table N x T x V is never stored: rows pass through the network in chunks, positions pass through the head in chunks,
and the head reads only positions inside a completion's length. If a gradient is needed, a chunk stores its inputs only and
recomputes the rest in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayes_klrl.models.torch_lm.network import Network
from bayes_klrl.typing import TokenIds

__all__ = ["BUDGET", "full_features", "full_log_probs", "sequence_log_probs"]

BUDGET = 2**25
"""Largest number of floats of one chunk at its widest layer (128 MB)."""


def sequence_log_probs(
    network: Network,
    prompts: Sequence[TokenIds],
    owners: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    temperature: float,
    *,
    most: int | None = None,
) -> Tensor:
    """Return the log-prob of every token, shape (R, T), 0 past each row's length.

    Parameters
    ----------
    network
        The network that computes features and logits.
    prompts
        Token ids of the P prompts.
    owners
        Index of the prompt that each row continues, shape (R,), ascending.
    tokens
        The completions, shape (R, T), with arbitrary numbers past the lengths.
    lengths
        The lengths of the completions, shape (R,).
    temperature
        The number by which the logits are divided.
    most
        The most rows that are scored at once; None: as many as `BUDGET` allows.
    """

    def score(first: int, last: int) -> Tensor:
        chunk = slice(first, last)
        own, inside = owners[chunk], positions_inside(lengths[chunk], tokens.shape[1])
        all_rows = last - first == len(tokens)
        low, high = (0, len(prompts)) if all_rows else (int(own[0]), int(own[-1]) + 1)
        # numbers past a length are replaced by a legal token; by causality they do not affect the others
        legal = tokens[chunk].masked_fill(~inside, 0)
        places = inside.flatten().nonzero()[:, 0]  # once, for on an accelerator the host waits for their number
        features = network.features(prompts[low:high], own - low, legal).flatten(0, 1)[places]
        drawn = drawn_log_probs(network, features, legal.flatten()[places], temperature)
        return drawn.new_zeros(inside.numel()).index_copy(0, places, drawn).view(inside.shape)

    size = max(1, min(BUDGET // (tokens.shape[1] * network.width), len(tokens) if most is None else most))
    return torch.cat(in_chunks(score, len(tokens), size))


def drawn_log_probs(network: Network, features: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-prob of each token given its feature vector, shapes (M, F) and (M,) to (M,)."""

    def drawn(first: int, last: int) -> Tensor:
        log_probs = tempered(network.logits(features[first:last]), temperature).log_softmax(1)
        return log_probs.gather(1, tokens[first:last, None])[:, 0]

    return torch.cat(in_chunks(drawn, len(tokens), max(1, BUDGET // network.vocab_size)))


def full_log_probs(
    network: Network, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor, lengths: Tensor, temperature: float
) -> Tensor:
    """Return log p(. | c, x_<t) at every position, shape (R, T, V), 0 past each row's length."""
    inside = positions_inside(lengths, tokens.shape[1])
    features = network.features(prompts, owners, tokens.masked_fill(~inside, 0))
    log_probs = tempered(network.logits(features), temperature).log_softmax(-1)
    return log_probs.masked_fill(~inside[..., None], 0.0)


def full_features(
    network: Network, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor, lengths: Tensor, _temperature: float
) -> Tensor:
    """Return the features that predict every position, shape (R, T, F), 0 past each row's length."""
    inside = positions_inside(lengths, tokens.shape[1])
    features = network.features(prompts, owners, tokens.masked_fill(~inside, 0))
    return features.masked_fill(~inside[..., None], 0.0)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return the logits divided by the temperature; the same tensor if it is 1."""
    return logits if temperature == 1.0 else logits / temperature


def positions_inside(lengths: Tensor, num_tokens: int) -> Tensor:
    """Return which positions belong to a completion, shape (R, T)."""
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]


def in_chunks(compute: Callable[[int, int], Tensor], total: int, size: int) -> list[Tensor]:
    """Return `compute(first, last)` of consecutive ranges of at most `size` items.

    With several chunks and gradients on, each chunk is recomputed in the backward pass instead of being stored.
    """
    if total <= size:
        return [compute(0, total)]
    ranges = [(first, min(first + size, total)) for first in range(0, total, size)]
    if not torch.is_grad_enabled():
        return [compute(*bounds) for bounds in ranges]
    return [checkpoint(compute, *bounds, use_reentrant=False, preserve_rng_state=False) for bounds in ranges]
