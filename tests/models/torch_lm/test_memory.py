"""What scoring and decoding of a TorchLM keep in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bayes_klrl.models.torch_lm import scoring as torch_scoring
from bayes_klrl.models.torch_lm.lm import TorchLM
from bayes_klrl.sequences import Sequences
from tests.helpers.tiny_models import tiny_gpt2
from tests.models.torch_lm.test_lm import MODELS, PROMPTS, close, random_completions, scored


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def lm(request: pytest.FixtureRequest) -> TorchLM:
    return TorchLM(MODELS[request.param]())


@pytest.fixture(params=["gpt2, pad is eos", "llama, pad is not eos"])
def tight_lm(request: pytest.FixtureRequest) -> TorchLM:
    return TorchLM(MODELS[request.param]())


# Memory


@pytest.mark.parametrize("name", ["gpt2, pad is eos", "llama, pad is eos", "opt", "t5"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TorchLM(MODELS[name]())
    sequences = random_completions(lm, len(PROMPTS), 3, 5)

    def scores_and_gradient() -> tuple[Tensor, list[Tensor]]:
        scores = lm.token_log_probs(PROMPTS, sequences)
        parameters = list(lm.parameters())
        return scores.detach(), list(torch.autograd.grad(scores.sum(), parameters))

    scores, gradient = scores_and_gradient()
    monkeypatch.setattr(torch_scoring, "BUDGET", 60)
    calls = []
    checkpoint = torch_scoring.checkpoint
    monkeypatch.setattr(torch_scoring, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    chunked, chunked_gradient = scores_and_gradient()
    assert len(calls) > 1
    assert close(chunked, scores)
    assert all(close(a, b, 1e-3) for a, b in zip(chunked_gradient, gradient, strict=True))


def test_the_table_over_the_vocabulary_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring 64 x 8 tokens over 5,000 words in chunks of 2**17 floats keeps no more than a few chunks alive."""
    lm = TorchLM(tiny_gpt2(vocab_size=5000, eos_token_id=None))
    sequences = random_completions(lm, 1, 64, 8)
    monkeypatch.setattr(torch_scoring, "BUDGET", 2**17)
    sizes = []
    plain = lm.module.lm_head.forward
    lm.module.lm_head.forward = lambda inputs: sizes.append(inputs.shape[0]) or plain(inputs)
    scores = scored(lm, [[1, 2]], sequences)
    assert scores.shape == (1, 64, 8)
    assert sum(sizes) >= 64 * 8
    assert max(sizes) * 5000 <= 2**17


def test_only_distinct_prompts_are_read_and_only_once(tight_lm: TorchLM) -> None:
    """The cost that the embedding sees: P prompts and T - 1 tokens of each completion, no padding up to T."""
    tight_lm.prefill([[1]])
    seen: list[int] = []
    embedding = tight_lm.module.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda tokens: seen.append(tokens.numel()) or plain(tokens)
    tokens = np.ones((1, 10, 30), dtype=np.int64)
    scored(tight_lm, [[1, 2, 4]], Sequences(tokens, np.full((1, 10), 4)))
    assert seen == [3, 10 * 3]
