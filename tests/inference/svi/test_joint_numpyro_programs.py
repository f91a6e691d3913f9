"""Joint NumPyro programs of other shapes, the example, and refusals."""

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
from numpyro import handlers
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.numpyro_program import SequenceDistribution
from tests.inference.svi.test_joint_numpyro import (
    PROMPTS,
    Problem,
)

pytestmark = pytest.mark.usefixtures("quick_jax")
EXAMPLE = Path(__file__).parents[3] / "examples" / "joint_numpyro.py"


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


# --- programs of other shapes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_autoguide_for_the_continuous_part() -> None:
    """It draws an auxiliary site and a Delta: both are understood."""
    problem = Problem("independent")
    auto = AutoMultivariateNormal(handlers.block(problem.model, hide=["x"]), init_scale=0.6)

    def guide() -> None:
        auto()
        with numpyro.plate("prompts", 1, dim=-1):
            lm: Any = problem.table
            numpyro.sample("x", SequenceDistribution(lm, PROMPTS[:1], 2))

    svi = SVI(problem.model, guide, optax.sgd(0.0), LeaveOneOutELBO(64))
    state = svi.init(jax.random.key(0))
    loc = float(auto.median(svi.get_params(state))["theta"])
    problem.params |= {"loc": jnp.array(loc), "log_sd": jnp.log(0.6)}
    step = jax.jit(lambda key: LeaveOneOutELBO(64).loss(key, svi.get_params(state), problem.model, guide))
    losses = np.array([float(step(key)) for key in jax.random.split(jax.random.key(2), 60)])
    assert abs(losses.mean() - problem.exact()[0]) < 4 * losses.std(ddof=1) / np.sqrt(60)


def coin_posterior(likelihood: Any = None) -> bk.Posterior:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    longer = bk.TokenReward(lambda tokens, lengths: 1.0 * lengths, alpha=1.0)
    return bk.Posterior(coin, likelihood or longer, prompts=[[], [0]], max_new_tokens=3)


@pytest.mark.slow
def test_a_posteriors_own_program_is_part_of_a_larger_one() -> None:
    """`posterior.numpyro_model()` inside another program, its factor beside the user's own, outside the prompts' plate."""
    posterior = coin_posterior()
    inner, inner_guide = posterior.numpyro_model(), posterior.numpyro_guide(posterior.prior)
    p = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3)

    def model() -> None:
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        numpyro.factor("taste", -(scale * p.features(lambda tokens, lengths: lengths, inner())).sum(-1))

    def guide() -> None:
        numpyro.sample("scale", dist.LogNormal(numpyro.param("loc", jnp.array(0.0)), 0.3))
        inner_guide()

    keys = jax.random.split(jax.random.key(0), 20)
    losses = [
        np.asarray(jax.jit(jax.vmap(lambda key: loss.loss(key, {}, model, guide)))(keys))  # noqa: B023  (called at once)
        for loss in (LeaveOneOutELBO(128), TraceGraph_ELBO(128))
    ]
    lengths = 2 * 1.75  # E of both prompts
    kl = np.log(0.5 / 0.3) + 0.5 * (0.3 / 0.5) ** 2 - 0.5
    exact = lengths * (np.exp(0.3**2 / 2) - 1) + kl
    for values in losses:
        assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / np.sqrt(20)


# --- refusals -----------------------------------------------------------------------------------------------


def with_sites(model_first: Any = None, guide_first: Any = None, likelihood: Any = None) -> tuple[Any, Any]:
    """The coin's programs with something before them."""
    posterior = coin_posterior(likelihood)
    inner, inner_guide = posterior.numpyro_model(), posterior.numpyro_guide(posterior.prior)

    def before(first: Any, program: Any) -> Any:
        def both() -> None:
            if first is not None:
                first()
            program()

        return both

    return before(model_first, inner), before(guide_first, inner_guide)


def normal(name: str, **options: Any) -> Any:
    return lambda: numpyro.sample(name, dist.Normal(0.0, 1.0), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_first,guide_first,message",
    [
        (normal("theta"), None, "'theta' that the guide does not draw"),
        (None, normal("theta"), "guide draws 'theta', which is no latent site"),
        (normal("theta", obs=0.0), normal("theta"), "guide draws 'theta', which is no latent site"),
        (normal("theta"), normal("theta", obs=0.0), "guide observes 'theta'"),
        (lambda: numpyro.factor("taste", -jnp.inf), None, r"with ids \[.*'taste' is 0.*eps"),
        (lambda: numpyro.factor("taste", jnp.nan), None, "log-prob of site 'taste' is nan"),
    ],
)
def test_what_would_be_lost_is_refused(model_first: Any, guide_first: Any, message: str) -> None:
    """In the words of Pyro's twin."""
    model, guide = with_sites(model_first, guide_first)
    with pytest.raises(bk.BayesKLRLError, match=message):
        LeaveOneOutELBO(4).loss(jax.random.key(0), {}, model, guide)


@pytest.mark.slow
def test_evaluate_names_what_made_a_compiled_step_nan() -> None:
    """A compiled step cannot raise; `SVI.evaluate` of the state before it sees the same draws."""
    short = bk.TokenReward(lambda tokens, lengths: jnp.where(lengths == 3, -jnp.inf, 0.0), alpha=1.0)
    programs = with_sites(normal("theta"), normal("theta"), short)
    svi = SVI(*programs, optax.adam(0.1), LeaveOneOutELBO(16))
    state = jax.jit(svi.init)(jax.random.key(0))
    _, loss = jax.jit(svi.update)(state)
    assert not np.isfinite(loss)
    with pytest.raises(bk.UnboundedLossError, match=r"with ids \[0, 0, [01]\], whose likelihood is 0.*eps"):
        svi.evaluate(state)


@pytest.mark.slow
def test_features_that_are_none_are_refused() -> None:
    x = jnp.zeros((5, 1, 3), dtype=jnp.int32)
    p = SequenceDistribution(coin_posterior().prior, [()], 3)
    for callback in (False, True):
        assert p.features(lambda tokens, lengths: np.ones((len(tokens), 4)), x, callback=callback).shape == (5, 1, 4)
        seen = p.features(lambda tokens, lengths: tokens, jnp.array([[0, 1, 0]]), callback=callback)
        assert seen.tolist() == [[0, 1, 1]]  # EOS past the end, whatever stood there
        for wrong in (np.ones(4), np.ones((5, 2, 2)), 1.0, np.full(5, np.nan)):
            with pytest.raises(bk.RewardError, match="Features of 5 completions"):
                p.features(lambda tokens, lengths: wrong, x, callback=callback)  # noqa: B023
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
