"""Completions and continuous latents in one NumPyro program, against enumeration times quadrature."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import TraceGraph_ELBO

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend import elbo as elbo_module
from bayes_klrl.inference.svi.numpyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.numpyro_program import SequenceDistribution
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import completions, full_table, t_square_p

pytestmark = pytest.mark.usefixtures("quick_jax")

ALPHA = 0.7
PREFERENCES = jnp.array([1.0, 1.0, -1.0, 2.0])  # f(winner) - f(loser)
PROMPTS = ((0,), (1,))
NODES, MASS = np.polynomial.hermite_e.hermegauss(40)


def count_of_0(tokens: Any, lengths: Any) -> Any:
    return 1.0 * (tokens == 0).sum(axis=1)


def random_prior() -> bk.NgramLM:
    logits = np.random.default_rng(7).standard_normal((3, 3))
    return bk.NgramLM(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), eos_token_id=2)


class Problem:
    """theta ~ N(0, 1), preferences ~ Bernoulli(sigma(theta d)), x_p ~ p0(. | prompt p), factor theta f(x_p) / alpha.

    Guides: q(theta) prod q(x_p); prod q(x_p) q(theta | x); q(theta) prod q(x_p | theta); and with a z_p for each prompt in
    theta's place, prod q(x_p) q(z_p | x_p).
    """

    def __init__(self, order: str, num_prompts: int = 1, *, subsample: int | None = None, **options: bool) -> None:
        self.order, self.num_prompts, self.subsample = order, num_prompts, subsample
        self.callback, self.masked = options.get("callback", False), options.get("masked", False)
        self.num_preferences = 4
        self.prior = JaxTable(random_prior())
        self.table = JaxTable(full_table(random_prior(), 3, noise=0.5, seed=2))
        logits = self.table.parameters["logits"]
        self.params = {"logits": logits, "loc": jnp.array(0.3), "log_sd": jnp.array(-0.5)}
        if order in ("x, then theta", "z of each prompt"):
            self.params["slope"] = jnp.array(0.4)
        if order == "theta, then x":
            self.params["tilt"] = 0.3 * jax.random.normal(jax.random.key(4), logits.shape)

    # -- the programs ------------------------------------------------------------------------------------------

    def _plate(self) -> Any:
        return numpyro.plate("prompts", self.num_prompts, subsample_size=self.subsample, dim=-1)

    def lm(self, params: Any, theta: Any) -> JaxTable:
        tilt = params["tilt"] * theta if self.order == "theta, then x" else 0.0
        return self.table.with_parameters({"logits": params["logits"] + tilt})

    def _x(self, lm: SequenceDistribution) -> Any:
        with handlers.mask(mask=jnp.array([False])) if self.masked else nullcontext():
            return numpyro.sample("x", lm)

    def model(self) -> None:
        theta = None if self.order == "z of each prompt" else numpyro.sample("theta", dist.Normal(0.0, 1.0))
        if theta is not None:
            with numpyro.plate("preferences", 4, subsample_size=self.num_preferences, dim=-1) as some:
                won = jnp.ones(self.num_preferences)
                numpyro.sample("won", dist.Bernoulli(logits=theta * PREFERENCES[some]), obs=won)
        with self._plate() as chosen:
            prior = SequenceDistribution(self.prior, PROMPTS[: self.num_prompts], 2, chosen=chosen)  # type: ignore[arg-type]
            x = self._x(prior)
            weight = numpyro.sample("z", dist.Normal(0.0, 1.0)) if theta is None else theta
            numpyro.factor("taste", weight * prior.features(count_of_0, x, callback=self.callback) / ALPHA)

    def guide(self) -> None:
        params = {name: numpyro.param(name, value) for name, value in self.params.items()}
        sd = jnp.exp(params["log_sd"])
        theta: Any = None
        if self.order in ("independent", "theta, then x"):
            theta = numpyro.sample("theta", dist.Normal(params["loc"], sd))
        with self._plate() as chosen:
            lm: Any = self.lm(params, theta)
            family = SequenceDistribution(lm, PROMPTS[: self.num_prompts], 2, chosen=chosen)
            f = family.features(count_of_0, self._x(family), callback=self.callback)
            if self.order == "z of each prompt":
                numpyro.sample("z", dist.Normal(params["loc"] + params["slope"] * f, sd))
        if self.order == "x, then theta":
            numpyro.sample("theta", dist.Normal(params["loc"] + params["slope"] * f.sum(-1), sd))

    # -- the truth ---------------------------------------------------------------------------------------------

    def minus_elbo(self, params: Any) -> Any:
        """By enumeration and Gauss-Hermite quadrature, differentiable."""
        prompts = list(range(self.num_prompts))
        groups = [[p] for p in prompts] if self.order == "z of each prompt" else [prompts]
        return sum(self._of_prompts(params, group) for group in groups)

    def _of_prompts(self, params: Any, prompts: list[int]) -> Any:
        xs = bk.Sequences.from_lists(completions(3, [2], 2), max_new_tokens=2, pad_token=2)
        tokens = jnp.asarray(np.repeat(xs.tokens, len(prompts), axis=0))
        f = count_of_0(xs.tokens[0], xs.lengths[0])
        chosen = np.array(list(product(range(len(f)), repeat=len(prompts))))  # (C, P)
        ids = [PROMPTS[p] for p in prompts]

        def log_probs(lm: JaxTable) -> Any:  # of every choice (C,)
            of_each = lm.score_tokens(lm.pad_prompts(ids), tokens).sum(axis=2)
            return of_each[np.arange(len(prompts)), chosen].sum(axis=1)

        f_sum, sd = f[chosen].sum(axis=1), jnp.exp(params["log_sd"])

        def at(eps: Any) -> Any:
            theta = params["loc"] + params.get("slope", 0.0) * f_sum + sd * eps  # (C,)
            log_q = log_probs(self.lm(params, theta[0]))
            log_p_theta = -0.5 * theta**2
            if self.order != "z of each prompt":
                log_p_theta += jax.nn.log_sigmoid(theta[:, None] * PREFERENCES).sum(axis=1)
            of_x = 0.0 if self.masked else log_probs(self.prior) - log_q
            log_w = of_x + theta * f_sum / ALPHA + log_p_theta + 0.5 * eps**2 + params["log_sd"]
            return (jnp.exp(log_q) * log_w).sum()

        return -(jax.vmap(at)(jnp.asarray(NODES)) @ jnp.asarray(MASS / MASS.sum()))

    def exact(self) -> tuple[float, np.ndarray]:
        """-ELBO and its gradient."""
        value, gradient = jax.jit(jax.value_and_grad(self.minus_elbo))(self.params)
        return float(value), flat(gradient)

    def sampled(self, loss: Any, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
        """-ELBO and gradients of independent steps, (runs,) and (runs, parameters)."""
        step = jax.value_and_grad(lambda params, key: loss.loss(key, params, self.model, self.guide))
        keys = jax.random.split(jax.random.key(1), num_runs)
        values, gradients = jax.jit(lambda params: jax.lax.map(lambda key: step(params, key), keys))(self.params)
        return np.asarray(values), rows(gradients)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, dtype=np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def rows(tree: Any) -> np.ndarray:
    """The leaves of a tree of several gradients, one gradient a row."""
    leaves = [np.asarray(leaf, dtype=np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def agrees(runs: np.ndarray, exact: np.ndarray) -> bool:
    """Whether the mean of runs is the exact gradient, in projections and in every coordinate."""
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > 1e-7
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    still = np.abs(exact[~moving]).max(initial=0.0) < 1e-6
    noise = np.linalg.svd(runs - runs.mean(axis=0), compute_uv=False)
    rank = int((noise > 1e-4 * noise[0]).sum())  # a table's rows sum to 0
    return bool(t_square_p(runs, exact, min(8, rank)) > 0.005 and np.abs(z).max() < 4.2 and still)


CASES = [
    ("independent", 2),
    ("x, then theta", 2),
    ("theta, then x", 1),
    pytest.param("theta, then x", 2, marks=pytest.mark.slow),
    pytest.param("z of each prompt", 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("order,num_prompts", CASES)
def test_value_and_gradient_are_those_of_enumeration_times_quadrature(order: str, num_prompts: int) -> None:
    problem = Problem(order, num_prompts)
    exact, gradient = problem.exact()
    values, runs = problem.sampled(LeaveOneOutELBO(32), 300)
    assert agrees(runs, gradient)
    assert abs(values.mean() - exact) < 3.5 * values.std(ddof=1) / np.sqrt(len(values))
    assert not agrees(1.25 * runs, gradient)  # the test bites


def test_masked_completions_still_have_a_score() -> None:
    """A mask takes prior and guide of x out of the log-weight; what x does to the factor stays."""
    problem = Problem("x, then theta", masked=True)
    exact, gradient = problem.exact()
    values, runs = problem.sampled(LeaveOneOutELBO(32), 300)
    assert agrees(runs, gradient)
    assert abs(values.mean() - exact) < 3.5 * values.std(ddof=1) / np.sqrt(len(values))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["independent", "z of each prompt"])
def test_subsampled_prompts_are_scaled_up(order: str) -> None:
    _, runs = Problem(order, 2, subsample=1).sampled(LeaveOneOutELBO(32), 400)
    assert agrees(runs, Problem(order, 2).exact()[1])


@pytest.mark.slow
def test_subsampled_data_are_scaled_up() -> None:
    problem = Problem("x, then theta")
    _, gradient = problem.exact()
    problem.num_preferences = 2
    assert agrees(problem.sampled(LeaveOneOutELBO(32), 300)[1], gradient)


@pytest.mark.slow
def test_features_on_the_host_have_the_same_gradient() -> None:
    """Key for key: a callback is no more than another way to compute the same numbers."""
    traced, called = (
        Problem("x, then theta", callback=callback).sampled(LeaveOneOutELBO(16), 5)[1] for callback in (False, True)
    )
    np.testing.assert_allclose(called, traced, atol=1e-5)
    assert np.abs(traced).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("order,callback", [("independent", True), ("x, then theta", False), ("theta, then x", False)])
def test_trace_graph_elbo_agrees_on_the_same_program(order: str, callback: bool) -> None:
    """NumPyro's own loss sees what depends on x through traced features and through a callback."""
    problem = Problem(order, callback=callback)
    assert agrees(problem.sampled(TraceGraph_ELBO(32), 200)[1], problem.exact()[1])


@pytest.mark.slow
def test_completions_taken_for_reparametrised_lose_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NumPyro infers of itself (theory.md 9.9): the gradient tests bite."""
    problem = Problem("independent")
    _, gradient = problem.exact()
    monkeypatch.setattr(SequenceDistribution, "has_rsample", True)
    assert t_square_p(problem.sampled(LeaveOneOutELBO(32), 100)[1], gradient) < 1e-6


@pytest.mark.slow
def test_a_score_weight_without_the_other_sites_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of x's score forgets theta and its preferences, which come after x and depend on it."""
    problem, whole = Problem("x, then theta"), elbo_module._sites
    _, gradient = problem.exact()
    forgotten = {"theta", "won"}
    monkeypatch.setattr(
        elbo_module, "_sites", lambda trace: [site for site in whole(trace) if site["name"] not in forgotten]
    )
    _, runs = problem.sampled(LeaveOneOutELBO(32), 200)
    size = problem.params["logits"].size
    order = sorted(problem.params).index("logits")
    start = sum(problem.params[name].size for name in sorted(problem.params)[:order])
    of_table = slice(start, start + size)  # its gradient is all score
    assert t_square_p(runs[:, of_table], gradient[of_table]) < 1e-4


@pytest.mark.slow
def test_a_second_discrete_latent_has_a_score_of_its_own() -> None:
    """Unlike Pyro's twin this loss takes it, weighted by the whole particle; by enumeration of coin and completions."""
    problem = Problem("independent")
    params = {"logits": problem.params["logits"], "tail": jnp.array(0.4)}

    def model() -> None:
        coin = numpyro.sample("coin", dist.Bernoulli(0.3))
        with numpyro.plate("prompts", 1, dim=-1):
            prior = SequenceDistribution(problem.prior, PROMPTS[:1], 2)  # type: ignore[arg-type]
            x = numpyro.sample("x", prior)
            numpyro.factor("taste", (2 * coin - 1) * prior.features(count_of_0, x) / ALPHA)

    def guide() -> None:
        logits, logit = (numpyro.param(name, params[name]) for name in ("logits", "tail"))
        numpyro.sample("coin", dist.Bernoulli(logits=logit))
        with numpyro.plate("prompts", 1, dim=-1):
            lm: Any = problem.table.with_parameters({"logits": logits})
            numpyro.sample("x", SequenceDistribution(lm, PROMPTS[:1], 2))

    xs = bk.Sequences.from_lists(completions(3, [2], 2), max_new_tokens=2, pad_token=2)
    f = count_of_0(xs.tokens[0], xs.lengths[0])

    def minus_elbo(params: Any) -> Any:
        log_p, log_q = (
            lm.score_tokens(lm.pad_prompts(PROMPTS[:1]), jnp.asarray(xs.tokens)).sum(axis=2)[0]
            for lm in (problem.prior, problem.table.with_parameters({"logits": params["logits"]}))
        )
        total = 0.0
        for coin in (0.0, 1.0):
            of_coin = dist.Bernoulli(logits=params["tail"]).log_prob(coin)
            log_w = log_p + (2 * coin - 1) * f / ALPHA + dist.Bernoulli(0.3).log_prob(coin) - log_q - of_coin
            total = total - (jnp.exp(log_q + of_coin) * log_w).sum()
        return total

    step = jax.grad(lambda params, key: LeaveOneOutELBO(32).loss(key, params, model, guide))
    keys = jax.random.split(jax.random.key(1), 300)
    found = jax.jit(lambda params: jax.lax.map(lambda key: step(params, key), keys))(params)
    runs = rows(found)
    assert agrees(runs, flat(jax.grad(minus_elbo)(params)))
