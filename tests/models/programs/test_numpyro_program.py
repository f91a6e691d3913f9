"""The posterior as a NumPyro program: trace, condition, replay, Predictive, a user's own SVI; text rewards, every prior."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import log_density

import bayes_klrl as bk
from bayes_klrl.models.programs.numpyro_program import SequenceDistribution
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import Truth, chi_square_p, counts, full_table

pytestmark = pytest.mark.usefixtures("quick_jax")

TEXTS = ["abab", "bba", "ab", "ba", "aab", "b"]
PRIORS = ["traced", "on the host"]


@pytest.fixture(params=PRIORS)
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_posterior(prompts: Any = "a", where: str = "on the host") -> bk.Posterior:
    """Fifteen completions, and a reward that reads them as text."""
    prior = full_table(bk.NgramLM.fit(TEXTS, order=2), 4)
    reward = bk.Reward(lambda completions: [2.0 * c.count("b") - 0.5 * len(c) for c in completions], alpha=0.7)
    lm = JaxTable(prior) if where == "traced" else prior
    return bk.Posterior(lm, reward, prompts=prompts, max_new_tokens=3)


def sequences(posterior: bk.Posterior, x: Any) -> bk.Sequences:
    """Completions (..., P, T) as `Sequences`."""
    tokens = np.asarray(x).astype(np.int64)
    by_prompt = tokens.reshape(-1, *tokens.shape[-2:]).swapaxes(0, 1)
    from bayes_klrl.sequences import completion_lengths

    return bk.Sequences(by_prompt, completion_lengths(by_prompt, posterior.prior.eos_token_ids))


def traced(program: Any, seed: int = 0) -> Any:
    return handlers.trace(handlers.seed(program, seed)).get_trace()


# --- traces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [pytest.param("a", marks=pytest.mark.slow), ["a", "ba", ""]])
def test_log_density_is_the_log_joint(prompts: Any, where: str) -> None:
    posterior = text_posterior(prompts, where)
    for seed in range(3):
        trace = traced(posterior.numpyro_model(), seed)
        x = trace["x"]["value"]
        assert x.shape == (posterior.num_prompts, 3)
        assert x.dtype == jnp.int32
        drawn = sequences(posterior, x)
        joint, again = log_density(posterior.numpyro_model(), (), {}, {"x": x})
        assert float(joint) == pytest.approx(posterior.log_joint(drawn).sum(), abs=1e-5)
        for site in (trace, again):
            log_prior = site["x"]["fn"].log_prob(x)
            np.testing.assert_allclose(log_prior, posterior.log_prior(drawn)[:, 0], atol=1e-6)
            np.testing.assert_allclose(site["reward"]["value"], posterior.reward(drawn)[:, 0], atol=1e-6)
            factor = site["likelihood"]["fn"].log_prob(site["likelihood"]["value"])
            np.testing.assert_allclose(factor, posterior.log_likelihood(drawn)[:, 0], atol=1e-6)


def test_condition_scores_any_completion_whatever_stands_past_its_end(where: str) -> None:
    posterior = text_posterior(where=where)
    truth, model = Truth(posterior), posterior.numpyro_model()

    @jax.jit
    def log_joint(x: Any) -> Any:
        return log_density(handlers.condition(model, data={"x": x}), (), {}, {})[0]

    filler = 0 if 0 not in posterior.prior.eos_token_ids else 1
    found = [float(log_joint(jnp.array([x + [filler] * (3 - len(x))]))) for x in truth.xs]
    np.testing.assert_allclose(found, (truth.log_posterior + truth.log_evidence[:, None])[0], atol=1e-5)
    assert np.log(np.exp(found).sum()) == pytest.approx(truth.log_evidence[0], abs=1e-5)


@pytest.mark.slow
def test_replay_substitute_and_block() -> None:
    posterior = text_posterior(["a", "b"], "traced")
    guide = posterior.numpyro_guide(JaxTable(posterior.prior.start))  # type: ignore[attr-defined]
    guide_trace = traced(guide, 3)
    assert set(guide_trace) == {"language_model", "prompts", "x"}
    model = posterior.numpyro_model()
    replayed = traced(handlers.replay(model, guide_trace), 4)
    np.testing.assert_array_equal(replayed["x"]["value"], guide_trace["x"]["value"])
    substituted = handlers.trace(handlers.substitute(model, data={"x": guide_trace["x"]["value"]})).get_trace()
    np.testing.assert_array_equal(substituted["reward"]["value"], replayed["reward"]["value"])
    assert "x" not in traced(handlers.block(model, hide=["x"]), 5)
    assert not np.array_equal(traced(model, 1)["x"]["value"], traced(model, 4)["x"]["value"])
    np.testing.assert_array_equal(traced(model, 1)["x"]["value"], traced(model, 1)["x"]["value"])
    doubled = handlers.scale(model, scale=2.0)
    values = {"x": guide_trace["x"]["value"]}
    assert float(log_density(doubled, (), {}, values)[0]) == pytest.approx(
        2 * float(log_density(model, (), {}, values)[0]), rel=1e-6
    )


def test_the_prior_as_its_own_guide_is_frozen() -> None:
    posterior = text_posterior(where="traced")
    assert set(traced(posterior.numpyro_guide(posterior.prior))) == {"prompts", "x"}
    guide = posterior.numpyro_guide(posterior.prior)
    assert guide.language_model({}) is posterior.prior
    other = posterior.prior.with_parameters(posterior.prior.parameters)  # type: ignore[attr-defined]
    with pytest.raises(bk.BayesKLRLError, match=r"no 'language_model', only \['theta'\].*get_params"):
        posterior.numpyro_guide(other).language_model({"theta": 1.0})


# --- the distribution ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_draws_follow_the_model_and_have_the_shapes_asked_for(where: str) -> None:
    posterior = text_posterior(where=where)
    truth = Truth(posterior)
    distribution = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3)
    key = jax.random.key(0)
    x = jax.jit(lambda key: distribution.sample(key, (3000,)))(key)
    assert x.shape == (3000, 1, 3)
    assert chi_square_p(counts(truth, np.asarray(x)[:, 0]), np.exp(truth.log_prior[0])) > 0.001
    assert distribution.log_prob(x).shape == (3000, 1)
    wide = distribution.expand((4, 7, 1))
    assert wide.sample(key).shape == (4, 7, 1, 3)
    assert wide.log_prob(wide.sample(key)).shape == (4, 7, 1)
    assert wide.log_prob(x[0]).shape == (4, 7, 1)
    assert distribution.sample(key, (2, 5)).shape == (2, 5, 1, 3)
    assert not wide.has_rsample
    assert not dist.MaskedDistribution(wide, True).has_rsample
    assert wide.is_discrete
    with pytest.raises(bk.BayesKLRLError, match="its 1 prompts"):
        distribution.expand((4,))


def test_each_prompt_has_its_own_draws(where: str) -> None:
    """Several prompts, some chosen, some twice; alone, under jit, and under vmap with choices that differ."""
    posterior = text_posterior(["a", "b", "ba"], where)
    truth = Truth(posterior)
    keys, choices = jax.random.split(jax.random.key(1), 4), jnp.array([[0, 1], [2, 2], [1, 0], [0, 1]])

    def draw(key: Any, chosen: Any) -> Any:
        distribution = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3, chosen=chosen)
        x = distribution.sample(key, (1000,))
        return x, distribution.log_prob(x)

    x, log_prob = jax.jit(jax.vmap(draw))(keys, choices)
    draw = jax.jit(draw)
    assert x.shape == (4, 1000, 2, 3)
    for b in range(4):
        alone, its_log_prob = draw(keys[b], choices[b])
        np.testing.assert_array_equal(x[b], alone)
        np.testing.assert_allclose(log_prob[b], its_log_prob, atol=1e-6)
        for place, p in enumerate(choices[b].tolist()):
            observed = counts(truth, np.asarray(alone)[:, place])
            assert chi_square_p(observed, np.exp(truth.log_prior[p])) > 0.001
    picked = np.asarray(x[1]).swapaxes(0, 1)
    lengths = sequences(posterior, x[1]).lengths
    tokens, lengths = np.stack([picked[0]] * 3), np.stack([lengths[0]] * 3)
    np.testing.assert_allclose(log_prob[1][:, 0], posterior.log_prior(bk.Sequences(tokens, lengths))[2], atol=1e-5)


@pytest.mark.slow
def test_log_probs_are_float64_where_that_is_on(where: str) -> None:
    with jax.enable_x64(True):
        posterior = text_posterior(where=where)
        truth = Truth(posterior)
        distribution = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3)
        found = distribution.log_prob(jnp.asarray(truth.sequences.tokens.swapaxes(0, 1)))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found[:, 0], truth.log_prior[0], atol=1e-12)


def test_the_distribution_is_a_pytree() -> None:
    """It may cross jit and vmap as an argument, parameters and prompts traced."""
    posterior = text_posterior(["a", "b"], "traced")
    distribution = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3)
    x = distribution.sample(jax.random.key(0))
    expected = distribution.log_prob(x)
    np.testing.assert_allclose(jax.jit(lambda d, x: d.log_prob(x))(distribution, x), expected, atol=1e-6)
    gradient = jax.grad(lambda d: d.log_prob(x).sum(), allow_int=True)(distribution)
    assert np.abs(jax.tree.leaves(gradient)[0]).max() > 0
    on_host = SequenceDistribution(posterior.prior.start, posterior.prompt_ids, 3)  # type: ignore[attr-defined]
    np.testing.assert_allclose(jax.jit(lambda d, x: d.log_prob(x))(on_host, x), expected, atol=1e-6)


# --- Predictive ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("prompts", ["a", ["a", "b", "b"]])
def test_predictive(parallel: bool, prompts: Any, where: str) -> None:
    posterior = text_posterior(prompts, where)
    num_prompts, num_samples = posterior.num_prompts, 400 if parallel else 12
    predictive = Predictive(posterior.numpyro_model(), num_samples=num_samples, parallel=parallel)
    found = predictive(jax.random.key(0))
    assert found["x"].shape == (num_samples, num_prompts, 3)
    assert found["reward"].shape == (num_samples, num_prompts)
    drawn = sequences(posterior, found["x"])
    np.testing.assert_allclose(np.asarray(found["reward"]).T, posterior.reward(drawn), atol=1e-6)
    if parallel:
        truth = Truth(posterior)
        for p in range(num_prompts):
            observed = counts(truth, np.asarray(found["x"])[:, p])
            assert chi_square_p(observed, np.exp(truth.log_prior[p])) > 0.001


@pytest.mark.slow
def test_predictive_with_a_guide_draws_from_the_guide() -> None:
    posterior = text_posterior(where="traced")
    truth = Truth(posterior)
    guide = posterior.numpyro_guide(JaxTable(posterior.prior.start))  # type: ignore[attr-defined]
    params = {
        "language_model": {"logits": jnp.asarray(truth.policy().log_probs.reshape(-1, posterior.prior.vocab_size))}
    }
    both = {"return_sites": ("x", "reward"), "num_samples": 1000, "parallel": True}
    predictive = Predictive(posterior.numpyro_model(), guide=guide, params=params, **both)
    found = predictive(jax.random.key(2))
    np.testing.assert_allclose(found["reward"][:, 0], posterior.reward(sequences(posterior, found["x"]))[0], atol=1e-6)
    assert chi_square_p(counts(truth, np.asarray(found["x"])[:, 0]), truth.p[0]) > 0.001
    assert chi_square_p(counts(truth, np.asarray(found["x"])[:, 0]), np.exp(truth.log_prior[0])) < 1e-6
    np.testing.assert_allclose(guide.language_model(params).to_ngram().log_probs, truth.policy().log_probs, atol=1e-5)
