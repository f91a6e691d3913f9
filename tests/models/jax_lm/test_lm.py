"""JaxLM against torch, against enumeration, and against itself."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.numpy import load_file, save_file

import bayes_klrl as bk
from bayes_klrl.models.jax_lm import rows as jax_rows
from bayes_klrl.models.jax_lm.checkpoint import named_tensors
from bayes_klrl.models.jax_lm.forward import empty_cache, hidden_states, logits
from bayes_klrl.models.jax_lm.lm import JaxLM
from bayes_klrl.sequences import Sequences
from tests.helpers.tiny_models import seeded, tiny_gpt2, tiny_llama
from tests.models.torch_lm.test_lm import all_completions, random_completions, reference_scores

PROMPTS = [[1, 2, 3, 4], [4], [2, 2]]
DEEP = {"vocab_size": 40, "eos_token_id": 0}


def relative(name: str, **options: Any) -> Any:
    """A tiny Mistral, Qwen2 or Qwen3 of four layers, biases drawn as well: they are 0 at the start."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0}
    if name != "Qwen2":
        sizes["head_dim"] = 8
    config = getattr(hf, f"{name}Config")(**sizes, **DEEP, **options)
    return with_biases(seeded(getattr(hf, f"{name}ForCausalLM"), config, 0))


def with_biases(model: Any) -> Any:
    """The same with biases and norms away from 0 and 1, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: with_biases(tiny_gpt2(n_layer=4, n_positions=128, **DEEP)),
    "llama, tied": lambda: with_biases(tiny_llama(num_hidden_layers=4, tie_word_embeddings=True, **DEEP)),
    "llama, untied": lambda: with_biases(tiny_llama(attention_bias=True, mlp_bias=True, num_hidden_layers=4, **DEEP)),
    "mistral": lambda: relative("Mistral", sliding_window=None),
    "qwen2": lambda: relative("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: relative("Qwen3"),
}


@functools.cache
def torch_model(name: str) -> Any:
    return MODELS[name]()


def jax_lm_of(model: Any, **options: Any) -> JaxLM:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return JaxLM.from_pretrained(folder, **options)


@functools.cache
def cached_lm(name: str) -> JaxLM:
    return jax_lm_of(torch_model(name))


@functools.cache
def small_pair() -> tuple[JaxLM, bk.TorchLM]:
    """One GPT-2 of five tokens on both backends."""
    model = tiny_gpt2()
    return jax_lm_of(model), bk.TorchLM(model)


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in ("gpt2", "llama, untied"))) for name in MODELS]
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small() -> JaxLM:
    return small_pair()[0]


def decoded(lm: Any, prompts: list[list[int]], sequences: Sequences) -> np.ndarray:
    """The log-probs (P, N, T) that the decode path gives these tokens."""
    num_prompts, num_draws, num_tokens = sequences.tokens.shape
    state = lm.select(lm.prefill(prompts), np.arange(num_prompts).repeat(num_draws))
    flat, columns = sequences.tokens.reshape(-1, num_tokens), []
    for step in range(num_tokens):
        columns.append(np.asarray(lm.next_log_probs(state))[np.arange(len(flat)), flat[:, step]])
        if step + 1 < num_tokens:
            state = lm.append(state, flat[:, step])
    return np.stack(columns, axis=1).reshape(sequences.tokens.shape) * sequences.mask


def scored(lm: JaxLM, prompts: list[list[int]], sequences: Sequences) -> np.ndarray:
    return np.asarray(lm.token_log_probs(prompts, sequences))


def close(left: Any, right: Any, tolerance: float = 1e-5) -> bool:
    left, right = np.asarray(left), np.asarray(right)
    return left.shape == right.shape and bool(np.abs(left - right).max() <= tolerance)


# The same numbers as torch


@pytest.mark.slow
def test_full_and_cached_log_probs_equal_torchs(name: str) -> None:
    lm, model = cached_lm(name), torch_model(name)
    sequences = random_completions(lm, len(PROMPTS), 5, 12)  # type: ignore[arg-type]
    expected = reference_scores(model, PROMPTS, sequences).detach().numpy()
    scores = lm.token_log_probs(PROMPTS, sequences)
    assert scores.dtype == jnp.float32
    # each is up to 1e-5 from float64 (measured; the most in "llama, tied"), so they are up to twice that from each other
    assert close(scores, expected, 2e-5)
    assert close(decoded(lm, PROMPTS, sequences), expected, 2e-5)
    assert close(decoded(lm, PROMPTS, sequences), scores)
    assert np.abs(expected).max() > 5  # far from uniform: a wrong forward would show


def test_all_logits_equal_torchs_after_prompts_of_any_length(name: str) -> None:
    lm, model = cached_lm(name), torch_model(name)
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).numpy() for prompt in PROMPTS]
    assert close(lm.next_log_probs(lm.prefill(PROMPTS)), np.stack(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama, untied", "qwen2", "qwen3"))],
)
def test_gradients_equal_torchs(name: str) -> None:
    lm, model = cached_lm(name), torch_model(name)
    sequences = random_completions(lm, len(PROMPTS), 5, 12)  # type: ignore[arg-type]
    score = lambda p: lm.with_parameters(p).token_log_probs(PROMPTS, sequences).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(score))(lm.parameters)
    model = copy.deepcopy(model).double()  # in float32 torch's own error is as large as the tolerance
    reference_scores(model, PROMPTS, sequences).sum().backward()
    theirs = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    ours = dict(named_tensors(lm._architecture, gradients))
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(np.linalg.norm(gradient) for gradient in theirs.values())  # key biases: 0 but for rounding
    for key, gradient in theirs.items():
        assert np.linalg.norm(ours[key] - gradient) <= 1e-5 * max(np.linalg.norm(gradient), floor), key


LARGER: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=500, n_embd=256, n_layer=12, n_head=8)),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=500,
            hidden_size=256,
            intermediate_size=700,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_logits_of_twelve_layers_are_as_exact_as_torchs(name: str) -> None:
    """No further from torch's float32 than three times as far as that is from float64; full and cached."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LARGER[name]().eval()
        for parameter in model.parameters():  # weights larger than the first ones are, so that errors are, too
            parameter.data.mul_(2.0 if parameter.ndim > 1 else 1.0)
    lm = jax_lm_of(model, eos_token_id=())
    tokens = np.random.default_rng(0).integers(500, size=(4, 48))
    with torch.no_grad():
        single, double = (m(torch.from_numpy(tokens)).logits for m in (model, copy.deepcopy(model).double()))
    error = float((single.double() - double).abs().max())
    allowed = max(3 * error, 1e-5)
    empty, none = empty_cache(lm._architecture, 4), np.zeros(4, dtype=np.int32)
    whole = jax.jit(lambda *inputs: logits(*inputs[:2], hidden_states(*inputs)[0]), static_argnums=0)
    assert close(whole(lm._architecture, lm.parameters, jnp.asarray(tokens), none, empty, 0), single, allowed)
    state = lm.prefill(tokens[:, :40].tolist())
    for step in range(40, 48):
        assert close(logits(lm._architecture, lm.parameters, state.features)[:4], single[:, step - 1], allowed)
        state = lm.append(state, tokens[:, step])
    assert float(single.abs().max()) > 2


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_positions_equal_torchs(rope: dict[str, Any], tmp_path: Path) -> None:
    """And so do the keys under which older versions kept them."""
    model = tiny_llama(head_dim=8, num_key_value_heads=4, max_position_embeddings=64, rope_parameters=rope, **DEEP)
    lm = jax_lm_of(model)
    sequences = random_completions(lm, len(PROMPTS), 5, 12)  # type: ignore[arg-type]
    expected = reference_scores(model, PROMPTS, sequences).detach()
    assert close(scored(lm, PROMPTS, sequences), expected)
    old = dict(lm._config)
    new = old.pop("rope_parameters")
    old |= {"rope_theta": new.pop("rope_theta"), "rope_scaling": None if len(new) == 1 else new}
    assert close(scored(JaxLM(lm.parameters, old), PROMPTS, sequences), expected)


def test_a_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    """No prefixes, causal masks among the weights, and a config.json that says little."""
    model = tiny_gpt2(n_head=12, n_embd=24)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    hub = {key.removeprefix("transformer."): array for key, array in tensors.items()}
    hub |= {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 32, 32), dtype=np.float32)) for layer in range(2)}
    save_file(hub, tmp_path / "model.safetensors")
    short = {"model_type": "gpt2", "vocab_size": 5, "n_embd": 24, "n_layer": 2, "n_positions": 32, "n_ctx": 32}
    (tmp_path / "config.json").write_text(json.dumps(short | {"eos_token_id": 0}))
    lm = JaxLM.from_pretrained(tmp_path)
    sequences = random_completions(lm, len(PROMPTS), 4, 5)  # type: ignore[arg-type]
    assert close(scored(lm, PROMPTS, sequences), reference_scores(model, PROMPTS, sequences).detach())


# One distribution, whichever way it is asked


def test_it_is_a_language_model(small: JaxLM) -> None:
    assert isinstance(small, bk.LanguageModel)
    assert (small.vocab_size, small.full_support, small.tokenizer, small.context_length) == (5, True, None, 32)
    assert (small.eos_token_ids, small.bos_token_id) == ({0}, 0)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_total_probability_is_one_and_decoding_agrees(small: JaxLM, temperature: float) -> None:
    lm = JaxLM(small.parameters, small._config, temperature=temperature)
    sequences = all_completions(lm, len(PROMPTS), 3)  # type: ignore[arg-type]
    scores = scored(lm, PROMPTS, sequences)
    assert close(np.exp(scores.sum(-1, dtype=np.float64)).sum(-1), np.ones(3))
    assert close(decoded(lm, PROMPTS, sequences), scores)
    cold = np.asarray(small.next_log_probs(small.prefill(PROMPTS)))
    assert close(lm.next_log_probs(lm.prefill(PROMPTS)), jax.nn.log_softmax(cold / temperature))


@pytest.mark.slow
def test_a_prompt_scores_the_same_alone_and_among_others(small: JaxLM) -> None:
    sequences = random_completions(small, len(PROMPTS), 4, 5)  # type: ignore[arg-type]
    together = scored(small, PROMPTS, sequences)
    for index, prompt in enumerate(PROMPTS):
        alone = Sequences(sequences.tokens[[index]], sequences.lengths[[index]])
        assert close(scored(small, [prompt], alone), together[[index]])


def test_what_stands_past_the_length_does_not_matter(small: JaxLM) -> None:
    sequences = random_completions(small, len(PROMPTS), 6, 5)  # type: ignore[arg-type]
    odd = Sequences(np.where(sequences.mask, sequences.tokens, -7), sequences.lengths)
    scores = scored(small, PROMPTS, odd)
    assert np.array_equal(scores, scored(small, PROMPTS, sequences))
    assert not scores[~sequences.mask].any()


def test_rows_can_be_permuted_repeated_and_dropped(small: JaxLM) -> None:
    tokens = np.array([3, 1, 2])
    state = small.append(small.prefill(PROMPTS), tokens)
    rows = np.array([2, 0, 0])
    chosen = small.append(small.select(state, rows), np.array([4, 4, 1]))
    expected = [[*PROMPTS[row], tokens[row], last] for row, last in zip(rows, [4, 4, 1], strict=True)]
    assert close(small.next_log_probs(chosen), small.next_log_probs(small.prefill(expected)))
    assert small.next_log_probs(small.select(chosen, np.array([], dtype=np.int64))).shape == (0, 5)
    last = small.next_log_probs(small.select(state, np.array([-1])))
    assert close(last, np.asarray(small.next_log_probs(state))[[2]], 1e-6)
    with pytest.raises(IndexError):
        small.select(state, np.array([3]))  # a row of the bucket, but not of the state


def test_states_are_values_over_many_steps(small: JaxLM) -> None:
    """Three continuations of one state, interleaved: a buffer given away or written in place would mix them."""
    lm = JaxLM(small.parameters, small._config, eos_token_id=())
    sequences = random_completions(lm, 1, 3, 6)  # type: ignore[arg-type]
    start = lm.append(lm.prefill([[1]]), np.array([2]))  # in a buffer with room, which continuations would share
    expected, states, kept = scored(lm, [[1, 2]], sequences)[0], [start] * 3, []
    for step in range(6):
        for which in range(3):
            log_probs = np.asarray(lm.next_log_probs(states[which]))
            assert close(log_probs[0, sequences.tokens[0, which, step]], expected[which, step])
            kept.append((states[which], log_probs.copy()))
            states[which] = lm.append(states[which], sequences.tokens[0, [which], step])
    for state, log_probs in kept:
        assert np.array_equal(lm.next_log_probs(state), log_probs)
    again = lm.append(start, sequences.tokens[0, [1], 0])
    assert close(np.asarray(lm.next_log_probs(again))[0, sequences.tokens[0, 1, 1]], expected[1, 1])


@pytest.mark.slow
def test_decoding_past_the_growth_of_buffers() -> None:
    lm = JaxLM(cached_lm("qwen3").parameters, cached_lm("qwen3")._config, eos_token_id=())
    prompts = [np.arange(20).tolist(), [7]]
    sequences = random_completions(lm, 2, 2, 50)  # type: ignore[arg-type]
    assert close(decoded(lm, prompts, sequences), scored(lm, prompts, sequences))


@pytest.mark.slow
def test_chunks_change_neither_scores_nor_gradients(small: JaxLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PROMPTS[:2]
    sequences = random_completions(small, 2, 8, 5)  # type: ignore[arg-type]

    def gradient_of_total() -> Any:
        def total(parameters: Any) -> Any:
            return small.with_parameters(parameters).token_log_probs(prompts, sequences).sum()

        return jax.jit(jax.grad(total))(small.parameters)

    scores, gradient = scored(small, prompts, sequences), gradient_of_total()
    calls = []
    recomputed = jax_rows.recomputed
    monkeypatch.setattr(jax_rows, "BUDGET", 1)
    monkeypatch.setattr(jax_rows, "recomputed", lambda reading: lambda *a: calls.append(1) or recomputed(reading)(*a))
    assert close(scored(small, prompts, sequences), scores)
    assert len(calls) == 2
    chunked = gradient_of_total()
    assert len(calls) == 4
    for ours, theirs in zip(jax.tree.leaves(chunked), jax.tree.leaves(gradient), strict=True):
        assert close(ours, theirs, 1e-5 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.slow
def test_float64_mode_changes_nothing(small: JaxLM) -> None:
    sequences = random_completions(small, len(PROMPTS), 4, 5)  # type: ignore[arg-type]
    expected = scored(small, PROMPTS, sequences)
    with jax.enable_x64(True):
        assert small.token_log_probs(PROMPTS, sequences).dtype == jnp.float32
        assert close(decoded(small, PROMPTS, sequences), expected)
    assert not jax.config.jax_enable_x64


# Compilation


@contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """The seconds of every compilation inside, whoever caused it."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
