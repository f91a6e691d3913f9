"""Drawing and scoring in one traced program: against the host's loop, against enumeration, against torch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

import bayes_klrl as bk
from bayes_klrl.arrays import draw_tokens as draw_on_host
from bayes_klrl.models.decoding import Decoding, decode
from bayes_klrl.models.jax_lm import lm as jax_lm
from bayes_klrl.models.jax_lm.checkpoint import named_tensors
from bayes_klrl.models.jax_lm.decoding import draw_tokens, first_beyond
from bayes_klrl.models.jax_lm.lm import JaxLM
from bayes_klrl.sequences import Sequences, completion_lengths
from tests.models.jax_lm.test_lm import (
    PROMPTS,
    cached_lm,
    close,
    scored,
    small_pair,
    torch_model,
)
from tests.models.torch_lm.test_lm import all_completions, random_completions, reference_scores

SHAPE = (len(PROMPTS), 7, 5)
"""Prompts, draws and tokens of most tests: JAX compiles each shape anew."""

EOS = {"one": 0, "several": (0, 3, 4), "none": ()}


@functools.cache
def small(eos: str = "one", temperature: float = 1.0) -> JaxLM:
    lm = small_pair()[0]
    return JaxLM(lm.parameters, lm._config, eos_token_id=EOS[eos], temperature=temperature)


def uniforms_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def completed(lm: JaxLM, tokens: Any) -> Sequences:
    tokens = np.asarray(tokens)
    return Sequences(tokens, completion_lengths(tokens, lm.eos_token_ids))


def host_loop(lm: JaxLM, prompts: list[list[int]], uniforms: np.ndarray) -> Decoding:
    """What the host's loop draws with the same uniforms, (P, N, T)."""
    num_tokens = uniforms.shape[2]
    decoding = Decoding((lm,), prompts, uniforms.shape[1], num_tokens)
    while not decoding.done:
        decoding.step(uniforms.reshape(-1, num_tokens)[:, decoding.step_count])
    return decoding


def assert_one_distribution(lm: JaxLM, uniforms: np.ndarray) -> Sequences:
    """Tokens are those of the host's loop, log-probs those of its loop and of both scorers."""
    padded = lm.pad_prompts(PROMPTS, uniforms.shape[2])
    tokens, log_probs = lm.sample_tokens(padded, uniforms)
    assert (tokens.dtype, log_probs.dtype, tokens.shape) == (jnp.int32, jnp.float32, uniforms.shape)
    loop, sequences = host_loop(lm, PROMPTS, uniforms), completed(lm, tokens)
    assert np.array_equal(tokens, loop.tokens.reshape(uniforms.shape))
    assert np.array_equal(sequences.lengths.ravel(), loop.lengths)
    assert close(np.asarray(log_probs, dtype=np.float64).sum(2).ravel(), loop.log_probs[0], 1e-4)
    for scores in (lm.score_tokens(padded, tokens), lm.token_log_probs(PROMPTS, sequences)):
        assert scores.dtype == jnp.float32
        assert close(scores, log_probs)
        assert not np.asarray(scores)[~sequences.mask].any()
    assert not np.asarray(log_probs)[~sequences.mask].any()
    return sequences


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_draws_and_scores_are_those_of_the_host(name: str) -> None:
    sequences = assert_one_distribution(cached_lm(name), uniforms_of(len(PROMPTS), 8, 12))
    assert len(np.unique(sequences.lengths)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "eos, temperature", [("several", 1.7), *(pytest.param(eos, 1.0, marks=pytest.mark.slow) for eos in ("one", "none"))]
)
def test_ends_and_temperatures(eos: str, temperature: float) -> None:
    sequences = assert_one_distribution(small(eos, temperature), uniforms_of(*SHAPE))
    assert sequences.lengths.max() == 5
    assert (sequences.lengths.min() == 5) == (eos == "none")


@pytest.mark.slow
def test_one_token_is_the_shortest_completion() -> None:
    assert_one_distribution(small(), uniforms_of(len(PROMPTS), 6, 1))


@pytest.mark.slow
def test_frequencies_are_probabilities() -> None:
    """Chi-square over all completions of a prompt beside a longer one, by enumeration."""
    lm, prompts, num_draws = small(), [[1, 2, 3, 4], [4]], 20_000
    everything = all_completions(lm, len(prompts), 3)  # type: ignore[arg-type]
    expected = num_draws * np.exp(scored(lm, prompts, everything).sum(2, dtype=np.float64))
    tokens, _ = lm.sample_tokens(lm.pad_prompts(prompts, 3), uniforms_of(2, num_draws, 3, seed=1))
    place = {tuple(row): index for index, row in enumerate(everything.tokens[0].tolist())}
    for drawn, counts in zip(np.asarray(tokens), expected, strict=True):
        found = np.bincount([place[tuple(row)] for row in drawn.tolist()], minlength=len(place))
        often = counts >= 5
        observed, wanted = found[often], counts[often]
        assert wanted.sum() > 0.99 * num_draws
        assert scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_extreme_uniforms_draw_possible_tokens(u: float) -> None:
    lm = small("none")
    tokens, log_probs = lm.sample_tokens(lm.pad_prompts(PROMPTS, 5), np.full(SHAPE, u))
    assert np.isfinite(log_probs).all()
    assert set(np.asarray(tokens).ravel().tolist()) == {0 if u == 0.0 else 4}


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 63, 64, 65, 1000])
def test_no_token_of_probability_zero_is_drawn(vocab_size: int) -> None:
    """Half the tokens are impossible, the first and last among them, and some blocks hold none that is possible."""
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(size=(200, vocab_size), scale=3).astype(np.float32)
    logits[rng.random(logits.shape) < 0.5] = -np.inf
    logits[:, vocab_size // 3 : vocab_size // 2] = -np.inf
    logits[np.arange(200), rng.integers(vocab_size, size=200)] = 0.0
    log_probs = jax.nn.log_softmax(logits)
    for uniforms in (np.zeros(200), np.full(200, 1 - 2.0**-53), np.full(200, 1 - 2.0**-24), rng.random(200)):
        tokens = np.asarray(draw_tokens(log_probs, uniforms.astype(np.float32)))
        assert np.isfinite(np.asarray(log_probs)[np.arange(200), tokens]).all()
    assert np.array_equal(tokens, draw_on_host(log_probs, np.arange(200), uniforms))


def test_sums_that_do_not_ascend_draw_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sums taken in parallel may come out on other devices: beyond an impossible token, a little more, or less."""
    sums = jnp.array([[0.25, 0.75, 0.7500001], [0.25, 0.2500001, 0.75], [0.25, 0.75, 0.7499999]])
    monkeypatch.setattr(jnp, "cumsum", lambda weights, axis: sums)
    weights = jnp.array([[0.25, 0.5, 0.0], [0.25, 0.0, 0.5], [0.25, 0.5, 0.0]])
    index, rest = first_beyond(weights, jnp.array([0.75, 0.25, 0.75]))
    assert index.tolist() == [1, 2, 1]
    assert ((rest >= 0) & (rest < 0.5)).all()


@pytest.mark.slow
def test_draws_are_exact_where_sums_taken_in_parallel_are_not() -> None:
    """A grid of uniforms meets every token as often as its probability says, though each is a small one."""
    log_probs = jax.nn.log_softmax(np.random.default_rng(0).normal(size=(1, 300)).astype(np.float32))
    uniforms = (np.arange(2**16) + 0.5) / 2**16
    tokens = np.asarray(draw_tokens(jnp.broadcast_to(log_probs, (2**16, 300)), uniforms.astype(np.float32)))
    assert (np.diff(tokens) >= 0).all()
    shares = np.bincount(tokens, minlength=300) / 2**16
    assert np.abs(shares - np.exp(np.asarray(log_probs[0], dtype=np.float64))).max() <= 1.01 / 2**16


# Traced


@pytest.mark.slow
def test_everything_may_be_traced() -> None:
    """Parameters, uniforms, and which prompts are taken."""
    lm = small()
    padded, uniforms = lm.pad_prompts(PROMPTS, 5), uniforms_of(*SHAPE)

    @jax.jit
    def traced(parameters: Any, index: Any, uniforms: Any) -> Any:
        inner, chosen = lm.with_parameters(parameters), jax.tree.map(lambda array: array[index], padded)
        tokens, log_probs = inner.sample_tokens(chosen, uniforms)
        everywhere = inner.score_positions(chosen, tokens)
        return tokens, log_probs, inner.score_tokens(chosen, tokens), everywhere

    index = np.array([2, 0, 0])
    halved = jax.tree.map(lambda array: 0.5 * array, lm.parameters)
    tokens, log_probs, scores, everywhere = traced(halved, index, uniforms[index])
    other = lm.with_parameters(halved)
    expected, expected_log_probs = other.sample_tokens(
        jax.tree.map(lambda array: array[index], padded), uniforms[index]
    )
    assert np.array_equal(tokens, expected)
    assert close(log_probs, expected_log_probs)
    assert close(scores, log_probs)
    assert close(everywhere, other.position_log_probs([PROMPTS[i] for i in index], completed(lm, tokens)))
    assert not np.array_equal(tokens, lm.sample_tokens(padded, uniforms)[0][index])


@pytest.mark.slow
def test_float64_mode_changes_nothing() -> None:
    lm, uniforms = small(), uniforms_of(*SHAPE)
    padded = lm.pad_prompts(PROMPTS, 5)
    tokens, log_probs = lm.sample_tokens(padded, uniforms)
    with jax.enable_x64(True):
        again, its_log_probs = lm.sample_tokens(lm.pad_prompts(PROMPTS, 5), uniforms)
        assert (again.dtype, its_log_probs.dtype) == (jnp.int32, jnp.float32)
        assert lm.score_tokens(padded, np.asarray(tokens, dtype=np.int64)).dtype == jnp.float32
        drawn = decode((lm,), PROMPTS, 7, 5, np.random.default_rng(0))
    assert np.array_equal(again, tokens)
    assert close(its_log_probs, log_probs)
    assert np.array_equal(drawn.tokens, decode((lm,), PROMPTS, 7, 5, np.random.default_rng(0)).tokens)


@pytest.mark.slow
def test_sampling_is_batched_by_vmap() -> None:
    lm = small()
    padded, uniforms = lm.pad_prompts(PROMPTS, 5), uniforms_of(2, *SHAPE)
    tokens, log_probs = jax.vmap(lambda u: lm.sample_tokens(padded, u))(uniforms)
    for index in range(2):
        alone, its_log_probs = lm.sample_tokens(padded, uniforms[index])
        assert np.array_equal(tokens[index], alone)
        assert close(log_probs[index], its_log_probs)


@pytest.mark.slow
def test_sampling_has_no_gradient() -> None:
    lm = small()
    padded, uniforms = lm.pad_prompts(PROMPTS, 5), jnp.asarray(uniforms_of(*SHAPE))

    def total(parameters: Any, uniforms: Any) -> Any:
        return lm.with_parameters(parameters).sample_tokens(padded, uniforms)[1].sum()

    gradients = jax.grad(total, argnums=(0, 1))(lm.parameters, uniforms)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
@pytest.mark.parametrize("name, rows_at_once", [("gpt2", 4), ("qwen3", 1000)])
def test_gradients_are_those_of_torch(name: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one go and in chunks, which neither 3 prompts nor 5 draws fill; as those of `token_log_probs` in test_lm.py."""
    monkeypatch.setattr(jax_lm, "chunk_size", lambda floats: rows_at_once)
    lm, model = cached_lm(name), copy.deepcopy(torch_model(name)).double()
    padded = lm.pad_prompts(PROMPTS, 6)
    sequences = random_completions(lm, 3, 5, 6)  # type: ignore[arg-type]
    weights = np.random.default_rng(0).normal(size=(3, 5, 1))

    def total(parameters: Any) -> tuple[Any, Any]:
        scores = lm.with_parameters(parameters).score_tokens(padded, sequences.tokens)
        return (weights * scores).sum(), scores

    gradients, scores = jax.jit(jax.grad(total, has_aux=True))(lm.parameters)
    expected = reference_scores(model, PROMPTS, sequences)
    assert close(scores, expected.detach())
    (torch.as_tensor(weights) * expected).sum().backward()
    exact = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    floor = 1e-3 * max(np.linalg.norm(gradient) for gradient in exact.values())  # key biases: 0 but for rounding
    for key, gradient in named_tensors(lm._architecture, gradients):
        assert np.linalg.norm(gradient - exact[key]) <= 1e-5 * max(np.linalg.norm(exact[key]), floor), key


@pytest.mark.slow
@pytest.mark.parametrize("rows_at_once", [4, 14])
def test_chunks_change_no_number(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small()
    padded = lm.pad_prompts(PROMPTS, 5)
    tokens, log_probs = lm.sample_tokens(padded, uniforms_of(*SHAPE))
    monkeypatch.setattr(jax_lm, "chunk_size", lambda floats: rows_at_once)
    assert close(lm.score_tokens(padded, tokens), log_probs)
    assert lm.score_tokens(padded, tokens[:, :0]).shape == (3, 0, 5)


@pytest.mark.slow
def test_chunks_bound_the_memory_of_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that the compiled program needs beside its arguments, of 3 x 64 rows in one go and 12 at once."""
    lm = cached_lm("gpt2")
    padded, tokens = lm.pad_prompts(PROMPTS, 24), jnp.ones((3, 64, 24), dtype=jnp.int32)
    needed = {}
    for rows_at_once in (1000, 12):
        monkeypatch.setattr(jax_lm, "chunk_size", lambda floats, rows=rows_at_once: rows)
        gradient = jax.jit(jax.grad(lambda p: lm.with_parameters(p).score_tokens(padded, tokens).sum()))
        needed[rows_at_once] = gradient.lower(lm.parameters).compile().memory_analysis().temp_size_in_bytes
    assert needed[12] < needed[1000] / 8, needed


# Positions and features


@pytest.mark.slow
def test_positions_and_features_are_torchs() -> None:
    """Of Qwen3; `test_hidden_states_as_features_agree` in test_backends.py asks GPT-2 and Llama."""
    qwen3 = cached_lm("qwen3")
    lm, theirs = (
        JaxLM(qwen3.parameters, qwen3._config, eos_token_id=range(9)),
        bk.TorchLM(torch_model("qwen3"), eos_token_id=range(9)),
    )
    padded = lm.pad_prompts(PROMPTS, 6)
    tokens, log_probs = lm.sample_tokens(padded, uniforms_of(3, 5, 6))
    sequences = completed(lm, tokens)
    assert sequences.lengths.min() < 6
    with torch.no_grad():
        positions, features = (
            getattr(theirs, what)(PROMPTS, sequences).numpy() for what in ("position_log_probs", "features")
        )
    assert close(lm.position_log_probs(PROMPTS, sequences), positions)
    assert close(lm.score_positions(padded, tokens), positions)
    assert close(lm.features(PROMPTS, sequences), features)
    drawn = np.take_along_axis(np.asarray(lm.score_positions(padded, tokens)), np.asarray(tokens)[..., None], 3)[..., 0]
    assert close(drawn, log_probs)
    assert not np.asarray(lm.features(PROMPTS, sequences))[~sequences.mask].any()
    none = Sequences(np.zeros((3, 0, 6), int), np.zeros((3, 0), int))
    assert lm.position_log_probs(PROMPTS, none).shape == (3, 0, 6, 40)


@pytest.mark.slow
def test_what_stands_past_the_first_eos_does_not_matter() -> None:
    lm = small()
    padded = lm.pad_prompts(PROMPTS, 5)
    tokens, _ = lm.sample_tokens(padded, uniforms_of(*SHAPE))
    odd = np.where(completed(lm, tokens).mask, tokens, -7)
    assert np.array_equal(lm.score_tokens(padded, odd), lm.score_tokens(padded, tokens))


def test_a_copy_is_independent() -> None:
    lm = small()
    guide = lm.copy()
    assert guide is not lm
    assert (guide.eos_token_ids, guide.temperature) == (lm.eos_token_ids, lm.temperature)
    jax.tree.map(lambda array: array.delete(), guide.parameters)  # what an optimiser that gives buffers away does
    assert np.isfinite(lm.next_log_probs(lm.prefill([[1]]))).all()


@pytest.mark.slow
def test_refusals() -> None:
    lm = small()
    padded = lm.pad_prompts(PROMPTS, 28)
    with pytest.raises(bk.BayesKLRLError, match="33 tokens; this model reads at most 32"):
        lm.pad_prompts(PROMPTS, 29)
    with pytest.raises(bk.BayesKLRLError, match=r"0..4.*from 7 to 7"):
        lm.pad_prompts([[7]])
    with pytest.raises(bk.BayesKLRLError, match=r"\(P, N, T\) = \(3, N, T\).*got \(2, 4, 5\)"):
        lm.sample_tokens(padded, np.zeros((2, 4, 5)))
    with pytest.raises(bk.BayesKLRLError, match=r"T >= 1; got \(3, 4, 0\)"):
        lm.score_tokens(padded, np.zeros((3, 4, 0), int))
    with pytest.raises(bk.BayesKLRLError, match=r"0..4.*from 9 to 9"):
        lm.score_tokens(padded, np.full((3, 4, 2), 9))
