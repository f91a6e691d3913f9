"""Joint Pyro programs of other shapes, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, pyro_guide, pyro_model
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import full_table
from tests.inference.svi.test_joint_pyro import Problem


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        pyro.set_rng_seed(0)
        yield


# --- programs of other shapes -------------------------------------------------------------------------------


def coin_posterior(likelihood: Any = None) -> bk.Posterior:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    longer = bk.TokenReward(lambda tokens, lengths: 1.0 * lengths, alpha=1.0)
    return bk.Posterior(coin, likelihood or longer, prompts=[[], [0]], max_new_tokens=3)


def test_a_posteriors_own_program_is_part_of_a_larger_one() -> None:
    """`posterior.pyro_model()` inside another program, its factor beside the user's own; a scale that is inferred."""
    posterior = coin_posterior()
    guide_lm = TableLM(full_table(posterior.prior, 4))  # type: ignore[arg-type]
    inner, inner_guide = pyro_model(posterior), pyro_guide(posterior, guide_lm)

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        x = inner()
        lengths = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3).features(lambda t, n: n, x)
        pyro.factor("taste", -(scale * lengths).sum(-1, keepdim=True))  # outside the prompts' plate

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("scale", dist.LogNormal(loc, 0.3))
        inner_guide()

    elbo = LeaveOneOutELBO(256)
    elbo.loss_and_grads(model, guide)
    assert elbo.last.log_weights.shape == (256, 1)
    assert pyro.get_param_store().named_parameters()
    assert torch.isfinite(pyro.param("loc").grad)
    graph = TraceGraph_ELBO(num_particles=256, vectorize_particles=True, max_plate_nesting=1)
    ours = np.mean([elbo.loss(model, guide) for _ in range(30)])
    assert ours == pytest.approx(np.mean([graph.loss(model, guide) for _ in range(30)]), abs=0.15)


def test_an_autoguide_for_the_continuous_part() -> None:
    """AutoNormal draws an auxiliary site and a Delta: both are understood."""
    from pyro.infer.autoguide import AutoNormal

    problem = Problem("independent")
    auto = AutoNormal(poutine.block(problem.model, hide=["x"]), init_scale=0.6)

    def guide() -> None:
        auto()
        with pyro.plate("prompts", 1, dim=-1):
            pyro.sample("x", problem._sequences(problem.table, torch.tensor([0])))

    elbo = LeaveOneOutELBO(64)
    elbo.loss(problem.model, guide)
    problem.loc.data = auto.locs.theta.detach().double()
    problem.log_sd.data = auto.scales.theta.detach().double().log()
    losses = np.array([elbo.loss(problem.model, guide) for _ in range(60)])
    exact = float(problem.minus_elbo().detach())
    assert abs(losses.mean() - exact) < 4 * losses.std(ddof=1) / np.sqrt(60)


def test_the_models_own_parameters_are_learned_too() -> None:
    """Empirical Bayes: a parameter in a factor gets its gradient, E_q[d factor]."""
    posterior = coin_posterior()
    table = TableLM(full_table(posterior.prior, 4))  # type: ignore[arg-type]
    strength = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    program = pyro_guide(posterior, table)

    def model() -> None:
        with pyro.plate("prompts", 2, dim=-1):
            prior = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3, frozen=True)
            x = pyro.sample("x", prior)
            pyro.factor("taste", strength * prior.features(lambda tokens, lengths: lengths, x))

    elbo = LeaveOneOutELBO(4000)
    elbo.loss_and_grads(model, program)
    assert float(strength.grad) == pytest.approx(-2 * 1.75, abs=0.1)  # E[length] is 1/2 + 2/4 + 3/4


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


def with_sites(model_first: Any = None, guide_first: Any = None) -> tuple[Any, Any]:
    """The coin's programs with something before them."""
    posterior = coin_posterior()
    inner, inner_guide = pyro_model(posterior), pyro_guide(posterior, posterior.prior)

    def model() -> None:
        if model_first is not None:
            model_first()
        inner()

    def guide() -> None:
        if guide_first is not None:
            guide_first()
        inner_guide()

    return model, guide


def normal(name: str) -> Callable[[], Any]:
    return lambda: pyro.sample(name, dist.Normal(0.0, 1.0))


def coin_flip() -> Any:
    return pyro.sample("coin", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    "model_first,guide_first,message",
    [
        (coin_flip, coin_flip, r"'coin' \(\w+\) has no reparametrisation.*TraceGraph_ELBO"),
        (normal("theta"), None, "'theta' that the guide does not draw"),
        (None, normal("theta"), "guide draws 'theta', which is no latent site"),
        (
            lambda: pyro.sample("theta", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)),
            normal("theta"),
            "guide draws 'theta', which is no latent site",
        ),
        (lambda: pyro.factor("taste", torch.tensor(-np.inf)), None, r"with ids \[.*'taste' is 0.*eps"),
        (lambda: pyro.factor("taste", torch.tensor(np.nan)), None, "log-prob of site 'taste' is nan"),
        (lambda: pyro.factor("taste", torch.zeros(2, 1, 1)), None, r"'taste' has the shape.*max_plate_nesting"),
    ],
)
def test_what_would_be_lost_is_refused(model_first: Any, guide_first: Any, message: str) -> None:
    model, guide = with_sites(model_first, guide_first)
    with pyro.validation_enabled("nan" not in message), pytest.raises(bk.BayesKLRLError, match=message):
        LeaveOneOutELBO(4).loss_and_grads(model, guide)


def test_a_program_without_the_sequence_site_is_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"The guide draws no sequence site 'x'.*Trace_ELBO"):
        LeaveOneOutELBO(4).loss(normal("theta"), normal("theta"))
    model, guide = with_sites()
    given = poutine.condition(model, data={"x": torch.zeros((2, 3), dtype=torch.long)})
    with pytest.raises(bk.BayesKLRLError, match="The model draws no sequence site 'x'"):
        LeaveOneOutELBO(4).loss(given, guide)


def test_rao_blackwell_is_for_posteriors_alone() -> None:
    model, guide = with_sites(normal("theta"), normal("theta"))
    with pytest.raises(bk.BayesKLRLError, match=r"'theta' beside 'x'.*LeaveOneOutELBO"):
        RaoBlackwellELBO(4).loss(model, guide)


def test_features_that_are_none_are_refused() -> None:
    lm = coin_posterior().prior
    x = torch.zeros((5, 1, 3), dtype=torch.long)
    p = SequenceDistribution(lm, [()], 3)
    assert p.features(lambda tokens, lengths: np.ones((len(tokens), 4)), x).shape == (5, 1, 4)
    seen = p.features(lambda tokens, lengths: tokens, torch.tensor([[0, 1, 0]]))
    assert seen.tolist() == [[0, 1, 1]]  # EOS past the end, whatever stood there
    for wrong in (np.ones(4), np.ones((5, 2, 2)), 1.0, np.full(5, np.nan)):
        with pytest.raises(bk.RewardError, match="Features of 5 completions"):
            p.features(lambda tokens, lengths: wrong, x)  # noqa: B023
