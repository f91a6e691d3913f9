"""Decoding in lockstep, which `decode` takes instead of steps: the same draws, and what it costs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.models.decoding import Decoding, decode
from bayes_klrl.models.jax_lm import lockstep as jax_lockstep
from bayes_klrl.models.jax_lm.lm import JaxLM
from bayes_klrl.models.jax_lm.lockstep import JaxLockstep
from tests.helpers.tiny_models import tiny_gpt2
from tests.models.jax_lm.test_decoding import small
from tests.models.jax_lm.test_lm import (
    PROMPTS,
    cached_lm,
    close,
    counted_compilations,
    jax_lm_of,
    small_pair,
)

# In lockstep: what `decode` takes instead of steps


def by_steps(
    models: tuple[Any, ...], prompts: list[list[int]], num_draws: int, num_tokens: int, rng: np.random.Generator
) -> Decoding:
    decoding = Decoding(models, prompts, num_draws, num_tokens)
    while not decoding.done:
        decoding.step(rng.random(decoding.finished.size))
    return decoding


def guide_of(lm: JaxLM) -> JaxLM:
    """Another distribution over the same completions."""
    return lm.with_parameters(jax.tree.map(lambda array: 0.8 * array, lm.parameters))


LOCKSTEP: dict[str, dict[str, Any]] = {
    "all end early": {"eos": "several", "num_draws": 20, "num_tokens": 12},
    "none ends": {"eos": "none", "num_draws": 5, "num_tokens": 12},
    "a single row": {"eos": "one", "num_draws": 1, "num_tokens": 9, "prompts": [[4]]},
    "one token": {"eos": "one", "num_draws": 7, "num_tokens": 1},
    "short buffers": {"eos": "one", "num_draws": 10, "num_tokens": 20, "growth": 8},
    "tempered": {"eos": "one", "num_draws": 10, "num_tokens": 12, "temperature": 1.7},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOCKSTEP)
def test_lockstep_draws_what_steps_draw(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, the same log-probs under both models, and the generator is left in the same place."""
    options = {"temperature": 1.0, "prompts": PROMPTS, "growth": jax_lockstep.GROWTH} | LOCKSTEP[case]
    monkeypatch.setattr(jax_lockstep, "GROWTH", options["growth"])
    prior = small(options["eos"], options["temperature"])
    models = guide_of(prior), prior, prior
    first, second = np.random.default_rng(5), np.random.default_rng(5)
    drawn = decode(models, options["prompts"], options["num_draws"], options["num_tokens"], first)
    steps = by_steps(models, options["prompts"], options["num_draws"], options["num_tokens"], second)
    assert np.array_equal(drawn.tokens, steps.tokens)
    assert np.array_equal(drawn.lengths, steps.lengths)
    assert np.array_equal(drawn.prompt_index, steps.prompt_index)
    assert drawn.log_probs.shape == (3, len(drawn.tokens))
    assert np.array_equal(drawn.log_probs[1], drawn.log_probs[2])
    assert close(drawn.log_probs, steps.log_probs, 1e-4)
    assert first.random() == second.random()
    assert np.array_equal(drawn.sequences().tokens, steps.sequences().tokens)


@pytest.mark.slow
def test_rows_that_have_ended_are_dropped_and_counted_until_then() -> None:
    """64 rows of which most end at once: model tokens are at least those needed, and far fewer than 64 a step."""
    lm, prompts, num_tokens = small("several"), [[1, 2, 3]], 20
    drawn = decode((lm,), prompts, 64, num_tokens, np.random.default_rng(0))
    read = drawn.model_tokens - 3
    needed = int((drawn.lengths - 1).sum())
    assert needed <= read <= 2 * needed + 8 * num_tokens
    assert read < 64 * (num_tokens - 1) / 2
    never = decode((small("none"),), prompts, 64, num_tokens, np.random.default_rng(0))
    assert never.model_tokens == 3 + 64 * (num_tokens - 1)
    both = decode((small("none"), guide_of(small("none"))), prompts, 64, num_tokens, np.random.default_rng(0))
    assert both.model_tokens == 2 * never.model_tokens


@pytest.mark.parametrize("num_refusals", [0, 1, 3])
def test_steps_may_come_first(num_refusals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a state in which rows share prefixes, some have ended, and others have been dropped."""
    monkeypatch.setattr(
        JaxLockstep,
        "is_faster",
        lambda self, rows, prefixes: calls.append((rows, prefixes)) or len(calls) > num_refusals,
    )
    calls: list[tuple[int, int]] = []
    models = guide_of(small()), small()
    first, second = np.random.default_rng(1), np.random.default_rng(1)
    drawn, steps = decode(models, PROMPTS, 40, 7, first), by_steps(models, PROMPTS, 40, 7, second)
    assert len(calls) == num_refusals + 1
    assert all(prefixes < rows for rows, prefixes in calls)
    assert np.array_equal(drawn.tokens, steps.tokens)
    assert np.array_equal(drawn.lengths, steps.lengths)
    assert close(drawn.log_probs, steps.log_probs, 1e-4)
    assert drawn.step_count == steps.step_count == drawn.lengths.max()
    assert first.random() == second.random()


def test_it_is_faster_unless_many_rows_share_their_prefixes() -> None:
    lm = cached_lm("gpt2")
    lockstep = lm.lockstep([lm])
    assert lockstep is not None
    assert lockstep.is_faster(64, 1)  # small enough for sharing not to matter
    assert lockstep.is_faster(4_000_000, 1_000_000)
    assert not lockstep.is_faster(4_000_000, 900_000)


@pytest.mark.slow
def test_a_copy_of_the_prior_as_proposal_weighs_by_the_likelihood_alone() -> None:
    lm = small()
    longer = bk.TokenReward(lambda tokens, lengths: lengths.astype(float), alpha=0.5)
    posterior = bk.Posterior(lm, longer, prompts=PROMPTS, max_new_tokens=5)
    for proposal in (None, lm, lm.copy()):
        draws = bk.ImportanceSampling(5, proposal=proposal).run(posterior, seed=0)
        assert np.array_equal(draws.log_weights, draws.log_likelihood)
        assert np.array_equal(draws.log_prior, draws.log_proposal)


def test_models_that_are_no_plain_jaxlms_go_by_steps() -> None:
    class Sharper(JaxLM):
        def next_log_probs(self, state: Any) -> Any:
            return jax.nn.log_softmax(3 * super().next_log_probs(state))

    lm = small()
    sharper = Sharper(lm.parameters, lm._config)
    assert lm.lockstep([lm]) is not None
    assert lm.lockstep([lm, bk.TorchLM(small_pair()[1].module)]) is None
    assert sharper.lockstep([sharper]) is None
    drawn = decode((sharper, lm), PROMPTS, 20, 4, np.random.default_rng(0))
    steps = by_steps((sharper, lm), PROMPTS, 20, 4, np.random.default_rng(0))
    assert np.array_equal(drawn.tokens, steps.tokens)
    assert np.array_equal(drawn.log_probs, steps.log_probs)


def test_lockstep_refuses_what_steps_refuse() -> None:
    with pytest.raises(bk.BayesKLRLError, match="33 tokens; this model reads at most 32"):
        decode((small(),), PROMPTS, 2, 30, np.random.default_rng(0))
    with pytest.raises(bk.BayesKLRLError, match=r"0..4.*from 9 to 9"):
        decode((small(),), [[9]], 2, 3, np.random.default_rng(0))


@pytest.mark.slow
def test_other_numbers_of_draws_and_other_prompts_compile_nothing() -> None:
    """Sampling and scoring: prompts of 9 to 16 tokens, and as many numbers of draws."""
    lm = jax_lm_of(tiny_gpt2(n_layer=1, n_embd=12, n_positions=64), eos_token_id=())  # compiled for by no other test

    def work(length: int, num_draws: int) -> None:
        prompt = [1 + index % 4 for index in range(length)]
        drawn = decode((lm,), [prompt], num_draws, 6, np.random.default_rng(length))
        lm.token_log_probs([prompt], drawn.sequences())

    with counted_compilations() as first:
        work(16, 16)
    assert 4 <= len(first) <= 8
    with counted_compilations() as later:
        for length in range(9, 17):
            work(length, num_draws=25 - length)
            work(length, num_draws=16)
    assert not later
