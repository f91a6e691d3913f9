"""Joint programs in NumPyro alone: what it traces and what it calls, masks, a second discrete latent, the example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import torch
from numpyro import handlers
from numpyro.infer import SVI
from torch import Tensor
from torch.nn.functional import logsigmoid

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.numpyro_program import SequenceDistribution
from tests.helpers.truth import z_score
from tests.inference.svi.joint import (
    ALPHA,
    PROMPTS,
    Problem,
    agrees,
    coin_posterior,
    count_of_0,
    observed_theta,
    p_value,
    theta,
    value_and_gradient,
    with_sites,
)
from tests.inference.svi.ppl import PPLS

EXAMPLE = Path(__file__).parents[3] / "examples" / "joint_numpyro.py"
NUMPYRO = PPLS["numpyro"]


class Tilted(Problem):
    """q(theta) prod q(x_p | theta), where theta tilts the logits of the language model itself."""

    def sequence_params(self) -> dict[str, Any]:
        logits = self.start.log_probs.reshape(-1, 3)
        return {"logits": logits, "tilt": 0.3 * np.random.default_rng(4).standard_normal(logits.shape)}

    def family(self, params: Any, theta: Any, chosen: Any) -> Any:
        table = self.ppl.table(self.start, params["logits"] + params["tilt"] * theta)
        return self.ppl.completions(table, PROMPTS, chosen, self.num_tokens)

    def log_q(self, params: dict[str, Tensor], prompts: list[int], theta: Tensor) -> Tensor:
        return self.scores(params["logits"] + params["tilt"] * theta[:, None, None], prompts)


class Masked(Problem):
    """A mask takes prior and guide of x out of the log-weight; what x does to the factor stays."""

    def draw(self, family: Any) -> Any:
        with handlers.mask(mask=jnp.array([False])):
            return super().draw(family)

    def log_ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.0 * log_q


class Called(Problem):
    """Features are computed on the host."""

    def features(self, family: Any, x: Any) -> Any:
        return family.features(count_of_0, x, callback=True)


# --- the gradient -------------------------------------------------------------------------------------------


def check(problem: Problem) -> None:
    """Value and gradient are those of enumeration times quadrature."""
    exact, gradient = problem.exact()
    values, runs = problem.sampled(LeaveOneOutELBO(32), 300)
    assert agrees(runs, gradient)
    assert abs(z_score(values, exact)) < 3.5
    assert not agrees(1.25 * runs, gradient)  # the test bites


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_language_model_that_theta_tilts(num_prompts: int) -> None:
    check(Tilted(NUMPYRO, "theta, then x", num_prompts))


@pytest.mark.slow
def test_masked_completions_still_have_a_score() -> None:
    check(Masked(NUMPYRO, "x, then theta"))


@pytest.mark.slow
@pytest.mark.parametrize("kind,order", [(Tilted, "theta, then x"), (Called, "independent")])
def test_trace_graph_elbo_agrees_on_the_same_program(kind: type[Problem], order: str) -> None:
    """NumPyro's own loss sees what depends on x through a tilted language model and through a callback."""
    problem = kind(NUMPYRO, order)
    assert agrees(problem.sampled(NUMPYRO.graph_loss(32), 200)[1], problem.exact()[1])


@pytest.mark.slow
def test_features_on_the_host_have_the_same_gradient() -> None:
    """Key for key: a callback is no more than another way to compute the same numbers."""
    traced, called = (kind(NUMPYRO, "x, then theta").sampled(LeaveOneOutELBO(16), 5)[1] for kind in (Problem, Called))
    np.testing.assert_allclose(called, traced, atol=1e-5)
    assert np.abs(traced).max() > 0.1


@pytest.mark.slow
def test_completions_taken_for_reparametrised_lose_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NumPyro infers of itself (theory.md 9.9): the gradient tests bite."""
    problem = Problem(NUMPYRO, "independent")
    _, gradient = problem.exact()
    monkeypatch.setattr(SequenceDistribution, "has_rsample", True)
    assert p_value(problem.sampled(LeaveOneOutELBO(32), 100)[1], gradient) < 1e-6


@pytest.mark.slow
def test_a_second_discrete_latent_has_a_score_of_its_own() -> None:
    """Unlike Pyro's this loss takes it, weighted by the whole particle; by enumeration of coin and completions."""
    problem = Problem(NUMPYRO, "independent")
    params = {"logits": problem.params["logits"], "tail": 0.4}

    def model() -> None:
        coin = numpyro.sample("coin", dist.Bernoulli(0.3))
        with numpyro.plate("prompts", 1, dim=-1) as chosen:
            prior = NUMPYRO.completions(NUMPYRO.engine.prior(problem.prior), PROMPTS, chosen, 2)
            x = numpyro.sample("x", prior)
            numpyro.factor("taste", (2 * coin - 1) * prior.features(count_of_0, x) / ALPHA)

    def guide() -> None:
        logits, logit = (NUMPYRO.param(name, params[name]) for name in ("logits", "tail"))
        numpyro.sample("coin", dist.Bernoulli(logits=logit))
        with numpyro.plate("prompts", 1, dim=-1) as chosen:
            numpyro.sample("x", NUMPYRO.completions(NUMPYRO.table(problem.start, logits), PROMPTS, chosen, 2))

    every = problem.all_completions(1)
    f = torch.as_tensor(count_of_0(every.tokens[0], every.lengths[0]))

    def minus_elbo(params: dict[str, Tensor]) -> Tensor:
        log_p, log_q = problem.log_prior([0])[0], problem.scores(params["logits"], [0])[0]
        total = torch.zeros((), dtype=torch.float64)
        for sign, prior in ((-1.0, 0.7), (1.0, 0.3)):
            of_coin = logsigmoid(sign * params["tail"])
            log_w = log_p + sign * f / ALPHA + np.log(prior) - log_q - of_coin
            total = total - ((log_q + of_coin).exp() * log_w).sum()
        return total

    _, runs = NUMPYRO.sampled(LeaveOneOutELBO(32), model, guide, params, 300)
    assert agrees(runs, value_and_gradient(minus_elbo, params)[1])


# --- the example --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_examples_language_model_is_its_table_and_needs_no_torch() -> None:
    code = f"""
import runpy, sys, numpy as np
example = runpy.run_path({str(EXAMPLE)!r})
lm = example["PRIOR"]
rows = lm.next_log_probs(lm.prefill([[0], [0, 1], [3, 1, 2], [2, 3]]))
print(np.abs(np.exp(rows) - example["NEXT_WORD"]).max(), "torch" in sys.modules, "pyro" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, *imported = run.stdout.split()
    assert float(error) < 1e-5
    assert imported == ["False", "False"]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_guide_that_observes_is_refused() -> None:
    programs = with_sites(NUMPYRO, theta, observed_theta)
    with pytest.raises(bk.BayesKLRLError, match="guide observes 'theta'"):
        NUMPYRO.step(LeaveOneOutELBO(4), *programs)


@pytest.mark.slow
def test_evaluate_names_what_made_a_compiled_step_nan() -> None:
    """A compiled step cannot raise; `SVI.evaluate` of the state before it sees the same draws."""
    short = bk.TokenReward(lambda tokens, lengths: jnp.where(lengths == 3, -jnp.inf, 0.0), alpha=1.0)
    programs = with_sites(NUMPYRO, theta, theta, short)
    svi = SVI(*programs, optax.adam(0.1), LeaveOneOutELBO(16))
    state = jax.jit(svi.init)(jax.random.key(0))
    _, loss = jax.jit(svi.update)(state)
    assert not np.isfinite(loss)
    with pytest.raises(bk.UnboundedLossError, match=r"with ids \[0, 0, [01]\], whose likelihood is 0.*eps"):
        svi.evaluate(state)


@pytest.mark.slow
def test_features_that_are_none_are_refused_on_the_host_and_in_a_trace() -> None:
    x = jnp.zeros((5, 1, 3), dtype=jnp.int32)
    p = SequenceDistribution(coin_posterior().prior, [()], 3)
    assert p.features(lambda tokens, lengths: np.ones((len(tokens), 4)), x, callback=True).shape == (5, 1, 4)
    seen = p.features(lambda tokens, lengths: tokens, jnp.array([[0, 1, 0]]), callback=True)
    assert seen.tolist() == [[0, 1, 1]]  # EOS past the end, whatever stood there
    for wrong in (np.ones(4), np.ones((5, 2, 2)), 1.0, np.full(5, np.nan)):
        with pytest.raises(bk.RewardError, match="Features of 5 completions"):
            p.features(lambda tokens, lengths: wrong, x, callback=True)  # noqa: B023
    by_text = lambda tokens, lengths: [float(max(x[:n], default=0)) for x, n in zip(tokens, lengths, strict=True)]  # noqa: E731
    with pytest.raises(bk.RewardError, match=r"Features cannot be traced by JAX.*callback=True"):
        jax.jit(lambda x: p.features(by_text, x))(x)
    several = jnp.array([[[0, 0, 0]], [[0, 1, 0]]])
    called = jax.jit(jax.vmap(lambda x: p.features(by_text, x, callback=True)))
    assert called(several).tolist() == [[0.0], [1.0]]
    with pytest.raises(bk.RewardError, match="Features of 2 completions"):  # seen before anything runs
        jax.jit(lambda x: p.features(lambda tokens, lengths: np.ones((2, 2, 2)), x, callback=True))(x)
    with pytest.raises(Exception, match="Features of 5 completions"):  # seen on the host, as it runs
        jax.jit(lambda x: p.features(lambda tokens, lengths: np.ones(2), x, callback=True))(x).block_until_ready()
