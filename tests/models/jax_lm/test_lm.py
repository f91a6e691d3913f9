"""JaxLM against torch, against enumeration, and against itself."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
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
from bayes_klrl.models.jax_lm.config import architecture_of
from bayes_klrl.models.jax_lm.forward import ACTIVATIONS, empty_cache, hidden_states, logits
from bayes_klrl.models.jax_lm.lm import JaxLM
from bayes_klrl.sequences import Sequences
from tests.helpers.tiny_models import seeded, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.helpers.truth import Truth, z_score
from tests.models.torch_lm.test_lm import all_completions, random_completions, reference_scores

pytestmark = pytest.mark.usefixtures("quick_jax")

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


def test_full_and_cached_log_probs_equal_torchs(name: str) -> None:
    lm, model = cached_lm(name), torch_model(name)
    sequences = random_completions(lm, len(PROMPTS), 5, 12)  # type: ignore[arg-type]
    expected = reference_scores(model, PROMPTS, sequences).detach().numpy()
    scores = lm.token_log_probs(PROMPTS, sequences)
    assert scores.dtype == jnp.float32
    assert close(scores, expected)
    assert close(decoded(lm, PROMPTS, sequences), expected)
    assert np.abs(expected).max() > 5  # far from uniform: a wrong forward would show


def test_all_logits_equal_torchs_after_prompts_of_any_length(name: str) -> None:
    lm, model = cached_lm(name), torch_model(name)
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).numpy() for prompt in PROMPTS]
    assert close(lm.next_log_probs(lm.prefill(PROMPTS)), np.stack(expected))


@pytest.mark.parametrize(
    "name",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama, untied", "mistral", "qwen2", "qwen3"))],
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
    hidden, _ = hidden_states(lm._architecture, lm.parameters, jnp.asarray(tokens), none, empty, 0)
    assert close(logits(lm._architecture, lm.parameters, hidden), single, allowed)
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


@pytest.mark.slow
def test_ten_prompts_of_different_lengths_compile_once() -> None:
    """A first prompt compiles; nine others, and other numbers of rows that end at other times, compile nothing."""
    model = tiny_gpt2(n_layer=1, n_embd=8, n_positions=64)  # an architecture that no other test compiles for
    lm = jax_lm_of(model)

    def work(length: int, num_draws: int) -> None:
        prompt = [1 + index % 4 for index in range(length)]
        posterior = bk.Posterior(lm, longer_is_better(), prompts=prompt, max_new_tokens=6)
        draws = bk.ImportanceSampling(num_draws).run(posterior, seed=length)
        posterior.log_prior(draws)

    with counted_compilations() as first:
        work(16, 16)
        work(9, 16)
    assert 4 <= len(first) <= 16
    with counted_compilations() as later:
        for length in range(9, 17):
            work(length, num_draws=9 + length % 8)
    assert len(later) <= 1, later  # a number of distinct prefixes that has not been met yet


# Algorithms


def longer_is_better() -> bk.TokenReward:
    return bk.TokenReward(lambda tokens, lengths: lengths + (tokens[:, 0] == 2), alpha=0.7, bounds=(0, 7))


@functools.cache
def posteriors() -> tuple[bk.Posterior, bk.Posterior]:
    """One posterior on JAX and on torch; prompts of different lengths."""
    jax_prior, torch_prior = small_pair()
    options: dict[str, Any] = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 4}
    return (
        bk.Posterior(jax_prior, longer_is_better(), **options),
        bk.Posterior(torch_prior, longer_is_better(), **options),
    )


def test_exact_agrees_with_torch_and_with_enumeration() -> None:
    ours, theirs = (bk.Exact().run(posterior, seed=0) for posterior in posteriors())
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert close(ours.log_prior, theirs.log_prior, 1e-4)
    assert close(ours.log_evidence, theirs.log_evidence)
    assert close(ours.log_evidence, Truth(posteriors()[0]).log_evidence)


@pytest.mark.parametrize("algorithm", [bk.ImportanceSampling(64), bk.SMC(num_particles=64)], ids=["is", "smc"])
def test_evidence_is_unbiased(algorithm: Any) -> None:
    posterior = posteriors()[0]
    truth = Truth(posterior).log_evidence
    ratios = np.exp([algorithm.run(posterior, seed=seed).log_evidence - truth for seed in range(30)])
    assert max(abs(z_score(ratio, 1.0)) for ratio in ratios.T) < 4


def test_certificate_and_frontier() -> None:
    ours, theirs = posteriors()
    certificate = bk.certify(ours, ours.prior, seed=0)
    assert (certificate.reverse_kl[:, 0] <= certificate.reverse_kl[:, 1]).all()
    assert close(certificate.elbo, bk.certify(theirs, theirs.prior, seed=0).elbo, 1e-4)
    curves = [bk.frontier(posterior, num_draws=256, seed=0) for posterior in posteriors()]
    assert close(curves[0].reward, curves[1].reward, 1e-4)


@pytest.mark.slow
def test_torch_is_not_imported(tmp_cwd: Path) -> None:
    code = """
import sys
import bayes_klrl as bk
lm = bk.JaxLM.from_pretrained("austen")
cheerful = bk.Reward(lambda completions: [float("a" in text) for text in completions], alpha=0.5, bounds=(0, 1))
posterior = bk.Posterior(lm, cheerful, prompts="It was a fine morning", max_new_tokens=3)
draws = [algorithm.run(posterior, seed=0) for algorithm in (bk.ImportanceSampling(8), bk.SMC(8))]
lm.save_pretrained("saved")
assert lm.decode(lm.encode(["It was"])) == ["It was"]
print("torch" in sys.modules, draws[0].log_evidence[0])
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    imported, log_evidence = run.stdout.split()
    assert imported == "False"
    assert np.isfinite(float(log_evidence))


def test_the_shipped_model_is_torchs(tmp_path: Path) -> None:
    lm, theirs = JaxLM.from_pretrained("austen"), bk.TorchLM.from_pretrained("austen")
    texts = ["It was a fine morning", "Emma"]
    assert lm.encode(texts) == theirs.encode(texts)
    assert (lm.eos_token_ids, lm.bos_token_id, lm.context_length) == (
        theirs.eos_token_ids,
        theirs.bos_token_id,
        theirs.context_length,
    )
    sequences = random_completions(lm, 2, 3, 7)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = theirs.token_log_probs(theirs.encode(texts), sequences)
    assert close(scored(lm, lm.encode(texts), sequences), expected, 3e-5)  # log-probs of up to 20 nats


# Folders


def test_a_saved_model_is_the_same_model_on_torch(name: str, tmp_path: Path) -> None:
    loaded = cached_lm(name)
    changed = jax.tree.map(lambda array: array * 0.75, loaded.parameters)
    lm = JaxLM(changed, loaded._config, tiny_tokenizer(30), eos_token_id=[3, 7], temperature=1.5)
    lm.save_pretrained(tmp_path)
    model, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model) is type(torch_model(name))
    for (key, ours), theirs in zip(sorted(model.named_parameters()), sorted_parameters(name), strict=True):
        assert torch.equal(ours, 0.75 * theirs), key
    sequences = random_completions(lm, len(PROMPTS), 4, 6)  # type: ignore[arg-type]
    theirs = bk.TorchLM.from_pretrained(tmp_path)
    again = JaxLM.from_pretrained(tmp_path)
    for other in (theirs, again):
        assert (other.eos_token_ids, other.temperature) == ({3, 7}, 1.5)
        assert other.encode(["a b"]) == [[1, 2]]
    with torch.no_grad():
        assert close(theirs.token_log_probs(PROMPTS, sequences), scored(lm, PROMPTS, sequences))
    assert np.array_equal(scored(again, PROMPTS, sequences), scored(lm, PROMPTS, sequences))
    assert JaxLM.from_pretrained(tmp_path, eos_token_id=(), temperature=2.0).eos_token_ids == frozenset()


def sorted_parameters(name: str) -> list[torch.Tensor]:
    return [parameter for _, parameter in sorted(torch_model(name).named_parameters())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_become_float32_whatever_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_llama().to(dtype).save_pretrained(tmp_path)
    lm, theirs = JaxLM.from_pretrained(tmp_path), bk.TorchLM.from_pretrained(tmp_path)
    assert {array.dtype for array in jax.tree.leaves(lm.parameters)} == {jnp.dtype("float32")}
    sequences = random_completions(lm, len(PROMPTS), 4, 5)  # type: ignore[arg-type]
    assert close(scored(lm, PROMPTS, sequences), reference_scores(theirs.module, PROMPTS, sequences).detach())


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=50)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    lm = JaxLM.from_pretrained(tmp_path)
    assert close(lm.parameters["outer"]["tokens"], model.model.embed_tokens.weight.detach(), 0)
    lm.save_pretrained(tmp_path)  # over the shards
    again = JaxLM.from_pretrained(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.parameters, lm.parameters))


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    tiny_llama(vocab_size=50).save_pretrained(tmp_path, max_shard_size="5KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(bk.CheckpointError, match=r"model-00002.*cannot be read"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(bk.CheckpointError, match=r"index\.json.*must hold an object; got \[\]"):
        JaxLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "build, change, message",
    [
        (tiny_gpt2, {"model_type": "gpt_neox"}, r"model_type = 'gpt_neox'.*supported values: gpt2, llama"),
        (tiny_gpt2, {"activation_function": "swiglu"}, r"activation_function = 'swiglu'.*gelu_new"),
        (tiny_gpt2, {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx = True.*False"),
        (tiny_gpt2, {"scale_attn_weights": False}, r"scale_attn_weights = False.*True"),
        (tiny_gpt2, {"reorder_and_upcast_attn": True}, r"reorder_and_upcast_attn = True"),
        (tiny_gpt2, {"add_cross_attention": True}, r"add_cross_attention = True"),
        (tiny_gpt2, {"new_option": 3}, r"new_option = 3.*supported keys: .*n_embd"),
        (tiny_llama, {"hidden_act": "tanh"}, r"hidden_act = 'tanh'.*silu"),
        (tiny_llama, {"hidden_act": ["silu"]}, r"hidden_act = \['silu'\]"),
        (tiny_llama, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type = 'yarn'.*llama3"),
        (tiny_llama, {"rope_parameters": {"rope_type": "default", "mscale": 2}}, r"rope_parameters.mscale = 2"),
        (tiny_llama, {"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters.factor = None"),
        (
            tiny_llama,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"rope_parameters.partial_rotary_factor = 0.5.*1.0",
        ),
        (tiny_llama, {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, r"rope_scaling.*dynamic"),
        (tiny_llama, {"model_type": "mistral"}, r"attention_bias = False"),
        (tiny_llama, {"sliding_window": 4096}, r"sliding_window = 4096.*None"),
        (tiny_llama, {"layer_types": ["sliding_attention"] * 2}, r"layer_types"),
        (tiny_llama, {"use_sliding_window": True}, r"use_sliding_window = True.*False"),
        (tiny_llama, {"attention_bias": "some"}, r"attention_bias = 'some'.*False, True"),
        (tiny_llama, {"tie_word_embeddings": None}, r"tie_word_embeddings = None.*False, True"),
        (tiny_llama, {"quantization_config": {"bits": 4}}, r"quantization_config"),
        (tiny_llama, {"hidden_size": None}, r"hidden_size = None.*positive integer"),
        (tiny_llama, {"num_hidden_layers": True}, r"num_hidden_layers = True.*positive integer"),
        (tiny_llama, {"num_key_value_heads": 3}, r"num_key_value_heads = 3.*a divisor of 4"),
        (tiny_llama, {"head_dim": 3}, r"head_dim = 3.*even"),
        (tiny_llama, {"rms_norm_eps": None}, r"rms_norm_eps = None.*positive number"),
        (
            tiny_llama,
            {"rope_parameters": {"rope_theta": "big"}},
            r"rope_parameters.rope_theta = 'big'.*positive number",
        ),
        (tiny_llama, {"rope_parameters": None, "rope_theta": -1.0}, r"rope_theta = -1.0.*positive number"),
        (tiny_llama, {"rope_parameters": "default"}, r"rope_parameters = 'default'.*dictionary"),
        (tiny_llama, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type = 'dynamic'"),
        (tiny_llama, {"rope_parameters": {"rope_type": "longrope"}}, r"rope_type = 'longrope'"),
        (tiny_llama, {"rope_parameters": {"rope_type": "linear", "factor": None}}, r"rope_parameters.factor = None"),
        (tiny_llama, {"layer_types": ["full_attention"]}, r"layer_types.*each of the 2 layers"),
        (tiny_llama, {"embedding_multiplier": 2.0}, r"embedding_multiplier = 2.0"),
        (tiny_llama, {"auto_map": {"AutoModel": "code.Model"}}, r"auto_map"),
        (lambda: relative("Qwen2"), {"use_sliding_window": True, "sliding_window": 0}, r"sliding_window = 0.*positive"),
        (
            lambda: relative("Qwen2"),
            {"layer_types": ["sliding_attention"] * 4},
            r"layer_types.*4 layers full_attention",
        ),
        (lambda: relative("Qwen3"), {"use_sliding_window": "yes"}, r"use_sliding_window = 'yes'.*False, True"),
        (tiny_gpt2, {"n_head": 3}, r"n_head = 3.*a divisor of 16"),
        (tiny_gpt2, {"n_inner": "wide"}, r"n_inner = 'wide'.*positive integer"),
        (tiny_gpt2, {"n_embd": None}, r"n_embd = None.*positive integer"),
        (tiny_gpt2, {"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon = '1e-5'.*positive number"),
        (tiny_llama, {"logit_scale": 2.0}, r"logit_scale = 2.0"),
    ],
)
def test_configurations_that_are_refused(build: Any, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(bk.CheckpointError, match=message):
        JaxLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_field_of_transformers_is_known(name: str) -> None:
    """A field that a new version adds must be looked at: is it obeyed, refused, or none of our business?"""
    config = getattr(hf, f"{name}Config")(num_hidden_layers=3).to_dict()
    architecture = architecture_of(config)
    assert architecture.num_layers == 3
    assert (architecture.window, architecture.slides) == ((4096, (True,) * 3) if name == "Mistral" else (None, ()))


@pytest.mark.parametrize("first, expected", [(0, (True,) * 4), (3, (False, False, False, True)), (4, ()), (None, ())])
def test_windows_without_layer_types_start_at_a_layer(first: int | None, expected: tuple[bool, ...]) -> None:
    """As transformers fills `layer_types` in; its default is layer 28."""
    options = {} if first is None else {"max_window_layers": first}
    config = dict(cached_lm("qwen2")._config) | {"use_sliding_window": True, "sliding_window": 4}
    config = {key: value for key, value in config.items() if key not in ("layer_types", "max_window_layers")} | options
    assert architecture_of(config).slides == expected
    theirs = hf.Qwen2Config.from_dict(dict(config)).layer_types
    assert tuple(kind == "sliding_attention" for kind in theirs) == (expected or (False,) * 4)


COMPUTED: dict[str, Callable[[], Any]] = {
    "gpt2, untied": lambda: with_biases(tiny_gpt2(tie_word_embeddings=False, **DEEP)),
    "gpt2, sizes": lambda: tiny_gpt2(n_inner=20, layer_norm_epsilon=0.1, **DEEP),
    "llama, sizes": lambda: tiny_llama(head_dim=10, rms_norm_eps=0.1, num_key_value_heads=1, **DEEP),
    "llama, all heads": lambda: tiny_llama(num_key_value_heads=None, **DEEP),
    "mistral, window": lambda: relative("Mistral", sliding_window=3),
    "mistral, wide window": lambda: relative("Mistral", sliding_window=128),
    "qwen2, window in one layer": lambda: relative(
        "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
    "qwen2, window not used": lambda: relative("Qwen2", use_sliding_window=False, sliding_window=4),
    "qwen3, window by types": lambda: relative(
        "Qwen3",
        use_sliding_window=True,
        sliding_window=2,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3, biases": lambda: relative("Qwen3", attention_bias=True),
} | {
    f"{build.__name__}, {activation}": functools.partial(build, **{key: activation}, **DEEP)
    for build, key in ((tiny_gpt2, "activation_function"), (tiny_llama, "hidden_act"))
    for activation in ACTIVATIONS
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case not in ("gpt2, untied", "llama, sizes")))
        for case in COMPUTED
    ],
)
def test_configurations_that_are_computed(case: str) -> None:
    """Scored, decoded step by step, and drawn in one scan: as torch does."""
    model = COMPUTED[case]()
    lm = jax_lm_of(model, eos_token_id=())
    prompts = [[1, 2, 3, 4, 5, 6], [4]]
    sequences = random_completions(lm, 2, 2, 8)  # type: ignore[arg-type]
    expected = reference_scores(model.double(), prompts, sequences).detach()  # in float32 torch errs as much as we do
    assert close(scored(lm, prompts, sequences), expected)
    if "window" in case:  # what is far back is in the cache
        assert close(decoded(lm, prompts, sequences), expected)
        changed = dict(lm._config) | {"sliding_window": None, "layer_types": None}
        wide = JaxLM(lm.parameters, changed, eos_token_id=())
        matters = case not in ("mistral, wide window", "qwen2, window not used")
        assert close(scored(wide, prompts, sequences), expected) != matters


def test_the_older_key_of_rotary_scaling_comes_first_as_in_transformers() -> None:
    config = dict(cached_lm("llama, tied")._config) | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = architecture_of(config).rope
    assert rope is not None
    theirs = hf.LlamaConfig.from_dict(dict(config)).rope_parameters
    assert (rope.kind, rope.factor, rope.theta) == (theirs["rope_type"], theirs["factor"], theirs["rope_theta"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), r"1 of the model's weights are missing \(norm.weight"),
        (lambda t: t.update(extra=t["model.norm.weight"]), r"1 weights that a model .* does not have \(extra"),
        (lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}), r"norm.weight has shape \(3,\).*\(16,\)"),
        (lambda t: t.update({"lm_head.weight": np.ones((5, 16), np.float32)}), r"tie_word_embeddings = True.*differs"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}),
            r"does not have \(layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(bk.CheckpointError, match=message):
        JaxLM.from_pretrained(tmp_path)


def test_a_second_copy_of_a_tied_embedding_is_accepted(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, tmp_path / "model.safetensors")
    assert "head.weight" not in JaxLM.from_pretrained(tmp_path).parameters["outer"]


def test_folders_and_names_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match=r"'owner/model'.*austen.*bk.TorchLM"):
        JaxLM.from_pretrained("owner/model")
    with pytest.raises(bk.CheckpointError, match=r"no config\.json"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(bk.CheckpointError, match="no safetensors weights"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(bk.CheckpointError, match="no JSON"):
        JaxLM.from_pretrained(tmp_path)
    tiny_gpt2().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(bk.CheckpointError, match=r"no tokenizer\.json"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(bk.CheckpointError, match="cannot be read"):
        JaxLM.from_pretrained(tmp_path)


def test_other_refusals(small: JaxLM) -> None:
    parameters, config = small.parameters, small._config
    with pytest.raises(bk.BayesKLRLError, match="temperature"):
        JaxLM(parameters, config, temperature=0.0)
    with pytest.raises(bk.BayesKLRLError, match=r"\[5\] is outside the vocabulary 0..4"):
        JaxLM(parameters, config, eos_token_id=5)
    with pytest.raises(bk.CheckpointError, match="belong together"):
        JaxLM(parameters, config, tiny_tokenizer(6))
    with pytest.raises(bk.CheckpointError, match=r"outer: tokens"):
        small.with_parameters(
            {"outer": parameters["outer"] | {"tokens": jnp.ones((4, 16))}, "layers": parameters["layers"]}
        )
    with pytest.raises(bk.BayesKLRLError, match=r"This JaxLM has no tokenizer to encode.*JaxLM\(model, tokenizer\)"):
        small.encode(["a"])
    with pytest.raises(bk.BayesKLRLError, match="Prompt 1 has no tokens"):
        small.prefill([[1], []])
    with pytest.raises(bk.BayesKLRLError, match=r"0..4.*from 7 to 7"):
        small.prefill([[7]])
    with pytest.raises(bk.BayesKLRLError, match="33 tokens; this model reads at most 32"):
        small.append(small.prefill([[1] * 32]), np.array([1]))
    with pytest.raises(bk.BayesKLRLError, match="have 36 tokens"):
        small.token_log_probs([[1] * 32], Sequences(np.ones((1, 1, 4), int), np.array([[4]])))
    with pytest.raises(bk.BayesKLRLError, match="One token for each of 2 rows"):
        small.append(small.prefill([[1], [2]]), np.array([1]))
    with pytest.raises(bk.BayesKLRLError, match="2 prompts but completions of 1"):
        small.token_log_probs([[1], [2]], Sequences(np.ones((1, 1, 4), int), np.array([[4]])))
    empty = Sequences(np.zeros((1, 0, 4), int), np.zeros((1, 0), int))
    assert small.token_log_probs([[1]], empty).shape == (1, 0, 4)
