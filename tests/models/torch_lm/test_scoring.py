"""Teacher-forced scores of a network that is one small table, by hand: EOS is scored, and the temperature divides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_klrl.inference.exact.enumeration import all_sequences
from bayes_klrl.models.torch_lm.scoring import full_log_probs, sequence_log_probs

VOCAB_SIZE, EOS, NUM_TOKENS = 4, (0, 2), 3
PROMPTS = [[1, 3], [3]]


class Bigram:
    """Features are the token before, logits a row of a table."""

    vocab_size = width = VOCAB_SIZE

    def __init__(self) -> None:
        self.table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def features(self, prompts: Sequence[Sequence[int]], owners: Tensor, tokens: Tensor) -> Tensor:
        last = torch.tensor([ids[-1] for ids in prompts])[owners]
        before = torch.cat([last[:, None], tokens[:, :-1]], dim=1)
        return torch.nn.functional.one_hot(before, VOCAB_SIZE).float()

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.table


def everything() -> tuple[Tensor, Tensor, Tensor]:
    """Every completion of both prompts: owners, tokens and lengths."""
    one = all_sequences(VOCAB_SIZE, EOS, NUM_TOKENS)
    num = one.lengths.size
    tokens, lengths = torch.as_tensor(one.tokens[0]), torch.as_tensor(one.lengths[0])
    return torch.arange(2).repeat_interleave(num), tokens.repeat(2, 1), lengths.repeat(2)


def scored(function: Any, temperature: float) -> Tensor:
    network: Any = Bigram()
    result: Tensor = function(network, PROMPTS, *everything(), temperature)
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_all_completions_together_have_mass_one(temperature: float) -> None:
    log_probs = scored(sequence_log_probs, temperature).sum(dim=1).double()
    masses = log_probs.exp().reshape(2, -1).sum(dim=1)
    torch.testing.assert_close(masses, torch.ones(2).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_log_softmax_of_logits_over_temperature(temperature: float) -> None:
    owners, tokens, lengths = everything()
    rows = (Bigram().table / temperature).log_softmax(-1)
    expected = torch.zeros(tokens.shape)
    for m, (owner, ids, length) in enumerate(zip(owners.tolist(), tokens.tolist(), lengths.tolist(), strict=True)):
        read = [PROMPTS[owner][-1], *ids]
        for t in range(length):
            expected[m, t] = rows[read[t], read[t + 1]]
    torch.testing.assert_close(scored(sequence_log_probs, temperature), expected, rtol=0, atol=1e-5)
    of_drawn = scored(full_log_probs, temperature).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(of_drawn, expected, rtol=0, atol=1e-5)
