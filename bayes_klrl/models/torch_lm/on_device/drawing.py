"""The next token of each row, and its log-prob under every model, all on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_klrl.arrays import cumulative_probs, first_beyond
from bayes_klrl.models.passes import FLOATS_PER_PASS, fits
from bayes_klrl.models.torch_lm.scoring import tempered

__all__ = ["drawn_and_scored"]


def drawn_and_scored(
    networks: Sequence[Any], models: Sequence[Any], features: Sequence[Tensor], uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens (M,) that the first model draws, and their log-probs under each, (models, M), in float32."""
    num_rows, vocab_size = len(uniforms), networks[0].vocab_size
    size = num_rows if fits(num_rows, vocab_size) else max(1, FLOATS_PER_PASS // vocab_size)
    parts = []
    for first in range(0, num_rows, size):
        rows = slice(first, first + size)
        drawn: Tensor = torch.zeros(0)
        scores = []
        for i, (network, model) in enumerate(zip(networks, models, strict=True)):
            table = tempered(network.logits(features[i][rows]), model.temperature).log_softmax(-1)
            if i == 0:
                drawn = first_beyond(cumulative_probs(table), uniforms[rows])
            scores.append(table.gather(1, drawn[:, None])[:, 0])
        parts.append((drawn, torch.stack(scores)))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([drawn for drawn, _ in parts]), torch.cat([scores for _, scores in parts], dim=1)
