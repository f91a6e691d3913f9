"""What is special to NumPyro's gradient estimators: particles in a plate or mapped, joint models of Rao-Blackwell, refusals.

The rest is in `test_elbo.py`, and joint models of leave-one-out in `test_joint.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.models.programs.numpyro_program import SequenceDistribution, numpyro_guide, numpyro_model
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p, z_score
from tests.inference.svi.engines import of_each_key

ESTIMATORS = {"leave one out": LeaveOneOutELBO, "Rao-Blackwell": RaoBlackwellELBO}


@pytest.fixture(params=ESTIMATORS)
def estimator(request: pytest.FixtureRequest) -> Any:
    return ESTIMATORS[request.param]


def pairs(tokens: Any, lengths: Any) -> Any:
    """Lopsided: a bonus for the pair (0, 1), a slope in the length."""
    pair = (tokens[:, :-1] == 0) & (tokens[:, 1:] == 1)
    return 1.5 * pair.any(axis=1) + 0.4 * (tokens == 1).sum(axis=1) - 0.2 * lengths


def problem(
    prompts: Any = ((0,),), alpha: float = 0.6, reward: Any = pairs, **options: Any
) -> tuple[bk.Posterior, JaxTable]:
    """Fifteen completions, and a guide of full order away from both prior and posterior."""
    settings = {"vocab_size": 3, "eos": (2,), "num_tokens": 3, "prompts": prompts}
    base = random_posterior(10, **(settings | options))
    likelihood = bk.TokenReward(reward, alpha=alpha)
    listed = [list(ids) for ids in base.prompt_ids]
    num_tokens = base.max_new_tokens
    posterior = bk.Posterior(JaxTable(base.prior), likelihood, prompts=listed, max_new_tokens=num_tokens)
    return posterior, JaxTable(full_table(base.prior, num_tokens + 1, noise=0.6, seed=1))


def log_q_of(lm: Any, posterior: bk.Posterior, tokens: Any) -> Any:
    return lm.score_tokens(lm.pad_prompts(posterior.prompt_ids), jnp.asarray(tokens)).sum(axis=2)


def flat(tree: Any) -> np.ndarray:
    """The leaves of a tree of gradients as one vector."""
    return np.concatenate([np.asarray(leaf, dtype=np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def exact_gradient(posterior: bk.Posterior, guide: Any) -> np.ndarray:
    """Of -ELBO, summed over prompts, by enumeration."""
    truth = Truth(posterior)
    joint = truth.log_posterior + truth.log_evidence[:, None]

    def minus_elbo(parameters: Any) -> Any:
        log_q = log_q_of(guide.with_parameters(parameters), posterior, truth.sequences.tokens)
        return (jnp.exp(log_q) * (log_q - joint)).sum()

    return flat(jax.jit(jax.grad(minus_elbo))(guide.parameters))


def sampled(loss: Any, model: Any, program: Any, params: Any, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    """-ELBO (runs,) and its gradients (runs, parameters) of independent steps."""
    step = jax.value_and_grad(lambda params, key: loss.loss(key, params, model, program))
    values, found = of_each_key(step, params, num_runs, seed=1)
    rows = [np.asarray(leaf, dtype=np.float64).reshape(num_runs, -1) for leaf in jax.tree.leaves(found)]
    return np.asarray(values, dtype=np.float64), np.concatenate(rows, axis=1)


def gradients(
    posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, mapped: bool = False, **options: Any
) -> Any:
    """Of our programs, with particles in a plate or, where they are somebody else's, mapped."""
    model, program = numpyro_model(posterior, **options), numpyro_guide(posterior, guide, **options)
    programs = (model.__call__, program.__call__) if mapped else (model, program)  # bound methods are not ours
    return sampled(loss, *programs, {"language_model": guide.parameters}, num_runs)[1]


def check_unbiased(runs: np.ndarray, exact: np.ndarray, num_directions: int = 8) -> None:
    assert t_square_p(runs, exact, num_directions) > 0.005
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > 1e-7
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose(exact[~moving], 0.0, atol=1e-6)


# --- a posterior's own programs -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True], ids=["in a plate", "mapped"])
def test_gradients_are_unbiased(estimator: Any, mapped: bool) -> None:
    posterior, guide = problem()
    exact = exact_gradient(posterior, guide)
    runs = gradients(posterior, guide, estimator(16), 200, mapped)
    check_unbiased(runs, exact)
    assert t_square_p(1.25 * runs, exact) < 0.005  # the test bites


@pytest.mark.slow
def test_mapped_particles_see_one_subsample_of_prompts(estimator: Any) -> None:
    """A subsample is scaled up, once, and unbiased for the whole (TraceGraph_ELBO is not)."""
    shifted = lambda tokens, lengths, prompt_index: pairs(tokens, lengths) + 0.8 * prompt_index  # noqa: E731
    posterior, guide = problem(((0,), (1,), (1, 0)), alpha=1.0, reward=shifted)
    runs = gradients(posterior, guide, estimator(8), 200, mapped=True, prompts_per_step=2)
    check_unbiased(runs, exact_gradient(posterior, guide))


@pytest.mark.slow
def test_a_users_own_svi_reaches_the_posterior(estimator: Any) -> None:
    posterior, _ = problem(((0,), (1,)))
    guide = posterior.numpyro_guide(JaxTable(full_table(posterior.prior.start, 4)))  # type: ignore[attr-defined]
    svi = SVI(posterior.numpyro_model(), guide, optax.adam(optax.linear_schedule(0.15, 0.0, 200)), estimator(32))
    result = svi.run(jax.random.key(0), 200, progress_bar=False)
    truth = Truth(posterior)
    assert (truth.kl(guide.language_model(result.params).to_ngram()) < 0.02).all()
    assert np.mean(result.losses[-20:]) == pytest.approx(-truth.log_evidence.sum(), abs=0.1)


def moved(parameters: Any) -> Any:
    """Parameters with noise, each array with a key of its own."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(next(keys), a.shape), parameters)


@pytest.mark.slow
def test_a_small_transformer() -> None:
    """A JaxLM of 40 completions, whose positions Rao-Blackwell reads; exact gradients by autodiff through all log-probs."""
    from tests.helpers.tiny_models import tiny_gpt2
    from tests.models.jax_lm.test_lm import jax_lm_of

    lm = jax_lm_of(tiny_gpt2(vocab_size=4, n_layer=1))
    guide = lm.with_parameters(jax.jit(moved)(lm.parameters))
    reward = bk.TokenReward(lambda tokens, lengths: 1.0 * (tokens == 1).sum(axis=1) - 0.3 * lengths, alpha=0.7)
    posterior = bk.Posterior(lm, reward, prompts=[[1, 2], [3]], max_new_tokens=3)
    runs = gradients(posterior, guide, RaoBlackwellELBO(32), 60)
    exact = exact_gradient(posterior, guide)
    assert t_square_p(runs, exact) > 0.005
    assert t_square_p(1.25 * runs, exact) < 0.005
    mean = runs.mean(axis=0)
    assert mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact) > 0.97


# --- joint models -------------------------------------------------------------------------------------------

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(20)


def ones(tokens: Any) -> Any:
    """A feature of completions (..., T)."""
    return (tokens == 1).sum(axis=-1) - 1.0


class Joint:
    """theta ~ Normal(0, 1), x ~ prior, factor (r(x) + theta f(x)) / alpha; guides that tie theta and x in different ways.

    theta = loc + slope f(x) + scale eps,     logits = table + tilt theta
    """

    def __init__(self, prompts: Any = ((0,),), slope: bool = False, tilt: bool = False) -> None:
        self.posterior, self.table = problem(prompts)
        self.slope, self.tilt = slope, tilt
        self.params = {"logits": self.table.parameters["logits"], "loc": jnp.array(0.3), "log_scale": jnp.array(-0.4)}
        if slope:
            self.params["slope"] = jnp.array(0.5)
        if tilt:
            self.params["tilt"] = 0.3 * jax.random.normal(jax.random.key(4), self.params["logits"].shape)

    def log_factor(self, x: Any, theta: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        ends = (rows == 2).any(axis=-1)
        lengths = jnp.where(ends, (rows == 2).argmax(axis=-1) + 1, rows.shape[-1])
        return (pairs(rows, lengths).reshape(x.shape[:-1]) + theta * ones(x)) / 0.6

    def model(self) -> None:
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        with numpyro.plate("prompts", self.posterior.num_prompts, dim=-1):
            x = numpyro.sample("x", SequenceDistribution(self.posterior.prior, self.posterior.prompt_ids, 3))
            numpyro.factor("likelihood", self.log_factor(x, theta))

    def lm(self, params: Any, theta: Any) -> JaxTable:
        logits = params["logits"] + (params["tilt"] * theta if self.tilt else 0.0)
        return self.table.with_parameters({"logits": logits})

    def guide(self) -> None:
        params = {name: numpyro.param(name, value) for name, value in self.params.items()}

        def draw(theta: Any) -> Any:
            with numpyro.plate("prompts", self.posterior.num_prompts, dim=-1):
                return numpyro.sample("x", SequenceDistribution(self.lm(params, theta), self.posterior.prompt_ids, 3))

        if self.slope:  # q(x) q(theta | x)
            location = params["loc"] + params["slope"] * ones(draw(0.0)).sum()
            numpyro.sample("theta", dist.Normal(location, jnp.exp(params["log_scale"])))
        else:  # q(theta) q(x | theta)
            draw(numpyro.sample("theta", dist.Normal(params["loc"], jnp.exp(params["log_scale"]))))

    def minus_elbo(self, params: Any) -> Any:
        """By enumeration of x and quadrature over theta; with a slope there is one prompt only."""
        truth = Truth(self.posterior)
        tokens = jnp.asarray(truth.sequences.tokens)
        log_p = log_q_of(self.posterior.prior, self.posterior, tokens)

        def at(eps: Any) -> Any:
            scale = jnp.exp(params["log_scale"])
            location = params["loc"] + (params["slope"] * ones(tokens) if self.slope else 0.0)
            theta = location + scale * eps  # (P, X) with a slope, else a number
            log_q = log_q_of(self.lm(params, theta), self.posterior, tokens)
            of_theta = dist.Normal(0.0, 1.0).log_prob(theta) - dist.Normal(location, scale).log_prob(theta)
            log_w = log_p + self.log_factor(tokens, theta) - log_q
            total = (jnp.exp(log_q) * log_w).sum()
            return total + ((jnp.exp(log_q) * of_theta).sum() if self.slope else of_theta)

        return -jnp.asarray(WEIGHTS / WEIGHTS.sum()) @ jax.vmap(at)(jnp.asarray(NODES))


JOINTS: dict[str, Callable[[], Joint]] = {
    "q(theta) q(x)": Joint,
    "q(theta) q(x), two prompts": lambda: Joint(prompts=((0,), (1,))),
    "q(x) q(theta | x)": lambda: Joint(slope=True),
    "q(theta) q(x | theta)": lambda: Joint(tilt=True),
}


@pytest.mark.slow
def test_in_a_joint_model_one_prompts_noise_is_not_anothers(estimator: Any) -> None:
    """Batch for batch: a hundredfold reward of prompt 1 leaves the gradient of what follows prompt 0 as it is."""

    def gradients_at(*factors: float, **options: Any) -> list[np.ndarray]:
        joint = Joint(prompts=((0,), (1,)), **options)
        plain, each = joint.log_factor, [jnp.ones(2)]
        joint.log_factor = lambda x, theta: plain(x, theta) * each[0]  # type: ignore[method-assign]

        def loss(params: Any, factor: Any) -> Any:
            each[0] = jnp.stack([jnp.ones(()), factor])
            return estimator(8).loss(jax.random.key(0), params, joint.model, joint.guide)

        step = jax.jit(jax.grad(loss))
        tables = [np.asarray(step(joint.params, factor)["logits"]).reshape(3, 3, 3, 3) for factor in factors]
        return [np.concatenate([table[2, 2, 0].ravel(), table[2, 0].ravel(), table[0].ravel()]) for table in tables]

    one, hundred = gradients_at(1.0, 100.0)
    assert np.abs(one).max() > 0.01
    np.testing.assert_allclose(one, hundred, rtol=0, atol=1e-6)
    one, hundred = gradients_at(1.0, 100.0, slope=True)
    assert np.abs(one - hundred).max() > 0.01  # there theta comes after x


@pytest.mark.slow
@pytest.mark.parametrize("name", JOINTS)
def test_joint_models_have_unbiased_gradients(name: str) -> None:
    """Of Rao-Blackwell, which takes continuous latents beside completions."""
    joint = JOINTS[name]()
    exact, gradient = jax.jit(jax.value_and_grad(joint.minus_elbo))(joint.params)
    losses, runs = sampled(RaoBlackwellELBO(16), joint.model, joint.guide, joint.params, 600)
    check_unbiased(runs, flat(gradient))
    assert abs(z_score(losses, float(exact))) < 3.5


@pytest.mark.slow
def test_a_joint_posterior_is_found_by_svi() -> None:
    """E[theta | everything] and the marginal of x, against enumeration x quadrature: q(theta) q(x | theta) can hold both."""
    joint = Joint(tilt=True)
    svi = SVI(joint.model, joint.guide, optax.adam(optax.linear_schedule(0.1, 0.0, 400)), LeaveOneOutELBO(64))
    result = svi.run(jax.random.key(0), 400, progress_bar=False)
    truth = Truth(joint.posterior)
    tokens = jnp.asarray(truth.sequences.tokens)
    log_factors = np.asarray(jax.jit(jax.vmap(lambda node: joint.log_factor(tokens, node)))(jnp.asarray(NODES)))
    mass = (WEIGHTS / WEIGHTS.sum())[:, None] * np.exp(truth.log_prior[0] + log_factors[:, 0])
    mean = (mass.sum(axis=1) * NODES).sum() / mass.sum()
    assert abs(mean) > 0.2
    assert float(result.params["loc"]) == pytest.approx(mean, abs=0.1)
    assert np.mean(result.losses[-50:]) == pytest.approx(-np.log(mass.sum()), abs=0.1)
    assert np.mean(result.losses[-50:]) > -np.log(mass.sum()) - 0.02


# --- refusals -----------------------------------------------------------------------------------------------


def traced(loss: Any, *programs: Any) -> None:
    """The loss, traced and not computed: what is wrong with programs is seen before anything is compiled."""
    jax.eval_shape(lambda key: loss.loss(key, {}, *programs), jax.random.key(0))


def test_sites_without_a_partner_are_refused() -> None:
    posterior, guide = problem()
    model, program = numpyro_model(posterior), numpyro_guide(posterior, guide)

    def with_temperature(inner: Any) -> Any:
        def wrapped() -> Any:
            numpyro.sample("temperature", dist.Gamma(2.0, 1.0))
            return inner()

        return wrapped

    for programs, message in (
        ((with_temperature(model), program), "latent site 'temperature' that the guide does not draw"),
        ((model, with_temperature(program)), "guide draws 'temperature', which is no latent site"),
    ):
        with pytest.raises(bk.BayesKLRLError, match=message):
            traced(RaoBlackwellELBO(4), *programs)


@pytest.mark.slow
def test_rao_blackwell_is_for_completions_alone() -> None:
    posterior, guide = problem()
    on_host = bk.Posterior(posterior.prior.start, posterior.likelihood, prompts=[[0]], max_new_tokens=3)  # type: ignore[attr-defined]
    with pytest.raises(bk.BayesKLRLError, match="needs score_positions, which NgramLM lacks"):
        traced(RaoBlackwellELBO(4), on_host.numpyro_model(), on_host.numpyro_guide(guide))

    def with_coin(inner: Any) -> Any:
        def wrapped() -> Any:
            numpyro.sample("coin", dist.Bernoulli(0.5))
            return inner()

        return wrapped

    programs = (with_coin(numpyro_model(posterior)), with_coin(numpyro_guide(posterior, guide)))
    with pytest.raises(bk.BayesKLRLError, match="'coin' is not reparametrised"):
        traced(RaoBlackwellELBO(4), *programs)
    assert np.isfinite(jax.jit(lambda key: LeaveOneOutELBO(4).loss(key, {}, *programs))(jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Currently, SVI with Trace_ELBO")
def test_stock_trace_elbo_has_another_gradient() -> None:
    """Which is why SVI does not use it: it takes completions for reparametrised, and drops the score term (theory.md 9.9)."""
    posterior, guide = problem()
    runs = gradients(posterior, guide, Trace_ELBO(32), 30)
    assert t_square_p(runs, exact_gradient(posterior, guide)) < 1e-6
