"""A user's own SVI on a posterior's program, by both engines: the stock loss's gradient, and what is trained."""

from __future__ import annotations

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p
from tests.inference.svi.engines import ESTIMATORS, enumerated
from tests.models.programs.engines import ENGINES, Engine, slow_on_jax, table_of, text_posterior


@pytest.fixture(params=["pyro", "numpyro"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Pyro or NumPyro, the prior traced."""
    return ENGINES[request.param]


trained_by_each = pytest.mark.parametrize("engine", slow_on_jax("pyro", "numpyro"), indirect=True)


def halfway(posterior: bk.Posterior) -> bk.NgramLM:
    """A table between prior and posterior: the reward pulls it one way and the prior the other."""
    table = table_of(posterior)
    logits = (table.log_probs + Truth(posterior).policy().log_probs) / 2
    normaliser = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return bk.NgramLM(logits - normaliser, eos_token_id=table.eos_token_ids, tokenizer=table.tokenizer)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.slow
def test_trace_graph_elbo_has_the_enumerated_gradient(engine: Engine) -> None:
    base = random_posterior(10, vocab_size=3, eos=(2,), num_tokens=3)
    reward = bk.TokenReward(lambda tokens, lengths: 1.2 * (tokens == 1).sum(axis=1) - 0.3 * lengths, alpha=0.6)
    prior = full_table(base.prior, 4)
    posterior = bk.Posterior(engine.prior(prior), reward, prompts=[[0], [1]], max_new_tokens=3)
    guide = engine.guide(full_table(prior, noise=0.6, seed=1))
    exact = enumerated(engine, posterior, guide)
    runs = engine.gradients(posterior, guide, engine.trace_graph_elbo(32), 150, seed=0)
    assert t_square_p(runs, exact) > 0.005
    assert t_square_p(1.25 * runs, exact) < 0.005  # the test bites


def test_trace_graph_elbo_sees_a_text_reward(engine: Engine) -> None:
    """The reward is computed from decoded text; its gradient must not get lost on the way (theory.md 9.7)."""
    posterior = text_posterior(engine)
    guide = engine.guide(halfway(posterior))
    exact = enumerated(engine, posterior, guide)
    runs = engine.gradients(posterior, guide, engine.trace_graph_elbo(64), 60, seed=0)
    assert cosine(runs.mean(axis=0), exact) > 0.97
    assert t_square_p(runs, exact) > 0.005


@pytest.mark.parametrize(
    "engine, num_particles",
    [("pyro", 16), ("pyro", 5), pytest.param("numpyro", 5, marks=pytest.mark.slow)],
    indirect=["engine"],
)
def test_a_users_svi_with_trace_graph_elbo_trains(engine: Engine, num_particles: int) -> None:
    posterior = text_posterior(engine)
    truth, prior = Truth(posterior), table_of(posterior)
    trained = engine.svi(posterior, engine.guide(prior), engine.trace_graph_elbo(num_particles), 60, rate=0.1)
    assert np.isfinite(trained.losses).all()
    assert truth.kl(trained.policy)[0] < 0.3 * truth.kl(prior)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@trained_by_each
def test_our_losses_work_in_the_engines_svi(engine: Engine, estimator: str) -> None:
    posterior = text_posterior(engine, ["a", "b"])
    truth, start = Truth(posterior), full_table(table_of(posterior), 5)
    trained = engine.svi(posterior, engine.guide(start), engine.elbo(estimator, 32), 100, rate=0.15, decay=0.98)
    assert (truth.kl(trained.policy) < 0.1 * truth.kl(start)).all()
    assert np.mean(trained.losses[-20:]) == pytest.approx(-truth.log_evidence.sum(), abs=0.25)
    assert np.mean(trained.evaluated) == pytest.approx(-truth.log_evidence.sum(), abs=0.25)
