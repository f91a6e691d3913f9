"""A user's own NumPyro SVI on a posterior's program, and priors of every kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, TraceGraph_ELBO
from numpyro.infer.util import log_density

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.numpyro_program import SequenceDistribution, numpyro_guide, numpyro_model
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p
from tests.helpers.user_models import RecurrentLM
from tests.models.programs.test_numpyro_program import PRIORS, sequences, text_posterior, traced

pytestmark = pytest.mark.usefixtures("quick_jax")


@pytest.fixture(params=PRIORS)
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- a user's own SVI ----------------------------------------------------------------------------------------


def token_posterior(**options: Any) -> bk.Posterior:
    """Fifteen completions, a traced reward."""
    settings = {"vocab_size": 3, "eos": (2,), "num_tokens": 3, "prompts": ((0,),), "alpha": 0.6}
    base = random_posterior(10, **(settings | options))
    reward = lambda tokens, lengths: 1.2 * (tokens == 1).sum(axis=1) - 0.3 * lengths  # noqa: E731
    prompts = [list(ids) for ids in base.prompt_ids]
    return bk.Posterior(
        JaxTable(full_table(base.prior, 4)), bk.TokenReward(reward, alpha=0.6), prompts=prompts, max_new_tokens=3
    )


def guide_of(posterior: bk.Posterior, noise: float = 0.6) -> JaxTable:
    return JaxTable(full_table(posterior.prior.start, 4, noise=noise, seed=1))  # type: ignore[attr-defined]


def exact_gradient(posterior: bk.Posterior, guide: JaxTable) -> np.ndarray:
    """Of -ELBO, summed over prompts, by enumeration."""
    truth = Truth(posterior)
    joint = truth.log_posterior + truth.log_evidence[:, None]

    def minus_elbo(parameters: Any) -> Any:
        lm = guide.with_parameters(parameters)
        log_q = lm.score_tokens(lm.pad_prompts(posterior.prompt_ids), jnp.asarray(truth.sequences.tokens)).sum(axis=2)
        return (jnp.exp(log_q) * (log_q - joint)).sum()

    return np.asarray(jax.jit(jax.grad(minus_elbo))(guide.parameters)["logits"]).ravel().astype(np.float64)


def sampled(model: Any, program: Any, guide: JaxTable, loss: Any, num_runs: int) -> np.ndarray:
    """Gradients of -ELBO of independent steps, (runs, parameters)."""

    def gradient(key: Any) -> Any:
        return jax.grad(lambda p: loss.loss(key, {"language_model": p}, model, program))(guide.parameters)

    keys = jax.random.split(jax.random.key(0), num_runs)
    return np.asarray(jax.lax.map(jax.jit(gradient), keys)["logits"]).reshape(num_runs, -1).astype(np.float64)


def test_trace_graph_elbo_has_the_enumerated_gradient() -> None:
    posterior = token_posterior(prompts=((0,), (1,)))
    guide = guide_of(posterior)
    exact = exact_gradient(posterior, guide)
    loss = TraceGraph_ELBO(num_particles=32)
    runs = sampled(posterior.numpyro_model(), posterior.numpyro_guide(guide), guide, loss, 150)
    assert t_square_p(runs, exact) > 0.005
    assert t_square_p(1.25 * runs, exact) < 0.005  # the test bites


def test_trace_graph_elbo_sees_a_text_reward() -> None:
    """The reward is computed from decoded text, on the host; its gradient must not get lost on the way."""
    posterior = text_posterior(where="traced")
    guide = guide_of(posterior)
    runs = sampled(posterior.numpyro_model(), posterior.numpyro_guide(guide), guide, TraceGraph_ELBO(16), 100)
    assert t_square_p(runs, exact_gradient(posterior, guide)) > 0.005


def test_without_has_rsample_false_the_score_term_would_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NumPyro infers from empty constraints, and what becomes of the gradient then (theory.md 9.9)."""
    assert SequenceDistribution.has_rsample is False
    posterior = token_posterior()
    guide = guide_of(posterior)
    exact = exact_gradient(posterior, guide)
    monkeypatch.delattr(SequenceDistribution, "has_rsample")
    distribution = SequenceDistribution(guide, posterior.prompt_ids, 3)  # type: ignore[arg-type]
    assert distribution.has_rsample
    blind = sampled(posterior.numpyro_model(), posterior.numpyro_guide(guide), guide, TraceGraph_ELBO(16), 50)
    assert t_square_p(blind, exact) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", [optax.adam(0.1), numpyro.optim.Adam(0.1)], ids=["optax", "numpyro"])
def test_a_users_svi_with_trace_graph_elbo_trains(optimiser: Any) -> None:
    posterior = token_posterior()
    truth, guide = Truth(posterior), posterior.numpyro_guide(guide_of(posterior, noise=0.0))
    svi = SVI(posterior.numpyro_model(), guide, optimiser, TraceGraph_ELBO(num_particles=32))
    result = svi.run(jax.random.key(0), 150, progress_bar=False)
    trained = guide.language_model(svi.get_params(result.state))
    assert np.isfinite(result.losses).all()
    assert truth.kl(trained.to_ngram())[0] < 0.1 * truth.kl(posterior.prior)[0]
    assert truth.kl(guide.language_model(result.params).to_ngram()) == truth.kl(trained.to_ngram())


@pytest.mark.slow
def test_a_subsample_of_prompts_is_scaled_up() -> None:
    posterior = token_posterior(prompts=((0,), (1,), (1, 0)))
    guide = guide_of(posterior)
    truth = Truth(posterior)
    model, program = numpyro_model(posterior, 2), numpyro_guide(posterior, guide, 2)
    trace = traced(model, 0)
    assert trace["x"]["value"].shape == (2, 3)
    assert trace["x"]["scale"] == 1.5
    chosen = np.asarray(trace["prompts"]["value"])
    alone = bk.Posterior(
        posterior.prior,
        posterior.likelihood,
        prompts=[list(posterior.prompt_ids[p]) for p in chosen],
        max_new_tokens=3,
    )
    values = {"x": trace["x"]["value"], "prompts": trace["prompts"]["value"]}
    joint = log_density(handlers.seed(model, 0), (), {}, values)[0]
    assert float(joint) == pytest.approx(1.5 * alone.log_joint(sequences(alone, values["x"])).sum(), abs=1e-4)
    keys = jax.random.split(jax.random.key(0), 200)
    loss = jax.jit(lambda key: TraceGraph_ELBO(8).loss(key, {"language_model": guide.parameters}, model, program))
    losses = np.array([float(loss(key)) for key in keys])
    exact = float((truth.kl(guide.to_ngram()) - truth.log_evidence).sum())
    assert abs(losses.mean() - exact) < 3 * losses.std() / np.sqrt(len(keys))


@pytest.mark.slow
def test_stock_trace_graph_elbo_scales_a_subsample_twice() -> None:
    """As its documentation says on our side: if this fails NumPyro has mended it, and the sentence can go."""
    posterior = token_posterior(prompts=((0,), (1,), (1, 0)))
    guide = guide_of(posterior)
    exact = exact_gradient(posterior, guide)
    programs = numpyro_model(posterior, 1), numpyro_guide(posterior, guide, 1)
    runs = sampled(*programs, guide, TraceGraph_ELBO(16), 200)
    assert t_square_p(runs, exact) < 1e-6
    assert t_square_p(runs / 3, exact) > 0.005
    assert t_square_p(sampled(*programs, guide, LeaveOneOutELBO(16), 200), exact) > 0.005


# --- any prior ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_users_own_model_and_a_torch_model_are_priors_too() -> None:
    from tests.helpers.tiny_models import tiny_gpt2, tiny_tokenizer

    torch_lm = bk.TorchLM(tiny_gpt2(), tiny_tokenizer())
    text = bk.Reward(lambda completions: [float(len(c)) for c in completions], alpha=1.0)
    tokens = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    for prior, likelihood in ((RecurrentLM(), tokens), (torch_lm, text)):
        posterior = bk.Posterior(prior, likelihood, prompts=[[1, 2], [2]], max_new_tokens=3)  # type: ignore[arg-type]
        found = Predictive(posterior.numpyro_model(), num_samples=20, parallel=True)(jax.random.key(0))
        drawn = sequences(posterior, found["x"])
        np.testing.assert_allclose(np.asarray(found["reward"]).T, posterior.reward(drawn), atol=1e-6)
        joint = jax.jit(lambda x, model: log_density(model, (), {}, {"x": x})[0], static_argnums=1)
        for n in range(3):
            one = bk.Sequences(drawn.tokens[:, n : n + 1], drawn.lengths[:, n : n + 1])
            expected = posterior.log_joint(one).sum()
            assert float(joint(found["x"][n], posterior.numpyro_model())) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_jax_model_with_a_tokenizer_prompts_of_any_length_and_a_text_reward() -> None:
    from tests.helpers.tiny_models import tiny_gpt2, tiny_tokenizer
    from tests.models.jax_lm.test_lm import jax_lm_of

    plain = jax_lm_of(tiny_gpt2())
    lm = bk.JaxLM(plain.parameters, plain._config, tiny_tokenizer(), temperature=1.3)
    reward = bk.Reward(
        lambda completions, prompts: [c.count("a") - len(p) for c, p in zip(completions, prompts, strict=True)],
        alpha=0.7,
    )
    posterior = bk.Posterior(lm, reward, prompts=["a b c", "d", "b b"], max_new_tokens=4)
    model = posterior.numpyro_model()
    found = Predictive(model, num_samples=30, parallel=True)(jax.random.key(0))
    drawn = sequences(posterior, found["x"])
    np.testing.assert_allclose(np.asarray(found["reward"]).T, posterior.reward(drawn), atol=1e-6)
    joint = jax.jit(jax.vmap(lambda x: log_density(model, (), {}, {"x": x})[0]))(found["x"])
    np.testing.assert_allclose(joint, posterior.log_joint(drawn).sum(axis=0), atol=1e-4)
    guide = posterior.numpyro_guide(lm.copy())
    svi = SVI(model, guide, optax.adam(1e-2), LeaveOneOutELBO(16))
    result = svi.run(jax.random.key(0), 60, progress_bar=False)
    assert np.mean(result.losses[-10:]) < np.mean(result.losses[:5]) - 0.3
    trained = guide.language_model(result.params)
    assert trained.tokenizer is lm.tokenizer
    assert trained.temperature == 1.3
    elbos = [bk.ImportanceSampling(200, proposal=q).run(posterior, seed=0).elbo.mean() for q in (lm, trained)]
    assert elbos[1] > elbos[0] + 0.1


@pytest.mark.slow
def test_a_missing_numpyro_is_named_with_its_cure() -> None:
    code = """
import sys, numpy as np, bayes_klrl as bk
sys.modules["numpyro"] = None
prior = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
posterior = bk.Posterior(prior, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), max_new_tokens=3)
for build in (posterior.numpyro_model, lambda: posterior.numpyro_guide(prior)):
    try:
        build()
    except ImportError as error:
        print(error)
"""
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.count("needs the numpyro package: pip install 'bayes_klrl[jax]'") == 2
