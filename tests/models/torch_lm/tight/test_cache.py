"""The cache of the tight network: whichever way it came about, the next features are those of the whole text read at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode
from bayes_klrl.models.torch_lm.tight import cache as cache_module
from bayes_klrl.models.torch_lm.tight import tight_network
from bayes_klrl.models.torch_lm.tight.cache import Cache
from bayes_klrl.models.torch_lm.tight.forward import TightNetwork
from bayes_klrl.posterior import completion_log_probs
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama

VOCAB = 11
BUILDS = {
    "gpt2": tiny_gpt2,
    "llama, groups": tiny_llama,
    "llama": lambda **options: tiny_llama(num_key_value_heads=4, **options),
}
PROMPTS = {
    "one": [[3, 1, 4]],
    "of a block": [[1, 5, 9, 2]],
    "longer than a block": [[1, 5, 9, 2, 6, 5]],
    "padded": [[3, 1, 4, 1, 5], [2], [7, 1, 8, 2, 8, 1, 8]],
    "very different": [[3], [1, 2] * 20],
}


def network_of(build: Callable[..., Any]) -> TightNetwork:
    size = "n_positions" if build is tiny_gpt2 else "max_position_embeddings"
    network = tight_network(build(vocab_size=VOCAB, **{size: 128}), VOCAB)
    assert network is not None
    return network


def read_at_once(network: TightNetwork, texts: list[list[int]]) -> Tensor:
    """Return the features after each text, each read by itself, without a cache."""
    with torch.no_grad():
        return torch.cat([network.prefill([text])[0] for text in texts])


@pytest.fixture(params=["blocks of 4", "blocks of 3", "one buffer"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How keys and values are stored: in small blocks, or as on a card."""
    monkeypatch.setattr(cache_module, "GROWTH", 3)
    if request.param == "one buffer":
        monkeypatch.setattr("bayes_klrl.models.torch_lm.tight.cache.has_blocks", lambda stored: False)
        monkeypatch.setattr("bayes_klrl.models.torch_lm.tight.forward.has_blocks", lambda stored: False)
    else:
        monkeypatch.setattr(cache_module, "BLOCK", int(request.param[-1]))
    return str(request.param)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_steps_selections_and_branches_equal_reading_at_once(
    build: Callable[..., Any], prompts: list[list[int]], storage: str
) -> None:
    """Each cache stays valid: later steps from it, and from copies and selections of it, see its own positions alone."""
    network, generator = network_of(build), torch.Generator().manual_seed(0)
    features, cache = network.prefill(prompts)
    texts = [list(prompt) for prompt in prompts]
    torch.testing.assert_close(features, read_at_once(network, texts), rtol=0, atol=1e-5)
    kept: list[tuple[Cache, list[list[int]]]] = []
    for number in range(14):
        if number in (0, 5, 6, 9):
            rows = torch.randint(len(texts), (5 + number % 3,), generator=generator)
            cache, texts = network.select(cache, rows), [texts[row] for row in rows]
        kept.append((cache, texts))
        tokens = torch.randint(VOCAB, (len(texts),), generator=generator)
        features, cache = network.step(cache, tokens)
        texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
        torch.testing.assert_close(features, read_at_once(network, texts), rtol=0, atol=1e-5)
    assert bool(cache.blocks) == (storage != "one buffer")
    for earlier, before in kept:  # which have been written past, and frozen, since
        tokens = torch.randint(VOCAB, (len(before),), generator=generator)
        features, _ = network.step(earlier, tokens)
        expected = read_at_once(network, [[*text, int(token)] for text, token in zip(before, tokens, strict=True)])
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_the_positions_of_a_head_in_a_block_lie_together(storage: str) -> None:
    network = network_of(tiny_gpt2)
    _, cache = network.prefill([[1, 2]])
    cache = network.select(cache, torch.zeros(6, dtype=torch.long))
    for token in range(11):
        _, cache = network.step(cache, torch.full((6,), token % VOCAB))
    assert cache.length == 13
    assert all(stored.is_contiguous() for block in cache.blocks for stored in block)
    assert all(stored.shape[3] == 13 for stored in cache.whole())
    if storage == "blocks of 4":
        assert [block[0].shape[3] for block in cache.blocks] == [4, 4, 4]


def test_long_completions_are_scored_as_they_were_drawn() -> None:
    """Past three blocks of the usual size, with rows that end at all lengths."""
    module = tiny_gpt2(vocab_size=50, eos_token_id=0, n_positions=160)
    with torch.no_grad():
        module.transformer.wte.weight.mul_(0.02)  # no token is so likely that completions are short
    prompts, lm = [[1], [2, 3]], bk.TorchLM(module)
    drawn = decode((lm,), prompts, 30, 120, np.random.default_rng(0))
    lengths = drawn.sequences().lengths
    assert lengths.max() > 100
    assert np.unique(lengths).size > 10
    scored = completion_log_probs(lm, prompts, drawn.sequences())
    np.testing.assert_allclose(drawn.log_probs[0], scored.ravel(), rtol=0, atol=1e-3)
