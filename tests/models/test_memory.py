"""Decoding and scoring in parts: the same draws whatever the memory, and no long prompt that pads the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models import memory
from bayes_klrl.models.memory import free_memory, length_groups, parts, prompt_blocks
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_other
from tests.helpers.truth import random_posterior

LONG = [[1, 2, 3], [4, 0] * 150, [3, 2], [2] * 280]


class Bounded:
    """A model whose rows take 10 bytes per token and whose prompts take 1."""

    particles_per_pass = None

    def __init__(self, free: int) -> None:
        self.free = free

    def row_bytes(self, num_tokens: int) -> int:
        return 10 * num_tokens

    def prompt_bytes(self, num_tokens: int) -> int:
        return num_tokens

    def free_bytes(self) -> int:
        return self.free


def posterior_of(prior: Any, prompts: Any = LONG, num_tokens: int = 4) -> bk.Posterior:
    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7)
    return bk.Posterior(prior, ones, prompts=prompts, max_new_tokens=num_tokens)


@pytest.mark.parametrize("free", [10**9, 40_000, 2000, 500, 1])
def test_parts_hold_every_draw_once_and_fit(free: int) -> None:
    lengths, num_draws, num_tokens = [3, 10, 5], 7, 4
    seen = np.zeros((3, num_draws), dtype=int)
    found = parts([Bounded(free)], lengths, num_draws, num_tokens)
    for part in found:
        seen[part.prompts, part.first : part.last] += 1
        rows = part.prompts.size * (part.last - part.first)
        longest = max(lengths[p] for p in part.prompts)
        taken = part.prompts.size * longest + rows * 10 * (longest + num_tokens)
        assert rows == 1 or taken <= memory.SHARE * free * 1.2  # array_split may exceed by the longest of a group
    assert (seen == 1).all()
    assert (len(found) == 1) == (free == 10**9 or free == 40_000)


def test_prompts_in_blocks() -> None:
    """A row takes 10 (10 + 4) bytes at most; a long prompt is apart; a block has a prompt at least."""
    lengths, model = [3, 10, 5, 200], Bounded(10**9)

    def blocks(most_rows: int, budget: int | None = None) -> list[list[int]]:
        return [block.tolist() for block in prompt_blocks([model], lengths, 6, 4, most_rows, budget)]

    assert blocks(512) == [[3], [0, 1, 2]]
    assert blocks(12) == [[3], [0, 1], [2]]
    assert blocks(1) == [[3], [0], [1], [2]]
    assert blocks(512, budget=12 * 10 * 204) == [[3], [0, 1], [2]]
    assert blocks(512, budget=1) == [[3], [0], [1], [2]]
    assert [block.tolist() for block in prompt_blocks([object()], lengths, 6, 4, 1)] == [[0, 1, 2, 3]]


def test_two_models_share_the_memory() -> None:
    one, other = Bounded(3000), Bounded(3000)
    alone, both = parts([one, one], [10], 100, 4), parts([one, other], [10], 100, 4)
    assert 1.5 * len(alone) < len(both) < 3 * len(alone)


def test_models_that_say_nothing_are_not_bounded() -> None:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    assert len(parts([coin], [1, 2], 10**6, 10)) == 1


def test_free_memory_is_known_here() -> None:
    found = free_memory()
    assert found is None or 2**20 < found < 2**50


@pytest.mark.parametrize("method", [bk.ImportanceSampling(11), bk.BestOfN(2, 5)], ids=str)
@pytest.mark.parametrize("most", [1, 3, 8])
def test_parts_change_no_draw(method: Any, most: int) -> None:
    lm = bk.TorchLM(tiny_llama(8, max_position_embeddings=64))
    posterior = posterior_of(lm, [[1, 2, 3], [4, 0]])
    whole = method.run(posterior, seed=0)
    lm.particles_per_pass = most
    found = method.run(posterior, seed=0)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.log_prior, whole.log_prior, rtol=0, atol=1e-5)
    if isinstance(method, bk.ImportanceSampling):
        assert found.info["particles_per_pass"].tolist() == [most, most]
        assert "particles_per_pass" not in whole.info


def test_parts_change_no_bit_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = random_posterior(3, num_tokens=4, prompts=((0,), (1, 2)))
    whole = bk.ImportanceSampling(20).run(posterior, seed=0)
    monkeypatch.setattr(bk.NgramLM, "particles_per_pass", 3, raising=False)
    found = bk.ImportanceSampling(20).run(posterior, seed=0)
    for name in ("tokens", "log_prior", "log_weights"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_little_memory_makes_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = bk.TorchLM(tiny_gpt2(8))
    posterior = posterior_of(lm, [[1, 2, 3], [4, 0]])
    whole = bk.ImportanceSampling(16).run(posterior, seed=0)
    monkeypatch.setattr(type(lm), "free_bytes", lambda self: 20 * self.row_bytes(7))
    found = bk.ImportanceSampling(16).run(posterior, seed=0)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    assert 1 < found.info["particles_per_pass"][0] <= 12


def test_length_groups() -> None:
    assert [group.tolist() for group in length_groups([5, 6, 60])] == [[0, 1, 2]]
    assert [group.tolist() for group in length_groups([2000, *[20] * 3])] == [[0], [1, 2, 3]]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4000, 100).tolist()
    groups = length_groups(lengths)
    assert sorted(np.concatenate(groups).tolist()) == list(range(100))
    for group in groups:
        own = [lengths[p] for p in group]
        assert max(own) <= 2 * min(own) + 64


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt2, lambda *a, **o: tiny_other("gpt_neox", 8)], ids=["llama", "gpt2", "neox"]
)
def test_a_long_prompt_pads_no_short_one(build: Any) -> None:
    options = {"n_positions": 400} if build is tiny_gpt2 else {"max_position_embeddings": 400}
    model = build(8, **options)
    model.config.max_position_embeddings = 400
    lm = bk.TorchLM(model, check=False)
    posterior = posterior_of(lm)
    sequences = bk.Sequences(np.random.default_rng(0).integers(1, 8, (4, 3, 4)), np.full((4, 3), 4))
    alone = [
        lm.token_log_probs([p], bk.Sequences(sequences.tokens[[i]], sequences.lengths[[i]])) for i, p in enumerate(LONG)
    ]
    seen: list[int] = []
    embedding = lm.module.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda tokens: seen.append(tokens.numel()) or plain(tokens)
    with torch.no_grad():
        scores = lm.token_log_probs(LONG, sequences)
    assert sum(seen) < 1.2 * (4 if type(lm._ready_network()).__name__ == "TightNetwork" else 12) * 300
    np.testing.assert_allclose(scores, torch.cat(alone).detach(), rtol=0, atol=2e-5)
    seen.clear()
    draws = bk.ImportanceSampling(6).run(posterior, seed=0)
    assert sum(seen) <= 2 * (300 + 3) + 4 * 6 * 3
    np.testing.assert_allclose(posterior.log_prior(draws), draws.log_prior, rtol=0, atol=2e-5)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_tight_prefill_reads_prompts_of_like_length_together(build: Any) -> None:
    options = {"n_positions": 400} if build is tiny_gpt2 else {"max_position_embeddings": 400}
    lm = bk.TorchLM(build(8, **options))
    one_by_one = np.concatenate([lm.next_log_probs(lm.append(lm.prefill([p]), np.array([1]))) for p in LONG])
    seen: list[int] = []
    embedding = lm.module.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda tokens: seen.append(tokens.numel()) or plain(tokens)
    state = lm.prefill(LONG)
    assert seen == [2 * 300, 2 * 3]
    together = lm.next_log_probs(lm.append(state, np.full(4, 1)))
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=2e-5)
    chosen = lm.next_log_probs(lm.append(lm.select(state, np.array([3, 0, 0])), np.full(3, 1)))
    np.testing.assert_allclose(chosen, one_by_one[[3, 0, 0]], rtol=0, atol=2e-5)


def test_scoring_in_chunks_of_rows_has_the_same_gradient() -> None:
    lm = bk.TorchLM(tiny_gpt2(8))
    sequences = bk.Sequences(np.random.default_rng(0).integers(1, 8, (2, 6, 4)), np.full((2, 6), 4))

    def gradient() -> torch.Tensor:
        scores = lm.token_log_probs([[1, 2], [3]], sequences)
        found = torch.autograd.grad(scores.sum(), list(lm.parameters()))
        return torch.cat([part.flatten() for part in found])

    whole = gradient()
    lm.particles_per_pass = 5
    np.testing.assert_allclose(gradient(), whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
    assert lm.copy().particles_per_pass == 5
    with pytest.raises(bk.BayesKLRLError, match="particles_per_pass must be an integer of at least 1; got 0"):
        bk.TorchLM(tiny_gpt2(8), particles_per_pass=0, check=False)
