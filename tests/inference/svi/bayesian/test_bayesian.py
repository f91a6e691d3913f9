"""Gaussians over policies: gradients, optimum and inequalities against enumeration times quadrature; the rest of the face."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceGraph_ELBO
from torch import Tensor, nn

import bayes_klrl as bk
from bayes_klrl.inference.svi.bayesian.programs import MeanField, PolicyELBO, policy_programs
from bayes_klrl.inference.svi.bayesian.uncertainty import policy_uncertainty
from bayes_klrl.models.programs.pyro_program import to_sequences
from bayes_klrl.models.torch_lm.offsets import offset_family
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth, chi_square_p, counts, random_posterior, t_square_p

PRIOR_SCALE = 0.8
DIRECTIONS = torch.tensor(
    [[1.0, 0.3, 0.0], [-0.5, 1.0, 0.0], [0.0, -1.0, 0.0]], dtype=torch.float64
)  # the third: nowhere


class BiasLM(TableLM):
    """A bigram model with three biases that shift all its logits, the last of them by nothing."""

    def __init__(self, prior: bk.NgramLM) -> None:
        super().__init__(prior)
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def _rows(self, contexts: np.ndarray) -> Tensor:
        index = torch.as_tensor(contexts @ self._place)
        return (self.logits + DIRECTIONS @ self.bias).log_softmax(-1)[index]


def tiny(prompts: Any = ((0,), (1,))) -> bk.Posterior:
    """Seven completions a prompt, and a policy that has two numbers to move."""
    base = random_posterior(10, vocab_size=3, eos=(2,), num_tokens=2, alpha=0.6, prompts=prompts)
    lm = BiasLM(base.prior)  # type: ignore[arg-type]
    return bk.Posterior(lm, base.likelihood, prompts=[list(p) for p in prompts], max_new_tokens=2)


def nodes(num: int = 24) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite points (J, 2) of the two biases that matter, and their masses."""
    points, mass = np.polynomial.hermite_e.hermegauss(num)
    grid = np.stack(np.meshgrid(points, points), axis=-1).reshape(-1, 2)
    return torch.as_tensor(grid), torch.as_tensor(np.outer(mass, mass).ravel() / mass.sum() ** 2)


class ExactPolicies:
    """log p_phi(x) of all completions, by the definition of `BiasLM` and vectorised over phi."""

    def __init__(self, posterior: bk.Posterior) -> None:
        self.truth, self.posterior = Truth(posterior), posterior
        self.logits = posterior.prior.logits.detach()  # type: ignore[attr-defined]

    def log_probs(self, phi: Tensor) -> Tensor:
        """Of phi (J, 2), shape (J, P, M)."""
        table = (self.logits + (phi @ DIRECTIONS[:, :2].T)[:, None]).log_softmax(-1)  # (J, context, token)
        rows = []
        for prompt in self.posterior.prompt_ids:
            paths = [[prompt[-1], *x] for x in self.truth.xs]
            rows.append(torch.stack([sum(table[:, a, b] for a, b in pairwise(x)) for x in paths], dim=1))
        return torch.stack(rows, dim=1)

    def elbos(self, phi: Tensor) -> Tensor:
        """Of each policy and prompt, (J, P)."""
        log_q = self.log_probs(phi)
        joint = torch.as_tensor(self.truth.log_posterior + self.truth.log_evidence[:, None])
        return (log_q.exp() * (joint - log_q)).sum(dim=2)

    def expected(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """E_phi ELBO(p_phi), summed over prompts."""
        eps, mass = nodes()
        return mass @ self.elbos(mu[:2] + sigma[:2] * eps).sum(dim=1)

    def objective(self, mu: Tensor, log_sigma: Tensor, weight: float) -> Tensor:
        ratio = log_sigma.exp() / PRIOR_SCALE
        kl = (-ratio.log() + (ratio**2 + (mu / PRIOR_SCALE) ** 2) / 2 - 0.5).sum()
        return weight * self.expected(mu, log_sigma.exp()) - kl

    def best(self, weight: float) -> tuple[Tensor, Tensor]:
        """mu and log sigma of the exact optimum."""
        mu = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        log_sigma = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([mu, log_sigma], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -self.objective(mu, log_sigma, weight)
            loss.backward()
            return loss

        optimiser.step(closure)
        return mu.detach(), log_sigma.detach()


# --- the estimator ------------------------------------------------------------------------------------------


def started(posterior: bk.Posterior, **options: Any) -> tuple[Any, MeanField, bk.BayesianSVI]:
    """A family, a Gaussian that is neither prior nor posterior, and the recipe."""
    svi = bk.BayesianSVI(1, parameters="bias", prior_scale=PRIOR_SCALE, **({"num_particles": 8} | options))
    family = offset_family(posterior.prior, "bias")
    mean_field = MeanField.of([0.4, -0.3, 0.2], np.exp([-0.5, -1.0, -0.3]), family.device)
    return family, mean_field, svi


def gradients(
    posterior: bk.Posterior, loss: Any, num_runs: int, weight: float, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Of independent steps, (runs, 6), and the exact one."""
    family, mean_field, svi = started(posterior, evidence_weight=weight, **options)
    model, guide = policy_programs(svi, posterior, family, mean_field)
    rows = []
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(num_runs):
            mean_field.zero_grad(set_to_none=True)
            loss.loss_and_grads(model, guide)
            rows.append(torch.cat([mean_field.mu.grad, mean_field.log_sigma.grad]).numpy())
    mean_field.zero_grad(set_to_none=True)
    (-ExactPolicies(posterior).objective(mean_field.mu, mean_field.log_sigma, weight)).backward()
    return np.array(rows), torch.cat([mean_field.mu.grad, mean_field.log_sigma.grad]).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [((0,),), ((0,), (1,))], ids=["one prompt", "two"])
def test_the_gradient_is_that_of_enumeration_times_quadrature(prompts: Any) -> None:
    runs, exact = gradients(tiny(prompts), PolicyELBO(2), 200, weight=2.5)
    still, moving = [2, 5], [0, 1, 3, 4]
    # the bias that moves nothing has the gradient of its KL, exactly
    np.testing.assert_allclose(runs[:, still], np.tile(exact[still], (200, 1)), atol=1e-12)
    spread = runs.std(axis=0, ddof=1)[moving] / np.sqrt(200)
    assert (spread > 1e-3).all()
    z = (runs.mean(axis=0) - exact)[moving] / spread
    assert np.abs(z).max() < 3.5
    assert t_square_p(runs[:, moving], exact[moving], 4) > 0.005
    # the test bites: a KL that counts twice, and evidence that is a third too light, are found out
    of_kl = gradients_of_kl(tiny(prompts))
    for wrong in (exact + of_kl, of_kl + (exact - of_kl) / 1.5):
        assert t_square_p(runs[:, moving], wrong[moving], 4) < 0.005


def gradients_of_kl(posterior: bk.Posterior) -> np.ndarray:
    """Of KL(q(phi) || p(phi)) alone."""
    mean_field = started(posterior)[1]
    s = PRIOR_SCALE
    return torch.cat([mean_field.mu / s**2, mean_field.log_sigma.exp() ** 2 / s**2 - 1]).detach().numpy()


@pytest.mark.slow
def test_trace_graph_elbo_agrees_on_the_same_programs() -> None:
    runs, exact = gradients(tiny(((0,),)), TraceGraph_ELBO(num_particles=2), 100, weight=2.5, num_particles=64)
    assert t_square_p(runs[:, :5], exact[:5], 5) > 0.005


@pytest.mark.slow
def test_the_value_is_the_elbo() -> None:
    posterior = tiny()
    family, mean_field, svi = started(posterior, evidence_weight=2.5)
    model, guide = policy_programs(svi, posterior, family, mean_field)
    elbo = PolicyELBO(4)
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = np.array([elbo.loss(model, guide) for _ in range(80)])
    exact = -float(ExactPolicies(posterior).objective(mean_field.mu, mean_field.log_sigma, 2.5).detach())
    assert abs(losses.mean() - exact) < 3.5 * losses.std(ddof=1) / np.sqrt(80)
    assert elbo.log_weights.shape == (4, 8, 2)


def test_steps_are_measured_in_nats_that_the_policies_move() -> None:
    """Each policy at its own noise: 1/2 mean (log p_phi'(x) - log p_phi(x))^2, phi' = mu' + sigma' eps."""
    posterior = tiny()
    family, mean_field, svi = started(posterior, num_particles=6, evidence_weight=1.0)
    model, guide = policy_programs(svi, posterior, family, mean_field)
    elbo = PolicyELBO(2)
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        elbo.loss_and_grads(model, guide)
        noise = elbo.noise(mean_field)
        assert elbo.guide_change(family, mean_field, noise) == pytest.approx(0.0, abs=1e-20)
        old = [mean_field.mu + mean_field.log_sigma.exp() * eps for eps in noise]
        with torch.no_grad():
            mean_field.mu += torch.tensor([0.2, -0.1, 3.0])
            mean_field.log_sigma += 0.1
        new = [mean_field.mu + mean_field.log_sigma.exp() * eps for eps in noise]
    exact = ExactPolicies(posterior)
    expected = []
    for (trace, _), before, after in zip(elbo._traces, old, new, strict=True):
        change = (exact.log_probs(after[None, :2]) - exact.log_probs(before[None, :2])).detach()[0]
        x = to_sequences(trace.nodes["x"]["value"], posterior.prior)
        for p in range(2):
            expected += [
                change[p, exact.truth.xs.index(ids)]
                for ids in bk.Sequences(x.tokens[p : p + 1], x.lengths[p : p + 1]).lists()
            ]
    found = elbo.guide_change(family, mean_field, noise)
    assert found == pytest.approx(float(torch.stack(expected).square().mean() / 2), abs=1e-12)
    assert found > 1e-4
    small = bk.BayesianSVI(5, 16, 2, parameters="bias", max_step_kl=1e-6, num_predictive=2).fit(posterior, seed=0)
    assert np.nanmax(small.history["step_kl"]) <= 1e-6
    assert np.abs(small.mu).max() < 0.02


def test_the_programs_are_pyro() -> None:
    posterior = tiny()
    family, mean_field, svi = started(posterior, num_particles=5, evidence_weight=1.0)
    model, guide = policy_programs(svi, posterior, family, mean_field)
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trace = poutine.trace(guide).get_trace()
        phi, x = trace.nodes["phi"]["value"], trace.nodes["x"]["value"]
        assert phi.shape == (3,)
        assert x.shape == (5, 2, 2)
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
        replayed.compute_log_prob()
        sequences = to_sequences(x, posterior.prior)
        policy = family.policy(phi)
        trace.compute_log_prob()
        log_q = bk.Posterior(policy, posterior.likelihood, prompts=[[0], [1]], max_new_tokens=2).log_prior(sequences)
        np.testing.assert_allclose(trace.nodes["x"]["log_prob"].detach() * 5, log_q.T, atol=1e-12)
        np.testing.assert_allclose(replayed.nodes["x"]["log_prob"] * 5, posterior.log_prior(sequences).T, atol=1e-12)
        normal = torch.distributions.Normal(0.0, PRIOR_SCALE)
        assert replayed.nodes["phi"]["log_prob"].item() == pytest.approx(normal.log_prob(phi).sum().item())
        assert trace.nodes["x"]["log_prob"].grad_fn is not None
        found = Predictive(model, guide=guide, num_samples=3)()
        assert found["reward"].shape == (3, 5, 2)
        conditioned = poutine.trace(
            poutine.condition(guide, data={"phi": torch.zeros(3, dtype=torch.float64)})
        ).get_trace()
        at_0 = conditioned.nodes["x"]["fn"].log_prob(x)
        np.testing.assert_allclose(at_0.detach(), posterior.log_prior(sequences).T, atol=1e-12)


# --- the optimum --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_fit() -> bk.BayesianFit:
    recipe = bk.BayesianSVI(
        250,
        parameters="bias",
        prior_scale=PRIOR_SCALE,
        evidence_weight=6.0,
        learning_rate=0.03,
        num_particles=16,
        num_predictive=24,
    )
    return recipe.fit(tiny(), seed=0)


@pytest.mark.slow
def test_training_ends_at_the_optimum_of_the_exact_objective(tiny_fit: bk.BayesianFit) -> None:
    exact = ExactPolicies(tiny_fit.posterior)
    mu, log_sigma = exact.best(6.0)
    found = torch.as_tensor(tiny_fit.mu), torch.as_tensor(tiny_fit.sigma).log()
    start = torch.zeros(3, dtype=torch.float64), torch.full((3,), float(np.log(PRIOR_SCALE / 10)), dtype=torch.float64)
    best = float(exact.objective(mu, log_sigma, 6.0))
    gap = best - float(exact.objective(*found, 6.0))
    assert 0 <= gap < 0.003 < 1 < best - float(exact.objective(*start, 6.0))
    # at the optimum 1 / sigma^2 is the objective's curvature, so a gap g is at most sqrt(2 g) sigma in mu and sqrt(g) in sigma
    sigma = log_sigma.exp().numpy()
    assert (np.abs(tiny_fit.mu - mu.numpy()) < np.sqrt(2 * 0.003) * sigma).all()
    np.testing.assert_allclose(tiny_fit.sigma, sigma, rtol=float(np.sqrt(0.003)))
    # and what has no effect keeps its prior
    assert float(log_sigma[2].exp()) == pytest.approx(PRIOR_SCALE, rel=1e-4)
    assert tiny_fit.sigma[2] == pytest.approx(PRIOR_SCALE, rel=1e-3)
    assert abs(tiny_fit.mu[2]) < 1e-6
    assert (tiny_fit.sigma[:2] < 0.6 * PRIOR_SCALE).all()


def test_more_evidence_is_less_uncertainty() -> None:
    """sigma ~ 1 / sqrt(n) once the evidence dominates, at the optimum itself."""
    exact = ExactPolicies(tiny())
    sigma = {n: exact.best(n)[1].exp()[:2] for n in (1.0, 100.0, 400.0)}
    assert (sigma[1.0] > 2 * sigma[100.0]).all()
    np.testing.assert_allclose(sigma[100.0] / sigma[400.0], 2.0, rtol=0.1)


@pytest.mark.slow
def test_the_three_inequalities(tiny_fit: bk.BayesianFit) -> None:
    """E[ELBO] - KL <= E[ELBO] <= ELBO(predictive) <= log Z, the middle gap being the mutual information."""
    exact = ExactPolicies(tiny_fit.posterior)
    mu, sigma = torch.as_tensor(tiny_fit.mu), torch.as_tensor(tiny_fit.sigma)
    eps, mass = nodes()
    phi = mu[:2] + sigma[:2] * eps
    mean_elbo = float(exact.expected(mu, sigma))
    log_each = exact.log_probs(phi)
    log_bar = (mass[:, None, None] * log_each.exp()).sum(dim=0).log()
    joint = torch.as_tensor(exact.truth.log_posterior + exact.truth.log_evidence[:, None])
    of_bar = float((log_bar.exp() * (joint - log_bar)).sum())
    information = float(mass @ (log_each.exp() * (log_each - log_bar)).sum(dim=(1, 2)))
    log_evidence = float(exact.truth.log_evidence.sum())
    assert of_bar - mean_elbo == pytest.approx(information, abs=1e-9)
    assert information > 0.01
    bound = mean_elbo - tiny_fit.policy_kl
    assert bound < mean_elbo < of_bar < log_evidence
    assert tiny_fit.policy_kl == pytest.approx(6 * mean_elbo - float(exact.objective(mu, sigma.log(), 6.0)), abs=1e-9)
    # trained with n = 1 the bound is better, if the policy is not
    mu_1, log_sigma_1 = exact.best(1.0)
    bound_1 = float(exact.objective(mu_1, log_sigma_1, 1.0))
    assert bound < bound_1 < log_evidence
    assert float(exact.expected(mu_1, log_sigma_1.exp())) < mean_elbo


def test_the_predictive_is_the_mixture_of_drawn_policies(tiny_fit: bk.BayesianFit) -> None:
    truth, exact = Truth(tiny_fit.posterior), ExactPolicies(tiny_fit.posterior)
    assert len(tiny_fit.policies) == 24
    offsets = torch.stack([policy.bias.detach() for policy in tiny_fit.policies])  # type: ignore[attr-defined]
    expected = exact.log_probs(offsets[:, :2]).exp().mean(dim=0).log()
    found = bk.Posterior(tiny_fit.guide, tiny_fit.posterior.likelihood, prompts=[[0], [1]], max_new_tokens=2).log_prior(
        truth.sequences
    )
    np.testing.assert_allclose(found, expected, atol=1e-10)
    draws = tiny_fit.run(4000, seed=3)
    for p in range(2):
        assert chi_square_p(counts(truth, draws.tokens[p]), np.exp(found[p])) > 0.001
    np.testing.assert_allclose(
        draws.log_proposal,
        bk.Posterior(tiny_fit.guide, tiny_fit.posterior.likelihood, prompts=[[0], [1]], max_new_tokens=2).log_prior(
            draws
        ),
        atol=1e-9,
    )
    assert draws.method == "BayesianSVI"
    assert draws.guide is tiny_fit.guide
    assert draws.model_tokens >= 24 * 2
    assert draws.elbo == pytest.approx(truth.log_evidence - truth.kl(tiny_fit.guide), abs=0.1)
    # many draws of phi stand for the Gaussian
    z = (offsets.numpy() - tiny_fit.mu) / tiny_fit.sigma
    assert np.abs(z.mean(axis=0)).max() * np.sqrt(24) < 3.5
    assert np.abs(z.std(axis=0) - 1).max() * np.sqrt(48) < 3.5


@pytest.mark.slow
def test_a_fits_programs_go_on_from_where_it_ended(tiny_fit: bk.BayesianFit) -> None:
    model, guide = tiny_fit.programs()
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss=PolicyELBO(4))
        losses = np.array([svi.step() for _ in range(40)])
        found = Predictive(model, guide=guide, num_samples=150)()["phi"].squeeze().numpy()
    exact = ExactPolicies(tiny_fit.posterior)
    best = -float(exact.objective(*exact.best(6.0), 6.0))
    assert abs(losses.mean() - best) < 3.5 * losses.std(ddof=1) / np.sqrt(40) + 0.02
    z = (found - tiny_fit.mu) / tiny_fit.sigma
    assert np.abs(z.mean(axis=0)).max() * np.sqrt(150) < 3.5
    assert np.abs(z.std(axis=0) - 1).max() * np.sqrt(300) < 3.5


@pytest.mark.slow
def test_uncertainty_is_what_enumeration_says(tiny_fit: bk.BayesianFit) -> None:
    truth = Truth(tiny_fit.posterior)
    found = tiny_fit.uncertainty(3000, seed=1)
    log_each = np.stack(
        [
            bk.Posterior(policy, tiny_fit.posterior.likelihood, prompts=[[0], [1]], max_new_tokens=2).log_prior(
                truth.sequences
            )
            for policy in tiny_fit.policies
        ]
    )
    each = np.exp(log_each)
    rewards = (each * truth.reward).sum(axis=2)
    noise = (each * truth.reward**2).sum(axis=2) - rewards**2
    assert (np.abs(found.policy_reward - rewards) < 5 * np.sqrt(noise / 3000)).all()
    between = rewards.var(axis=0, ddof=1)
    # the error of a variance of S means with noise v / N each: about 2 sd sqrt(v / N / S)
    tolerance = 4 * 2 * np.sqrt(between * noise.mean(axis=0) / 3000 / 24) + 4 * noise.mean(axis=0) / 3000
    assert (np.abs(found.reward_variance - between) < tolerance).all()
    assert (between > 1.5 * tolerance).all()
    np.testing.assert_allclose(found.reward_noise, noise.mean(axis=0), rtol=0.05)
    log_bar = np.log(each.mean(axis=0))
    information = (each * (log_each - log_bar)).sum(axis=2).mean(axis=0)
    assert (np.abs(found.mutual_information - information) < 4 * found.mutual_information_se).all()
    assert (information > 10 * found.mutual_information_se).all()
    elbos = (each * (truth.log_posterior + truth.log_evidence[:, None] - log_each)).sum(axis=2)
    np.testing.assert_allclose(found.policy_elbo, elbos, atol=0.15)
    assert "nats" in repr(found)


def test_policies_that_agree_have_no_uncertainty() -> None:
    posterior = tiny()
    same = policy_uncertainty(posterior, [posterior.prior] * 3, 500, seed=0)
    np.testing.assert_allclose(same.mutual_information, 0.0, atol=1e-12)
    assert (np.abs(same.reward_variance) < 5 * same.reward_noise / 500).all()
