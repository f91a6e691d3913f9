"""The same bigram prior on every backend, so that one test, with one truth, runs on all of them.

A bigram table is a transformer with nothing in between: one-hot embeddings, a block that adds nothing, and an untied head.
Layer normalisation maps one-hot vectors to two numbers, a where the token is and b elsewhere; a further coordinate makes the
head's rows sum to zero, so that b drops out and

    logit(token | previous) = (a - b) W[token, previous] = log p(token | previous).
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.sequences import pad_token

__all__ = [
    "BACKENDS",
    "QUICK_AND_SLOW",
    "as_jax",
    "crossed",
    "ngram_of",
    "on",
    "precision",
    "prior_on",
]

BACKENDS = ("ngram", "torch", "jax")
"""NumPy's `NgramLM` in float64; `TorchLM` and `JaxLM` in float32."""

QUICK_AND_SLOW = ("ngram", "torch", pytest.param("jax", marks=pytest.mark.slow))
"""The same, JAX among the slow tests: it compiles. `tests.models.test_backends` compares it with torch quickly."""

_LONGEST = 256
_tables: WeakKeyDictionary[Any, bk.NgramLM] = WeakKeyDictionary()


def on(backend: str, posterior: bk.Posterior) -> bk.Posterior:
    """The posterior with its bigram prior on another backend; likelihood, prompts and columns are the same objects."""
    if backend == "ngram":
        return posterior
    return bk.Posterior(
        prior_on(backend, posterior.prior),
        posterior.likelihood,
        prompts=[list(prompt) for prompt in posterior.prompts],
        max_new_tokens=posterior.max_new_tokens,
        **posterior.columns,
    )


def prior_on(backend: str, prior: bk.LanguageModel) -> bk.LanguageModel:
    """A bigram `NgramLM` on another backend."""
    assert isinstance(prior, bk.NgramLM)
    assert prior.order <= 2
    assert np.isfinite(prior.log_probs).all()  # a softmax of finite logits gives no token probability 0
    if backend == "ngram":
        return prior
    table = np.broadcast_to(prior.log_probs, (prior.vocab_size, prior.vocab_size))
    network_lm = _network_lm(backend, table.tobytes(), prior.vocab_size, tuple(sorted(prior.eos_token_ids)))
    _tables[network_lm] = prior
    return network_lm


def ngram_of(lm: bk.LanguageModel) -> bk.NgramLM:
    """The table that a model of `prior_on` computes."""
    return lm if isinstance(lm, bk.NgramLM) else _tables[lm]


def as_jax(lm: bk.LanguageModel) -> bk.JaxLM:
    """A `TorchLM` on JAX, by way of its folder."""
    assert isinstance(lm, bk.TorchLM)
    with tempfile.TemporaryDirectory() as folder:
        lm.save_pretrained(folder)
        return bk.JaxLM.from_pretrained(folder)


def precision(backend: str, exact: float) -> float:
    """The tolerance in nats of a completion's log-prob: `exact` in float64, 1e-4 in float32 (theory.md 1.4)."""
    return exact if backend == "ngram" else max(exact, 1e-4)


def crossed(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by every combination of some values on NumPy, and by the first of them on every backend.

    What the values choose between is computed by the host, whatever the backend. The test takes `backend` and the names.
    """
    combinations = list(itertools.product(*map(list, values.values())))
    params = []
    for param in QUICK_AND_SLOW:
        backend, marks = (param, ()) if isinstance(param, str) else (param.values[0], param.marks)
        for combination in combinations if backend == "ngram" else combinations[:1]:
            name = "-".join([str(backend), *(getattr(value, "__name__", str(value)) for value in combination)])
            params.append(pytest.param(backend, *combination, id=name, marks=marks))
    return pytest.mark.parametrize(",".join(["backend", *values]), params, indirect=["backend"])


@functools.cache
def _network_lm(backend: str, table: bytes, vocab_size: int, eos: tuple[int, ...]) -> bk.LanguageModel:
    """A `TorchLM` or `JaxLM` that computes the table."""
    model = _bigram_gpt2(np.frombuffer(table).reshape(vocab_size, vocab_size), pad_token(frozenset(eos)))
    on_torch = bk.TorchLM(model, eos_token_id=eos)
    return on_torch if backend == "torch" else as_jax(on_torch)


def _bigram_gpt2(log_probs: np.ndarray, start: int) -> Any:
    """A GPT-2 with log p(a | h) = log_probs[h, a], `start` in the place of an empty prompt."""
    import torch
    import transformers as hf

    vocab_size = len(log_probs)
    width = vocab_size + 1
    config = hf.GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=1,
        n_head=1,
        n_positions=_LONGEST,
        bos_token_id=start,
        eos_token_id=None,
        layer_norm_epsilon=1e-12,
        tie_word_embeddings=False,
    )
    model = hf.GPT2LMHeadModel(config).eval()
    head = np.zeros((vocab_size, width))
    head[:, :vocab_size] = log_probs.T * np.sqrt(width - 1) / width  # 1 / (a - b)
    head[:, -1] = -head[:, :-1].sum(axis=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(vocab_size, width))
        model.lm_head.weight.copy_(torch.as_tensor(head))
    return model
