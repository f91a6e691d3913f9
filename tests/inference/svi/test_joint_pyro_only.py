"""Joint programs in Pyro alone: provenance, a step's terms, empirical Bayes, a transformer, and refusals of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, pyro_guide, pyro_model, to_sequences
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth, full_table, z_score
from tests.inference.svi.joint import (
    ALPHA,
    CASES,
    PROMPTS,
    Problem,
    agrees,
    coin_posterior,
    count_of_0,
    p_value,
    theta,
    with_sites,
)
from tests.inference.svi.ppl import PPLS, Ppl

PYRO = PPLS["pyro"]


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# --- provenance ---------------------------------------------------------------------------------------------


def forgetful(self: SequenceDistribution, fn: Any, value: Tensor) -> Tensor:
    """Features as somebody computes them who does not know: through plain NumPy."""
    sequences = to_sequences(value, self.lm)
    return torch.tensor(fn(sequences.tokens[0], sequences.lengths[0]).tolist(), dtype=torch.float64)[:, None]


@pytest.mark.slow
def test_features_without_provenance_lose_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with `TraceGraph_ELBO` bites, and our own loss does not need the trail."""
    problem = Problem(PYRO, "independent")
    _, gradient = problem.exact()
    monkeypatch.setattr(SequenceDistribution, "features", forgetful)
    assert p_value(problem.sampled(PYRO.graph_loss(64), 60)[1], gradient) < 1e-6
    assert agrees(problem.sampled(PYRO.loss(64), 80)[1], gradient)


# --- the terms of a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order,num_prompts", CASES)
def test_a_loss_without_gradient_is_the_elbo_and_leaves_its_terms(order: str, num_prompts: int) -> None:
    problem, elbo = Problem(PYRO, order, num_prompts), LeaveOneOutELBO(64)
    losses = np.array([elbo.loss(problem.model, problem.guide) for _ in range(60)])
    assert abs(z_score(losses, problem.exact()[0])) < 3.5
    assert elbo.last.log_weights.shape == (64, 1)  # of the prompts together, z of each prompt included
    assert elbo.last.log_guide.shape == (64, num_prompts)


def test_where_the_guide_is_the_posterior_the_weights_are_the_evidence() -> None:
    """q(x) q(theta | x) holds the joint posterior when there are no preferences: log w = log Z, always."""
    problem = Problem(PYRO, "x, then theta")
    every = problem.all_completions(1)
    f = count_of_0(every.tokens[0], every.lengths[0])
    joint = problem.log_prior([0])[0].numpy() + 0.5 * (f / ALPHA) ** 2
    marginal = bk.Posterior(
        full_table(problem.prior, 3),
        bk.TokenReward(lambda tokens, lengths: 0.5 * (count_of_0(tokens, lengths) / ALPHA) ** 2, alpha=1.0),
        prompts=[list(PROMPTS[0])],
        max_new_tokens=2,
    )
    logits = Truth(marginal).policy().log_probs.reshape(-1, 3)
    problem.params |= {"loc": 0.0, "slope": 1 / ALPHA, "log_sd": 0.0, "logits": logits}
    elbo = LeaveOneOutELBO(16)
    elbo.loss_and_grads(poutine.block(problem.model, hide=["won"]), problem.guide)
    np.testing.assert_allclose(elbo.last.log_weights, np.log(np.exp(joint).sum()), atol=1e-9)
    np.testing.assert_allclose(pyro.param("logits").grad, 0.0, atol=1e-9)


# --- programs of other shapes -------------------------------------------------------------------------------


def test_a_factor_outside_of_the_prompts_makes_one_weight_of_a_particle() -> None:
    posterior = coin_posterior()
    inner, inner_guide = pyro_model(posterior), pyro_guide(posterior, TableLM(full_table(posterior.prior, 4)))
    p = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3)

    def model() -> None:
        pyro.factor("taste", -p.features(lambda tokens, lengths: lengths, inner()).sum(-1, keepdim=True))

    elbo = LeaveOneOutELBO(256)
    elbo.loss_and_grads(model, inner_guide)
    assert elbo.last.log_weights.shape == (256, 1)
    assert list(pyro.get_param_store().named_parameters())


def test_the_models_own_parameters_are_learned_too() -> None:
    """Empirical Bayes: a parameter in a factor gets its gradient, E_q[d factor]."""
    posterior = coin_posterior()
    strength = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    program = pyro_guide(posterior, TableLM(full_table(posterior.prior, 4)))

    def model() -> None:
        with pyro.plate("prompts", 2, dim=-1):
            prior = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3, frozen=True)
            x = pyro.sample("x", prior)
            pyro.factor("taste", strength * prior.features(lambda tokens, lengths: lengths, x))

    elbo = LeaveOneOutELBO(4000)
    elbo.loss_and_grads(model, program)
    assert strength.grad is not None
    assert float(strength.grad) == pytest.approx(-2 * 1.75, abs=0.1)  # E[length] is 1/2 + 2/4 + 3/4


@pytest.mark.slow
def test_a_transformer_in_a_joint_program_trains() -> None:
    """An uncertain price of length on top of a reward; both losses say the same of one program, before and after."""
    from bayes_klrl import problems

    posterior = problems.random_gpt2_task(4, vocab_size=4, max_new_tokens=2, hidden=16, layers=1, target_kl=0.5)
    guide_lm = posterior.prior.copy()  # type: ignore[attr-defined]
    inner, inner_guide = pyro_model(posterior), pyro_guide(posterior, guide_lm)
    p = SequenceDistribution(posterior.prior, posterior.prompt_ids, 2)

    def model() -> None:
        price = pyro.sample("price", dist.Normal(0.0, 1.0))
        x = inner()
        with pyro.plate("priced", 1, dim=-1):
            pyro.factor("length", -price * p.features(lambda tokens, lengths: lengths, x))

    def guide() -> None:
        inner_guide()
        pyro.sample("price", dist.Normal(pyro.param("loc", torch.tensor(0.0)), pyro.param("sd", torch.tensor(1.0))))

    loss = LeaveOneOutELBO(64)
    graph = TraceGraph_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    values = []
    for _ in range(2):
        ours, theirs = (np.array([each.loss(model, guide) for _ in range(25)]) for each in (loss, graph))
        assert abs(ours.mean() - theirs.mean()) < 4 * np.hypot(ours.std(), theirs.std()) / 5
        values.append(ours.mean())
        for _ in range(40):
            svi.step()
    assert values[1] < values[0] - 0.2
    assert float(pyro.param("loc").detach()) < -0.2  # completions are long, and a negative price is easy to please


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_second_discrete_latent_is_refused() -> None:
    def coin(ppl: Ppl) -> Any:
        return pyro.sample("coin", dist.Bernoulli(0.5))

    with pytest.raises(bk.BayesKLRLError, match=r"'coin' \(\w+\) has no reparametrisation.*TraceGraph_ELBO"):
        PYRO.step(LeaveOneOutELBO(4), *with_sites(PYRO, coin, coin))


def test_a_factor_of_more_dimensions_than_plates_is_refused() -> None:
    programs = with_sites(PYRO, lambda ppl: pyro.factor("taste", torch.zeros(2, 1, 1)), None)
    with pytest.raises(bk.BayesKLRLError, match=r"'taste' has the shape.*max_plate_nesting"):
        PYRO.step(LeaveOneOutELBO(4), *programs)


def test_a_program_without_the_sequence_site_is_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"The guide draws no sequence site 'x'.*Trace_ELBO"):
        LeaveOneOutELBO(4).loss(lambda: theta(PYRO), lambda: theta(PYRO))
    model, guide = with_sites(PYRO, None, None)
    given = poutine.condition(model, data={"x": torch.zeros((2, 3), dtype=torch.long)})
    with pytest.raises(bk.BayesKLRLError, match="The model draws no sequence site 'x'"):
        LeaveOneOutELBO(4).loss(given, guide)


def test_rao_blackwell_is_for_posteriors_alone() -> None:
    model, guide = with_sites(PYRO, theta, theta)
    with pytest.raises(bk.BayesKLRLError, match=r"'theta' beside 'x'.*LeaveOneOutELBO"):
        RaoBlackwellELBO(4).loss(model, guide)
