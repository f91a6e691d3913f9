"""Draws belong to (seed, prompt, number): they do not depend on how many there are, nor on other prompts, nor on batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.models import decoding as decoding_module
from bayes_klrl.randomness import DRAWS_PER_BLOCK, Streams, prompt_keys
from tests.algorithms import DRAWING, ROWS
from tests.helpers.backends import on

Prompts = list[list[int]]

MESSAGES = {"exact, by messages": bk.Exact}
PREFIXES: dict[str, Callable[[int], bk.Algorithm]] = MESSAGES | {row.name: row.make for row in ROWS if row.prefixes}
OF_PROMPTS = (
    MESSAGES
    | {row.name: row.make for row in DRAWING if row.name not in ("AnnealedSMC", "Exact")}
    | {
        "SMC, always": lambda num: bk.SMC(num, ess_threshold=1.0),
        "SMC, multinomial": lambda num: bk.SMC(num, ess_threshold=1.0, resampling="multinomial"),
        "AnnealedSMC": lambda num: bk.AnnealedSMC(num, schedule=(0.3, 1.0)),  # a pilot's schedule is shared by prompts
        "guide": lambda num: bk.ImportanceSampling(
            num, proposal=bk.NgramLM(np.log(np.full((4,), 0.25)), eos_token_id=3)
        ),
    }
)


def posterior_of(prompts: Prompts, method: str = "") -> bk.Posterior:
    """A bigram prior with a bounded reward; for messages one that an automaton computes."""
    logits = np.random.default_rng(1).normal(size=(4, 4))
    prior = bk.NgramLM(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), eos_token_id=3)
    likelihood: bk.Likelihood = bk.TokenReward(
        lambda tokens, lengths: (tokens == 1).sum(axis=1) / 4.0, alpha=0.7, bounds=(0, 1)
    )
    if method == "exact, by messages":
        likelihood = bk.AutomatonConstraint(bk.Automaton.contains([1], vocab_size=4, eos_token_ids=3))
    return bk.Posterior(prior, likelihood, prompts=prompts, max_new_tokens=4)


def same(few: bk.Draws, many: bk.Draws, num: int, prompt: int = 0, of: int = 0) -> bool:
    """Whether the first `num` draws of prompt `of` in `many` are those of `prompt` in `few`, with all that they carry."""
    return all(
        np.array_equal(getattr(few, name)[prompt, :num], getattr(many, name)[of, :num], equal_nan=True)
        for name in ("tokens", "lengths", "reward", "log_prior", "log_proposal")
    )


@pytest.mark.parametrize("method", sorted(PREFIXES))
def test_many_draws_begin_with_few(method: str) -> None:
    posterior = posterior_of([[0], [2]], method)
    few, many = (PREFIXES[method](num).run(posterior, seed=7) for num in (40, 2 * DRAWS_PER_BLOCK + 40))
    assert same(few, many, 40)
    assert same(few, many, 40, prompt=1, of=1)
    assert not same(few, many, 40, prompt=0, of=1)


@pytest.mark.parametrize("method", sorted(OF_PROMPTS))
def test_a_prompts_draws_do_not_depend_on_the_others(method: str) -> None:
    """Others that are added behind, in front, or that are equal to it."""
    make = OF_PROMPTS[method](50)
    alone = make.run(posterior_of([[0]], method), seed=3)
    together = make.run(posterior_of([[2, 1], [0], [1], [0]], method), seed=3)
    assert same(alone, together, 50, of=1)
    assert not same(alone, together, 50, of=3)
    assert not same(alone, together, 50, of=2)


@pytest.mark.parametrize("method", sorted(OF_PROMPTS))
def test_another_seed_gives_other_draws(method: str) -> None:
    posterior = posterior_of([[0]], method)
    first, second = (OF_PROMPTS[method](50).run(posterior, seed=seed) for seed in (3, 4))
    assert not same(first, second, 50)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_draws_do_not_depend_on_how_the_work_is_split(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = posterior_of([[0], [2], [1]])
    whole = bk.ImportanceSampling(100).run(posterior, seed=5)
    monkeypatch.setattr(decoding_module, "ROWS_PER_BLOCK", rows)
    split = bk.ImportanceSampling(100).run(posterior, seed=5)
    assert all(same(whole, split, 100, prompt=p, of=p) for p in range(3))


def test_tokens_are_the_same_on_every_backend(backend: str) -> None:
    """The same uniforms; log-probs agree up to the precision of float32."""
    posterior = posterior_of([[0], [2]])
    there = bk.ImportanceSampling(30).run(on(backend, posterior), seed=1)
    here = bk.ImportanceSampling(60).run(posterior, seed=1)
    np.testing.assert_array_equal(there.tokens, here.tokens[:, :30])


def test_runs_of_smc_do_not_depend_on_their_number() -> None:
    smc = bk.SMC(16, ess_threshold=1.0)
    few = smc.log_evidences(posterior_of([[0]]), 3, seed=2).log_evidence
    many = smc.log_evidences(posterior_of([[1], [0]]), 10, seed=2).log_evidence
    np.testing.assert_array_equal(few[0], many[1, :3])
    assert len(np.unique(many)) == many.size


def test_streams_are_uniform_and_independent() -> None:
    """Over prompts, draws and blocks: means and correlations within four standard errors."""
    keys = prompt_keys([[0], [1], [0, 1]])
    numbers = Streams.of(0).uniforms(keys, 0, 3 * DRAWS_PER_BLOCK, 8)
    other = Streams.of(0, 1).uniforms(keys, 0, 3 * DRAWS_PER_BLOCK, 8)
    columns = np.concatenate([numbers.reshape(24, -1), other.reshape(24, -1)])  # 24 rows of 768 numbers each
    num = columns.shape[1]
    assert np.abs((columns.mean(axis=1) - 0.5) * np.sqrt(12 * num)).max() < 4
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation * np.sqrt(num)).max() < 4.5
    # no two blocks are equal
    assert len(np.unique(columns)) == columns.size
