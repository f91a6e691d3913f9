"""Completions and continuous latents in one Pyro program, against enumeration times quadrature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend import elbo as elbo_module
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, to_sequences
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth, completions, full_table, t_square_p

ALPHA = 0.7
PREFERENCES = torch.tensor([1.0, 1.0, -1.0, 2.0], dtype=torch.float64)  # f(winner) - f(loser)
PROMPTS = ((0,), (1,))


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        pyro.set_rng_seed(0)
        yield


def count_of_0(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return 1.0 * (tokens == 0).sum(axis=1)


class Problem(nn.Module):
    """theta ~ N(0, 1), preferences ~ Bernoulli(sigma(theta d)), x_p ~ p0(. | prompt p), factor theta f(x_p) / alpha.

    Guides: q(theta) prod q(x_p); prod q(x_p) q(theta | x); q(theta) prod q(x_p | theta); and with a z_p for each prompt in
    theta's place, prod q(x_p) q(z_p | x_p).
    """

    def __init__(self, order: str, num_prompts: int = 1, *, num_tokens: int = 2, subsample: int | None = None) -> None:
        super().__init__()
        self.order, self.num_prompts, self.subsample = order, num_prompts, subsample
        self.num_preferences = 4
        self.num_tokens = 1 if order == "theta, then x" else num_tokens
        rng = np.random.default_rng(7)
        logits = rng.standard_normal((3, 3))
        self.prior = bk.NgramLM(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), eos_token_id=2)
        self.table = TableLM(full_table(self.prior, 3, noise=0.5, seed=2))
        numbers = {"loc": 0.3, "slope": 0.4, "log_sd": -0.5, "tilt": 0.6}
        for name, value in numbers.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))
        self.base = nn.Parameter(torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64))

    # -- the programs ------------------------------------------------------------------------------------------

    def _plate(self) -> Any:
        return pyro.plate("prompts", self.num_prompts, subsample_size=self.subsample, dim=-1)

    def _sequences(self, lm: Any, chosen: Tensor, frozen: bool = False) -> SequenceDistribution:
        return SequenceDistribution(lm, [PROMPTS[p] for p in chosen.tolist()], self.num_tokens, frozen=frozen)

    def _standard(self, name: str) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        return pyro.sample(name, dist.Normal(zero, zero + 1))  # type: ignore[no-any-return]

    def model(self) -> None:
        theta = None if self.order == "z of each prompt" else self._standard("theta")
        if theta is not None:
            with pyro.plate("preferences", 4, subsample_size=self.num_preferences, dim=-1) as some:
                won = torch.ones(self.num_preferences, dtype=torch.float64)
                pyro.sample("won", dist.Bernoulli(logits=theta * PREFERENCES[some]), obs=won)
        with self._plate() as chosen:
            prior = self._sequences(self.prior, chosen, frozen=True)
            x = pyro.sample("x", prior)
            weight = self._standard("z") if theta is None else theta
            pyro.factor("taste", weight * prior.features(count_of_0, x) / ALPHA)

    def guide(self) -> None:
        pyro.module("problem", self)
        sd = self.log_sd.exp()
        if self.order == "independent":
            pyro.sample("theta", dist.Normal(self.loc, sd))
        if self.order == "theta, then x":
            theta = pyro.sample("theta", dist.Normal(self.loc, sd))
            with self._plate():
                logits = self.base + self.tilt * theta[..., None] * torch.tensor([1.0, 0.0, -1.0])
                pyro.sample("x", dist.Categorical(logits=logits[..., None, :]).to_event(1))
            return
        with self._plate() as chosen:
            family = self._sequences(self.table, chosen)
            x = pyro.sample("x", family)
            f = family.features(count_of_0, x)
            if self.order == "z of each prompt":
                pyro.sample("z", dist.Normal(self.loc + self.slope * f, sd))
        if self.order == "x, then theta":
            pyro.sample("theta", dist.Normal(self.loc + self.slope * f.sum(-1, keepdim=True), sd))

    # -- the truth ---------------------------------------------------------------------------------------------

    def minus_elbo(self, num_nodes: int = 40) -> Tensor:
        """By enumeration and Gauss-Hermite quadrature, differentiable."""
        if self.order == "z of each prompt":
            return sum((self._of_prompts([p], num_nodes) for p in range(self.num_prompts)), torch.zeros(()))
        return self._of_prompts(list(range(self.num_prompts)), num_nodes)

    def _of_prompts(self, prompts: list[int], num_nodes: int) -> Tensor:
        xs = completions(3, [2], self.num_tokens)
        one = bk.Sequences.from_lists(xs, max_new_tokens=self.num_tokens, pad_token=2)
        all_of = bk.Sequences(np.repeat(one.tokens, len(prompts), 0), np.repeat(one.lengths, len(prompts), 0))
        ids = [PROMPTS[p] for p in prompts]
        log_p = torch.as_tensor(self.prior.token_log_probs(ids, all_of)).sum(2)  # (P, M)
        f = torch.as_tensor(count_of_0(one.tokens[0], one.lengths[0]))  # (M,)
        points, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
        eps, mass = torch.as_tensor(points), torch.as_tensor(weights / weights.sum())
        total = torch.zeros((), dtype=torch.float64)
        for chosen in product(range(len(xs)), repeat=len(prompts)):
            f_sum = sum(f[m] for m in chosen)
            depends = self.order in ("x, then theta", "z of each prompt")
            sd = self.log_sd.exp()
            theta = self.loc + (self.slope * f_sum if depends else 0.0) + sd * eps  # (J,)
            if self.order == "theta, then x":
                logits = self.base + self.tilt * theta[:, None] * torch.tensor([1.0, 0.0, -1.0])
                each = logits.log_softmax(-1)
                log_q = sum(each[:, xs[m][0]] for m in chosen)
            else:
                each = self.table.token_log_probs(ids, all_of).sum(2)
                log_q = sum(each[p, m] for p, m in enumerate(chosen)) + 0 * eps
            log_q_theta = -0.5 * eps**2 - self.log_sd
            log_p_theta = -0.5 * theta**2
            if self.order != "z of each prompt":
                log_p_theta = log_p_theta + nn.functional.logsigmoid(theta[:, None] * PREFERENCES).sum(1)
            log_w = sum(log_p[p, m] for p, m in enumerate(chosen)) + theta * f_sum / ALPHA + log_p_theta
            total = total - (mass * log_q.exp() * (log_w - log_q - log_q_theta)).sum()
        return total

    def exact_gradient(self) -> np.ndarray:
        self.minus_elbo().backward()
        return self.taken()

    def taken(self) -> np.ndarray:
        """The gradients as one vector, taken away."""
        parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().double() for p in self.parameters()]
        self.zero_grad(set_to_none=True)
        return torch.cat(parts).numpy().copy()

    def gradients(self, loss: Any, num_runs: int, model: Callable[[], None] | None = None) -> np.ndarray:
        rows = []
        for _ in range(num_runs):
            loss.loss_and_grads(model or self.model, self.guide)
            rows.append(self.taken())
        return np.array(rows)


def agrees(runs: np.ndarray, exact: np.ndarray) -> bool:
    """Whether the mean of runs is the exact gradient, in projections and in every coordinate."""
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > 1e-9
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    still = np.abs(exact[~moving]).max(initial=0.0) < 1e-9
    return bool(t_square_p(runs, exact, min(8, int(moving.sum()) - 2)) > 0.005 and np.abs(z).max() < 4 and still)


CASES = [
    ("independent", 1),
    ("independent", 2),
    ("x, then theta", 1),
    ("x, then theta", 2),
    ("theta, then x", 1),
    ("theta, then x", 2),
    ("z of each prompt", 2),
]


@pytest.mark.parametrize("order,num_prompts", CASES)
def test_our_gradient_is_that_of_enumeration_times_quadrature(order: str, num_prompts: int) -> None:
    problem = Problem(order, num_prompts)
    exact = problem.exact_gradient()
    assert agrees(problem.gradients(LeaveOneOutELBO(32), 150), exact)
    coarse = Problem(order, num_prompts).minus_elbo(20)
    assert float(coarse.detach()) == pytest.approx(float(problem.minus_elbo().detach()), abs=1e-9)


@pytest.mark.parametrize("order,num_prompts", CASES)
def test_the_value_is_the_elbo(order: str, num_prompts: int) -> None:
    problem, elbo = Problem(order, num_prompts), LeaveOneOutELBO(64)
    losses = np.array([elbo.loss(problem.model, problem.guide) for _ in range(60)])
    z = (losses.mean() - float(problem.minus_elbo().detach())) / (losses.std(ddof=1) / np.sqrt(60))
    assert abs(z) < 3.5
    assert elbo.last.log_weights.shape == (64, 1) if order != "z of each prompt" else (64, 2)
    assert elbo.last.log_guide.shape == (64, num_prompts)


@pytest.mark.parametrize("order", ["independent", "x, then theta", "z of each prompt"])
def test_subsampled_prompts_are_scaled_up(order: str) -> None:
    """For q(theta | x) the guide itself depends on the subsample: its theta sees one prompt, not two."""
    problem = Problem(order, 2, subsample=1)
    if order == "x, then theta":
        assert np.isfinite(problem.gradients(LeaveOneOutELBO(8), 2)).all()
        return
    assert agrees(problem.gradients(LeaveOneOutELBO(64), 120), Problem(order, 2).exact_gradient())


def test_subsampled_data_are_scaled_up() -> None:
    problem = Problem("x, then theta")
    exact = problem.exact_gradient()
    problem.num_preferences = 2
    runs = problem.gradients(LeaveOneOutELBO(32), 150)
    assert agrees(runs, exact)
    problem.num_preferences = 4
    assert problem.gradients(LeaveOneOutELBO(32), 40).var(axis=0).sum() < runs.var(axis=0).sum()  # they are there


@pytest.mark.parametrize("order", ["independent", "x, then theta", "theta, then x"])
def test_trace_graph_elbo_agrees_on_the_same_program(order: str) -> None:
    """Features computed on the host keep what Pyro's own loss needs to know (theory.md 9.7)."""
    problem = Problem(order)
    loss = TraceGraph_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    assert agrees(problem.gradients(loss, 80), problem.exact_gradient())


def forgetful(self: SequenceDistribution, fn: Any, value: Tensor) -> Tensor:
    """Features as somebody computes them who does not know: through plain NumPy."""
    sequences = to_sequences(value, self.lm)
    return torch.tensor(fn(sequences.tokens[0], sequences.lengths[0]).tolist(), dtype=torch.float64)[:, None]


def test_features_without_provenance_lose_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before bites, and our own loss does not need the trail."""
    problem = Problem("independent")
    exact = problem.exact_gradient()
    monkeypatch.setattr(SequenceDistribution, "features", forgetful)
    graph = TraceGraph_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    assert t_square_p(problem.gradients(graph, 60), exact) < 1e-6
    assert agrees(problem.gradients(LeaveOneOutELBO(64), 80), exact)


@pytest.mark.parametrize("lost", ["the other sites in the score's weight", "that theta depends on every x"])
def test_the_gradient_tests_bite(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a term of the score's weight left out the same comparison fails."""
    problem, whole = Problem("x, then theta", 2), elbo_module.site_terms
    exact = problem.exact_gradient()

    def broken(*arguments: Any) -> Any:
        terms = whole(*arguments)
        if lost.startswith("that"):
            return replace(terms, whole=False)
        return replace(
            terms, inside=terms.inside - terms.inside.detach(), outside=terms.outside - terms.outside.detach()
        )

    monkeypatch.setattr(elbo_module, "site_terms", broken)
    assert t_square_p(problem.gradients(LeaveOneOutELBO(64), 150), exact) < 1e-4


def test_where_the_guide_is_the_posterior_the_weights_are_the_evidence() -> None:
    """q(x) q(theta | x) holds the joint posterior when there are no preferences: log w = log Z, always."""
    problem = Problem("x, then theta")
    with_preferences = problem.model

    def model() -> None:
        with poutine.block(hide=["won"]):
            with_preferences()

    xs = completions(3, [2], 2)
    f = count_of_0(np.array([x + [2] * (2 - len(x)) for x in xs]), np.zeros(len(xs)))
    sequences = bk.Sequences.from_lists(xs, max_new_tokens=2, pad_token=2)
    joint = problem.prior.token_log_probs([PROMPTS[0]], sequences).sum(2)[0] + 0.5 * (f / ALPHA) ** 2
    marginal = bk.Posterior(
        full_table(problem.prior, 3),
        bk.TokenReward(lambda tokens, lengths: 0.5 * (count_of_0(tokens, lengths) / ALPHA) ** 2, alpha=1.0),
        prompts=[list(PROMPTS[0])],
        max_new_tokens=2,
    )
    problem.table = TableLM(Truth(marginal).policy())
    with torch.no_grad():
        problem.loc.zero_()
        problem.slope.fill_(1 / ALPHA)
        problem.log_sd.zero_()
    elbo = LeaveOneOutELBO(16)
    elbo.loss_and_grads(model, problem.guide)
    np.testing.assert_allclose(elbo.last.log_weights, np.log(np.exp(joint).sum()), atol=1e-9)
    np.testing.assert_allclose(problem.table.logits.grad, 0.0, atol=1e-9)
