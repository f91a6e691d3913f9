"""Gradient estimators of both engines against the gradient of the enumerated ELBO, and what theory promises of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p, z_score
from tests.inference.svi.engines import ENGINES, ESTIMATORS, Engine, enumerated, minus_elbo

COPIES = 16  # of one prompt: as many independent estimates, summed, at about the cost of one


@pytest.fixture(params=["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Pyro or NumPyro; of NumPyro's estimators `test_numpyro_elbo.py` has the quick tests."""
    return ENGINES[request.param]


def pairs(tokens: Any, lengths: Any) -> Any:
    """Lopsided, and traceable: a bonus for the pair (0, 1), a slope in the length."""
    pair = (tokens[:, :-1] == 0) & (tokens[:, 1:] == 1)
    return 1.5 * pair.any(axis=1) + 0.4 * (tokens == 1).sum(axis=1) - 0.2 * lengths


def problem(
    engine: Engine, *, prompts: Any = ((0,),) * COPIES, alpha: float = 0.6, shift: float = 0.0, **options: Any
) -> tuple[bk.Posterior, Any]:
    """Fifteen completions, a reward that differs between prompts by `shift`, a guide away from prior and posterior."""
    base = random_posterior(10, **({"vocab_size": 3, "eos": (2,), "num_tokens": 3, "prompts": prompts} | options))
    reward = bk.TokenReward(
        lambda tokens, lengths, prompt_index: pairs(tokens, lengths) + shift * prompt_index, alpha=alpha
    )
    return posed(engine, base, reward), engine.guide(full_table(base.prior, 4, noise=0.6, seed=1))


def posed(engine: Engine, base: bk.Posterior, reward: bk.TokenReward) -> bk.Posterior:
    """The prior of a posterior on the engine, with another reward."""
    prompts = [list(ids) for ids in base.prompt_ids]
    prior = engine.prior(base.prior)  # type: ignore[arg-type]
    return bk.Posterior(prior, reward, prompts=prompts, max_new_tokens=base.max_new_tokens)


# --- unbiasedness -----------------------------------------------------------------------------------------


def on_engines(names: str, on_pyro: list[tuple[Any, ...]], on_numpyro: list[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Parametrise by engine and cases: all of them on Pyro, and on NumPyro, which compiles each, every value once."""
    params = [pytest.param("pyro", *case, id=_id("pyro", *case)) for case in on_pyro]
    params += [pytest.param("numpyro", *case, id=_id("numpyro", *case), marks=pytest.mark.slow) for case in on_numpyro]
    return pytest.mark.parametrize(f"engine,{names}", params, indirect=["engine"])


def _id(*values: Any) -> str:
    return "-".join(map(str, values))


# of 16 particles on NumPyro is `test_numpyro_elbo.py::test_gradients_are_unbiased`
@on_engines("estimator,num_particles", [*product(ESTIMATORS, (2, 8))], [*product(ESTIMATORS, (2,))])
def test_gradients_are_unbiased(engine: Engine, estimator: str, num_particles: int) -> None:
    posterior, guide = problem(engine)
    exact = enumerated(engine, posterior, guide)
    runs = engine.gradients(posterior, guide, engine.elbo(estimator, num_particles), 60)
    assert t_square_p(runs, exact) > 0.005
    # and so is every coordinate, of those that ever move
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > engine.exactly(1e-9)
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    assert np.abs(z).max() < 4.2
    np.testing.assert_allclose(exact[~moving], 0.0, atol=engine.exactly(1e-12))
    # the test bites: a gradient 25 % off is found out
    assert num_particles == 2 or t_square_p(1.25 * runs, exact) < 0.005


@on_engines("eos,estimator", [*product([(), (1, 2)], ESTIMATORS)], [*zip([(), (1, 2)], ESTIMATORS, strict=True)])
def test_gradients_are_unbiased_with_no_eos_and_with_two(engine: Engine, estimator: str, eos: tuple[int, ...]) -> None:
    posterior, guide = problem(engine, eos=eos, vocab_size=4, num_tokens=2)
    runs = engine.gradients(posterior, guide, engine.elbo(estimator, 8), 40)
    assert t_square_p(runs, enumerated(engine, posterior, guide), num_directions=5) > 0.005


@pytest.mark.slow
@on_engines(
    "prompts_per_step,estimator",
    [*product([None, 1, 2], ESTIMATORS)],
    [(None, "LeaveOneOutELBO"), (1, "RaoBlackwellELBO"), (2, "LeaveOneOutELBO")],
)
def test_several_prompts_and_subsamples_of_them(engine: Engine, estimator: str, prompts_per_step: int | None) -> None:
    """The loss is the sum over prompts; a subsample is scaled up, once, and unbiased for it: gradient and value."""
    posterior, guide = problem(engine, prompts=((0,), (1,), (1, 0)), shift=0.8, alpha=1.0)
    loss = engine.elbo(estimator, 8)
    losses, runs = engine.losses_and_gradients(posterior, guide, loss, 120, prompts_per_step=prompts_per_step)
    assert t_square_p(runs, enumerated(engine, posterior, guide)) > 0.005
    truth = Truth(posterior)
    assert abs(z_score(losses, float((truth.kl(guide.to_ngram()) - truth.log_evidence).sum()))) < 3.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tokens_that_the_prior_cannot_draw_are_no_trouble(engine: Engine, estimator: str) -> None:
    """Log-probs of -inf in the prior's table, and so in the guide's, leave gradients finite and unbiased."""
    with np.errstate(divide="ignore"):
        table = bk.NgramLM(np.log([[0.0, 0.6, 0.4], [0.5, 0.2, 0.3], [0.7, 0.3, 0.0]]), eos_token_id=2)
    reward = bk.TokenReward(lambda tokens, lengths: 1.0 * (tokens == 1).sum(axis=1), alpha=0.8)
    posterior = bk.Posterior(engine.prior(table), reward, prompts=[[]] * COPIES, max_new_tokens=3)
    guide = engine.guide(table)
    runs = engine.gradients(posterior, guide, engine.elbo(estimator, 8), 40)
    assert np.isfinite(runs).all()
    possible = np.isfinite(Truth(posterior).log_prior[0])
    exact = enumerated(engine, posterior, guide, minus_elbo, possible)
    assert t_square_p(runs, np.nan_to_num(exact), num_directions=4) > 0.005


# --- what theory promises -----------------------------------------------------------------------------------


@on_engines("num_particles", [(2,), (16,)], [(16,)])
def test_leave_one_out_is_minus_the_gradient_of_half_the_variance_of_log_weights(
    engine: Engine, num_particles: int
) -> None:
    """VarGrad, batch for batch (theory.md 2.4): grad 0.5 var(log w) = -grad ELBO, per prompt."""
    posterior, guide = problem(engine, prompts=((0,), (1,)), shift=2.0)
    largest = 0.01
    for seed in range(2):
        of_elbo, sequences = engine.step(posterior, guide, num_particles, seed)
        assert sequences.tokens.shape == (2, num_particles, 3)
        joint = posterior.log_joint(sequences)

        def half_variance(exp: Any, log_q: Any) -> Any:
            log_w = log_q - like(log_q, joint)  # noqa: B023  (called at once)
            centred = log_w - log_w.mean(1)[:, None]
            return 0.5 * (centred**2).sum() / (num_particles - 1)

        largest = max(largest, float(np.abs(of_elbo).max()))
        found = engine.gradient_of(posterior, guide, sequences, half_variance)
        np.testing.assert_allclose(of_elbo, found, rtol=0, atol=engine.exactly(1e-14 * largest))
    assert largest > 0.01


def like(example: Any, values: np.ndarray) -> Any:
    """Numbers as an array of the kind of another one."""
    if hasattr(example, "requires_grad"):
        import torch

        return torch.as_tensor(values)
    return values


def test_leave_one_out_has_no_variance_at_the_posterior(engine: Engine) -> None:
    """All log-weights are log Z there; Rao-Blackwell keeps the reward's noise (theory.md 2.5)."""
    posterior, _ = problem(engine)
    guide = engine.guide(Truth(posterior).policy())
    runs = engine.gradients(posterior, guide, engine.elbo("LeaveOneOutELBO", 4), 10)
    np.testing.assert_allclose(runs, 0.0, rtol=0, atol=engine.exactly(1e-12))
    noisy = engine.gradients(posterior, guide, engine.elbo("RaoBlackwellELBO", 4), 40)
    assert noisy.std(axis=0).max() > 0.01
    assert t_square_p(noisy, np.zeros(noisy.shape[1])) > 0.005


def test_rao_blackwell_has_the_lower_variance_far_from_the_posterior(engine: Engine) -> None:
    """A reward that hardly varies and a guide away from the prior: all noise is the KL's, which is summed out."""
    posterior, guide = problem(engine, alpha=20.0)
    loo, rao_blackwell = (
        engine.gradients(posterior, guide, engine.elbo(estimator, 8), 30).var(axis=0).sum() for estimator in ESTIMATORS
    )
    assert rao_blackwell < 0.5 * loo


def test_rao_blackwell_makes_a_token_pay_for_the_kl_that_it_leads_to(engine: Engine) -> None:
    """First tokens cost nothing themselves; after 1 the guide is far from the prior: all gradient comes from later KLs."""
    prior, table = np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([[0.5, 0.5], [0.9, 0.1]])
    nothing = bk.TokenReward(lambda tokens, lengths: 0.0 * lengths, alpha=1.0)
    lm = engine.prior(bk.NgramLM(np.log(prior), eos_token_id=None))
    posterior = bk.Posterior(lm, nothing, prompts=[[0]] * COPIES, max_new_tokens=2)
    guide = engine.guide(bk.NgramLM(np.log(table), eos_token_id=None))
    runs = engine.gradients(posterior, guide, engine.elbo("RaoBlackwellELBO", 8), 25).reshape(-1, 2, 2)
    # d KL / d logit of token 1 in context 0, the prompt's own: q(1) (1 - q(1)) KL(guide || prior after 1)
    later = float((table[1] * np.log(table[1] / prior[1])).sum())
    assert runs[:, 0, 1].mean() > 0.8 * COPIES * 0.25 * later
    assert abs(z_score(runs[:, 0, 1], COPIES * 0.25 * later)) < 3.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_a_reward_it_is_the_reverse_kl_that_is_descended(engine: Engine, estimator: str) -> None:
    """2.5: neither 0 (k1 in the loss), nor the forward KL (k3 in the loss), nor their difference (k3 in the reward)."""
    base, guide = problem(engine)
    nothing = bk.TokenReward(lambda tokens, lengths: 0.0 * lengths, alpha=1.0)
    posterior = bk.Posterior(base.prior, nothing, prompts=[[0]] * COPIES, max_new_tokens=3)
    reverse = enumerated(engine, posterior, guide, lambda exp, q, p, lik: (exp(q) * (q - p)).sum())
    forward = enumerated(engine, posterior, guide, lambda exp, q, p, lik: (exp(p) * (p - q)).sum())
    runs = engine.gradients(posterior, guide, engine.elbo(estimator, 8), 50)
    assert t_square_p(runs, reverse) > 0.005
    for wrong in (0 * reverse, forward, reverse - forward):
        assert t_square_p(runs, wrong) < 1e-6


def test_the_kl_term_pulls_as_hard_as_alpha_says(engine: Engine) -> None:
    """Half the alpha is twice the reward: grad(-ELBO) = grad KL - grad E[r] / alpha, at two values of alpha."""
    gradients = {}
    for alpha in (0.3, 0.6):
        posterior, guide = problem(engine, alpha=alpha)
        gradients[alpha] = engine.gradients(posterior, guide, engine.elbo("LeaveOneOutELBO", 64), 25).mean(axis=0)
    posterior, guide = problem(engine, alpha=1.0)
    of_reward = enumerated(engine, posterior, guide, lambda exp, q, p, lik: (exp(q) * lik).sum())
    found = (gradients[0.6] - gradients[0.3]) @ of_reward / (of_reward @ of_reward)
    assert found == pytest.approx(1 / 0.3 - 1 / 0.6, rel=0.1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_baselines_are_of_each_prompt_alone(engine: Engine, estimator: str) -> None:
    """r + a(c) for any a leaves every batch's gradient as it is, whatever the level; a common baseline would not."""
    prompts = ((0,), (1,))
    plain, guide = problem(engine, prompts=prompts)
    shifted, _ = problem(engine, prompts=prompts, shift=1000.0)
    first = engine.gradients(plain, guide, engine.elbo(estimator, 6), 5)
    second = engine.gradients(shifted, guide, engine.elbo(estimator, 6), 5)
    np.testing.assert_allclose(first, second, rtol=0, atol=100 * engine.exactly(1e-11))
    assert np.abs(first).max() > 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_particle_has_no_others(engine: Engine, estimator: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match="num_particles >= 2"):
        engine.elbo(estimator, 1)
