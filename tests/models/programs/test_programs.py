"""The posterior as a program of both engines: traces, conditioned and replayed programs, draws, and Predictive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.truth import Truth, chi_square_p, counts, random_posterior
from tests.models.programs.engines import ENGINES, Engine, sequences_of, slow_on_jax, table_of, text_posterior

SEVERAL = ["a", "ba", "", "b", "b"]  # of unequal lengths, and one of them twice


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Pyro, or NumPyro with its prior traced or on the host."""
    return ENGINES[request.param]


on_every_engine = pytest.mark.parametrize("engine", slow_on_jax(*ENGINES), indirect=True)
with_a_guide = pytest.mark.parametrize("engine", slow_on_jax("pyro", "numpyro"), indirect=True)


# --- traces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine, prompts",
    [pytest.param(name, "a", marks=[] if name == "pyro" else pytest.mark.slow, id=f"{name}-one") for name in ENGINES]
    + [pytest.param(name, SEVERAL, id=f"{name}-several") for name in ENGINES],
    indirect=["engine"],
)
def test_log_density_is_the_log_joint_site_by_site(engine: Engine, prompts: Any) -> None:
    posterior = text_posterior(engine, prompts)
    model = engine.model(posterior)
    for seed in range(3):
        drawn = engine.trace(model, seed)
        assert drawn.x.shape == (posterior.num_prompts, 3)
        assert drawn.x.dtype == engine.token_type
        sequences = sequences_of(posterior, drawn.x)
        given = engine.scored(model, drawn.x)
        np.testing.assert_array_equal(given.x, drawn.x)
        for trace in (drawn, given):
            expected = posterior.log_joint(sequences).sum()
            assert trace.log_density == pytest.approx(expected, abs=10 * engine.exactly(1e-11))
            log_prior, log_likelihood = posterior.log_prior(sequences), posterior.log_likelihood(sequences)
            reward = posterior.reward(sequences)
            np.testing.assert_allclose(trace.log_prob, log_prior[:, 0], atol=engine.exactly(1e-12))
            np.testing.assert_allclose(trace.reward, reward[:, 0], atol=engine.exactly(1e-12))
            np.testing.assert_allclose(trace.log_factor, log_likelihood[:, 0], atol=engine.exactly(1e-12))


def test_condition_scores_any_completion_whatever_stands_past_its_end(engine: Engine) -> None:
    posterior = text_posterior(engine)
    truth, model = Truth(posterior), engine.model(posterior)
    log_joint = (truth.log_posterior + truth.log_evidence[:, None])[0]
    for filler in range(posterior.prior.vocab_size):
        padded = np.array([[x + [filler] * (3 - len(x))] for x in truth.xs])
        found = engine.condition(model, padded)
        np.testing.assert_allclose(found, log_joint, rtol=0, atol=10 * engine.exactly(1e-13))
        total = np.log(np.exp(found).sum())
        assert total == pytest.approx(truth.log_evidence[0], abs=10 * engine.exactly(1e-13))


@with_a_guide
def test_replay_takes_the_guides_draw(engine: Engine) -> None:
    posterior = text_posterior(engine, ["a", "b"])
    guide = engine.guide_program(posterior, engine.guide(table_of(posterior)))
    drawn = engine.trace(guide, 3)
    assert drawn.reward.size == 0
    replayed = engine.trace(engine.replay(engine.model(posterior), drawn), 4)
    np.testing.assert_array_equal(replayed.x, drawn.x)
    joint = posterior.log_joint(sequences_of(posterior, drawn.x))
    assert replayed.log_density == pytest.approx(joint.sum(), abs=10 * engine.exactly(1e-11))


@on_every_engine
def test_each_prompt_and_particle_has_its_own_reward(engine: Engine) -> None:
    """Per-prompt rewards reach their own prompt's rows, particle by particle."""
    base = random_posterior(3, num_tokens=3)
    reward = bk.TokenReward(
        lambda tokens, lengths, prompt_index: (
            1.2 * (tokens == 1).sum(axis=1) - 0.3 * lengths + 1.0 * prompt_index * (tokens[:, 0] + 1)
        ),
        alpha=0.5,
    )
    posterior = bk.Posterior(engine.prior(table_of(base)), reward, prompts=[[0], [1], [2]], max_new_tokens=3)
    trace = engine.trace(engine.in_plate(engine.model(posterior), 5))
    assert trace.x.shape == (5, 3, 3)
    sequences = sequences_of(posterior, trace.x)
    np.testing.assert_allclose(trace.reward.T, posterior.reward(sequences), atol=engine.exactly(1e-12))
    expected = posterior.log_joint(sequences).sum()
    assert trace.log_density == pytest.approx(expected, abs=100 * engine.exactly(1e-11))


# --- draws --------------------------------------------------------------------------------------------------


@on_every_engine
def test_draws_follow_the_prior_and_have_the_shapes_asked_for(engine: Engine) -> None:
    posterior = text_posterior(engine)
    truth = Truth(posterior)
    distribution = engine.distribution(posterior.prior, posterior)
    x = engine.sample(distribution, (3000,))
    assert x.shape == (3000, 1, 3)
    assert chi_square_p(counts(truth, np.asarray(x)[:, 0]), np.exp(truth.log_prior[0])) > 0.001
    assert distribution.log_prob(x).shape == (3000, 1)
    wide = distribution.expand((4, 7, 1))
    drawn = engine.sample(wide)
    assert drawn.shape == (4, 7, 1, 3)
    assert wide.log_prob(drawn).shape == (4, 7, 1)
    assert wide.log_prob(x[0]).shape == (4, 7, 1)
    assert engine.sample(distribution, (2, 5)).shape == (2, 5, 1, 3)


@on_every_engine
def test_draws_follow_the_seed(engine: Engine) -> None:
    model = engine.model(text_posterior(engine, ["a", "b"]))
    first = engine.run(model, 5)
    np.testing.assert_array_equal(engine.run(model, 5), first)
    np.testing.assert_array_equal(engine.run(engine.model(text_posterior(engine, ["a", "b"])), 5), first)
    np.testing.assert_array_equal(engine.trace(model, 5).x, first)
    assert not np.array_equal(engine.run(model, 1), engine.run(model, 4))


# --- Predictive ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("prompts", ["a", SEVERAL], ids=["one", "several"])
@on_every_engine
def test_predictive(engine: Engine, parallel: bool, prompts: Any) -> None:
    posterior = text_posterior(engine, prompts)
    num_prompts, num_samples = posterior.num_prompts, 400 if parallel else 12
    found = engine.predictive(posterior, num_samples, parallel=parallel)
    assert found["x"].shape == (num_samples, num_prompts, 3)
    assert found["reward"].shape == (num_samples, num_prompts)
    expected = posterior.reward(sequences_of(posterior, found["x"]))
    np.testing.assert_allclose(found["reward"].T, expected, atol=engine.exactly(1e-12))
    if parallel:
        truth = Truth(posterior)
        for p in range(num_prompts):
            assert chi_square_p(counts(truth, found["x"][:, p]), np.exp(truth.log_prior[p])) > 0.001


@pytest.mark.parametrize("parallel", [False, True])
@with_a_guide
def test_predictive_with_a_guide_draws_from_the_guide(engine: Engine, parallel: bool) -> None:
    posterior = text_posterior(engine)
    truth = Truth(posterior)
    num_samples = 1000 if parallel else 12
    found = engine.predictive(posterior, num_samples, parallel=parallel, guide=engine.guide(truth.policy()))
    assert found["x"].shape == (num_samples, 1, 3)
    expected = posterior.reward(sequences_of(posterior, found["x"]))[0]
    np.testing.assert_allclose(found["reward"][:, 0], expected, atol=engine.exactly(1e-12))
    if parallel:
        observed = counts(truth, found["x"][:, 0])
        assert chi_square_p(observed, truth.p[0]) > 0.001
        assert chi_square_p(observed, np.exp(truth.log_prior[0])) < 1e-6
