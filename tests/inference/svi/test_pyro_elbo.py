"""Gradient estimators against the gradient of the enumerated ELBO, and the properties that theory promises of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.models.programs.pyro_program import pyro_guide, pyro_model, to_sequences
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p, z_score

COPIES = 8  # of one prompt: as many independent estimates, summed, at about the cost of one
ESTIMATORS = {"leave one out": LeaveOneOutELBO, "Rao-Blackwell": RaoBlackwellELBO}


def table_problem(**options: Any) -> tuple[bk.Posterior, TableLM]:
    """Fifteen completions, and a guide of full order away from both prior and posterior."""
    settings = {"vocab_size": 3, "eos": (2,), "num_tokens": 3, "prompts": ((0,),) * COPIES, "alpha": 0.6}
    posterior = random_posterior(10, **(settings | options))
    return posterior, TableLM(full_table(posterior.prior, 4, noise=0.6, seed=1))


def transformer_problem() -> tuple[bk.Posterior, bk.TorchLM]:
    """Forty completions, and a GPT-2 whose weights have been moved off the prior's."""
    posterior = problems.random_gpt2_task(3, vocab_size=4, max_new_tokens=3, hidden=16, layers=1, target_kl=0.5)
    posterior = bk.Posterior(
        posterior.prior,
        posterior.likelihood,
        prompts=[list(posterior.prompt_ids[0])] * COPIES,
        max_new_tokens=3,
    )
    guide = posterior.prior.copy()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return posterior, guide


def parameters(guide: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in guide.parameters() if parameter.requires_grad]


def gradient(guide: Any) -> np.ndarray:
    """The parameters' gradients as one vector, taken away from them."""
    taken = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().double() for p in parameters(guide)]
    )
    for parameter in parameters(guide):
        parameter.grad = None
    return taken.numpy().copy()


def enumerated(
    posterior: bk.Posterior,
    guide: Any,
    value: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> np.ndarray:
    """The gradient of the sum over prompts of value(log q, log p0, r / alpha), each of shape (P, all completions)."""
    truth = Truth(posterior)
    log_q = guide.token_log_probs(posterior.prompt_ids, truth.sequences).sum(dim=2).double()
    log_p, log_lik = torch.as_tensor(truth.log_prior), torch.as_tensor(truth.reward / posterior.alpha)
    value(log_q, log_p, log_lik).sum().backward()
    return gradient(guide)


def minus_elbo(log_q: torch.Tensor, log_p: torch.Tensor, log_lik: torch.Tensor) -> torch.Tensor:
    return (log_q.exp() * (log_q - log_p - log_lik)).sum(dim=1)


def sampled(posterior: bk.Posterior, guide: Any, elbo: Any, num_runs: int, seed: int = 1, **options: Any) -> np.ndarray:
    """Gradients of -ELBO of independent steps, (runs, parameters)."""
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, program = pyro_model(posterior, **options), pyro_guide(posterior, guide, **options)
        rows = []
        for _ in range(num_runs):
            elbo.loss_and_grads(model, program)
            rows.append(gradient(guide))
    return np.array(rows)


# --- unbiasedness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [2, 8])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tabular_gradients_are_unbiased(estimator: str, num_particles: int) -> None:
    posterior, guide = table_problem()
    exact = enumerated(posterior, guide, minus_elbo)
    runs = sampled(posterior, guide, ESTIMATORS[estimator](num_particles), 120)
    assert t_square_p(runs, exact) > 0.005
    # and so is every coordinate, of those that ever move
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > 1e-9
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    assert np.abs(z).max() < 4
    np.testing.assert_allclose(exact[~moving], 0.0, atol=1e-12)
    # the test bites: a gradient 25 % off is found out
    assert num_particles == 2 or t_square_p(1.25 * runs, exact) < 0.005


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_transformer_gradients_are_unbiased(estimator: str) -> None:
    posterior, guide = transformer_problem()
    exact = enumerated(posterior, guide, minus_elbo)
    runs = sampled(posterior, guide, ESTIMATORS[estimator](32), 40)
    assert t_square_p(runs, exact) > 0.005
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > 1e-7
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    assert np.abs(z).max() < 5
    mean = runs.mean(axis=0)
    assert mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact) > 0.97


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("eos", [(), (1, 2)], ids=str)
def test_gradients_are_unbiased_with_no_eos_and_with_two(estimator: str, eos: tuple[int, ...]) -> None:
    posterior, guide = table_problem(eos=eos, vocab_size=4, num_tokens=2)
    runs = sampled(posterior, guide, ESTIMATORS[estimator](8), 80)
    assert t_square_p(runs, enumerated(posterior, guide, minus_elbo), num_directions=5) > 0.005


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("prompts_per_step", [None, 1, 2])
def test_several_prompts_and_subsamples_of_them(estimator: str, prompts_per_step: int | None) -> None:
    """The loss is the sum over prompts; a subsample is scaled up and unbiased for it."""
    posterior, guide = table_problem(prompts=((0,), (1,), (1, 0)), prompt_shift=0.8, alpha=1.0)
    exact = enumerated(posterior, guide, minus_elbo)
    runs = sampled(posterior, guide, ESTIMATORS[estimator](8), 120, prompts_per_step=prompts_per_step)
    assert t_square_p(runs, exact) > 0.005


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("prompts_per_step", [None, 1])
def test_value_of_the_loss_is_unbiased(estimator: str, prompts_per_step: int | None) -> None:
    posterior, guide = table_problem(prompts=((0,), (1,)), prompt_shift=0.8)
    truth = Truth(posterior)
    exact = float((truth.kl(guide.to_ngram()) - truth.log_evidence).sum())
    elbo = ESTIMATORS[estimator](8)
    options = {"prompts_per_step": prompts_per_step}
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        model, program = pyro_model(posterior, **options), pyro_guide(posterior, guide, **options)
        losses = np.array([elbo.loss(model, program) for _ in range(100)])
    assert abs(losses.mean() - exact) < 3 * losses.std() / np.sqrt(100)
    assert not any(parameter.grad is not None for parameter in guide.parameters())


def test_tokens_that_the_prior_cannot_draw_are_no_trouble() -> None:
    """Log-probs of -inf in the prior's table, and so in the guide's, leave gradients finite and unbiased."""
    with np.errstate(divide="ignore"):
        prior = bk.NgramLM(np.log([[0.0, 0.6, 0.4], [0.5, 0.2, 0.3], [0.7, 0.3, 0.0]]), eos_token_id=2)
    reward = bk.TokenReward(lambda tokens, lengths: 1.0 * (tokens == 1).sum(axis=1), alpha=0.8)
    posterior = bk.Posterior(prior, reward, prompts=[[]] * COPIES, max_new_tokens=3)
    for estimator in ESTIMATORS.values():
        guide = TableLM(prior)
        runs = sampled(posterior, guide, estimator(8), 80)
        assert np.isfinite(runs).all()
        possible = posterior.log_prior(Truth(posterior).sequences)[0] > -np.inf

        def of_possible(q: torch.Tensor, p: torch.Tensor, lik: torch.Tensor) -> torch.Tensor:
            return minus_elbo(q[:, possible], p[:, possible], lik[:, possible])  # noqa: B023

        exact = enumerated(posterior, guide, of_possible)
        assert t_square_p(runs, np.nan_to_num(exact), num_directions=4) > 0.005


# --- what theory promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [2, 3, 16])
def test_leave_one_out_is_minus_the_gradient_of_half_the_variance_of_log_weights(num_particles: int) -> None:
    """VarGrad, batch for batch (theory.md 2.4): grad 0.5 var(log w) = -grad ELBO, per prompt."""
    posterior, guide = table_problem(prompts=((0,), (1,)), prompt_shift=2.0)
    largest = 0.01
    for seed in range(5):
        elbo = Recording(num_particles)
        of_elbo = sampled(posterior, guide, elbo, 1, seed=seed)[0]
        log_q = guide.token_log_probs(posterior.prompt_ids, elbo.sequences).sum(dim=2)
        log_w = torch.as_tensor(posterior.log_joint(elbo.sequences)) - log_q
        (0.5 * log_w.var(dim=1, unbiased=True)).sum().backward()
        largest = max(largest, float(np.abs(of_elbo).max()))
        np.testing.assert_allclose(of_elbo, gradient(guide), rtol=0, atol=1e-14 * largest)
    assert largest > 0.01


class Recording(LeaveOneOutELBO):
    """Keeps what was drawn."""

    sequences: bk.Sequences

    def terms(self, model_trace: Any, guide_trace: Any) -> Any:
        site = guide_trace.nodes["x"]
        self.sequences = to_sequences(site["value"], site["fn"].lm)
        return super().terms(model_trace, guide_trace)


def test_leave_one_out_has_no_variance_at_the_posterior() -> None:
    """All log-weights are log Z there; Rao-Blackwell keeps the reward's noise (theory.md 2.5)."""
    posterior = table_problem()[0]
    guide = TableLM(Truth(posterior).policy())
    runs = sampled(posterior, guide, LeaveOneOutELBO(4), 20)
    np.testing.assert_allclose(runs, 0.0, rtol=0, atol=1e-12)
    noisy = sampled(posterior, guide, RaoBlackwellELBO(4), 80)
    assert noisy.std(axis=0).max() > 0.01
    assert t_square_p(noisy, np.zeros(noisy.shape[1])) > 0.005


def test_rao_blackwell_has_the_lower_variance_far_from_the_posterior() -> None:
    """A reward that hardly varies and a guide away from the prior: all noise is the KL's, which is summed out."""
    posterior, guide = table_problem(alpha=20.0)
    variance = {
        name: sampled(posterior, guide, estimator(8), 60).var(axis=0).sum() for name, estimator in ESTIMATORS.items()
    }
    assert variance["Rao-Blackwell"] < 0.5 * variance["leave one out"]


def test_rao_blackwell_makes_a_token_pay_for_the_kl_that_it_leads_to() -> None:
    """First tokens cost nothing themselves; after 1 the guide is far from the prior: all gradient comes from later KLs."""
    prior = np.array([[0.5, 0.5], [0.1, 0.9]])
    guide = np.array([[0.5, 0.5], [0.9, 0.1]])
    nothing = bk.TokenReward(lambda tokens, lengths: np.zeros(len(tokens)), alpha=1.0)
    posterior = bk.Posterior(
        bk.NgramLM(np.log(prior), eos_token_id=None), nothing, prompts=[[0]] * COPIES, max_new_tokens=2
    )
    lm = TableLM(bk.NgramLM(np.log(guide), eos_token_id=None))
    runs = sampled(posterior, lm, RaoBlackwellELBO(8), 50).reshape(-1, 2, 2)
    # d KL / d logit of token 1 in context 0, the prompt's own: q(1) (1 - q(1)) KL(guide || prior after 1)
    later = float((guide[1] * np.log(guide[1] / prior[1])).sum())
    assert runs[:, 0, 1].mean() > 0.8 * COPIES * 0.25 * later
    assert abs(z_score(runs[:, 0, 1], COPIES * 0.25 * later)) < 3.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_a_reward_it_is_the_reverse_kl_that_is_descended(estimator: str) -> None:
    """2.5: neither 0 (k1 in the loss), nor the forward KL (k3 in the loss), nor their difference (k3 in the reward)."""
    base, guide = table_problem()
    nothing = bk.TokenReward(lambda tokens, lengths: np.zeros(len(tokens)), alpha=1.0)
    posterior = bk.Posterior(base.prior, nothing, prompts=[[0]] * COPIES, max_new_tokens=3)
    reverse = enumerated(posterior, guide, lambda q, p, lik: (q.exp() * (q - p)).sum(dim=1))
    forward = enumerated(posterior, guide, lambda q, p, lik: (p.exp() * (p - q)).sum(dim=1))
    runs = sampled(posterior, guide, ESTIMATORS[estimator](8), 100)
    assert t_square_p(runs, reverse) > 0.005
    for wrong in (0 * reverse, forward, reverse - forward):
        assert t_square_p(runs, wrong) < 1e-6


def test_the_kl_term_pulls_as_hard_as_alpha_says() -> None:
    """Half the alpha is twice the reward: grad(-ELBO) = grad KL - grad E[r] / alpha, at two values of alpha."""
    gradients = {}
    for alpha in (0.3, 0.6):
        posterior, guide = table_problem(alpha=alpha)
        gradients[alpha] = sampled(posterior, guide, LeaveOneOutELBO(64), 50).mean(axis=0)
    posterior, guide = table_problem(alpha=1.0)
    of_reward = enumerated(posterior, guide, lambda q, p, lik: (q.exp() * lik).sum(dim=1))
    found = (gradients[0.6] - gradients[0.3]) @ of_reward / (of_reward @ of_reward)
    assert found == pytest.approx(1 / 0.3 - 1 / 0.6, rel=0.1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_baselines_are_of_each_prompt_alone(estimator: str) -> None:
    """r + a(c) for any a leaves every batch's gradient as it is, whatever the level; a common baseline would not."""
    guide = table_problem()[1]
    prompts = ((0,), (1,))
    plain = table_problem(prompts=prompts, prompt_shift=0.0)[0]
    shifted = table_problem(prompts=prompts, prompt_shift=1000.0)[0]
    first = sampled(plain, guide, ESTIMATORS[estimator](6), 5)
    second = sampled(shifted, guide, ESTIMATORS[estimator](6), 5)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-9)
    assert np.abs(first).max() > 0.01


# --- refusals ---------------------------------------------------------------------------------------------


def test_one_particle_has_no_others() -> None:
    for estimator in ESTIMATORS.values():
        with pytest.raises(bk.BayesKLRLError, match="num_particles >= 2"):
            estimator(1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_likelihood_of_zero_is_named(estimator: str) -> None:
    base, guide = table_problem(prompts=((0,), (1,)))
    never = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens[:, 0] == 1) & (lengths == 3), -np.inf, 0.0), alpha=1.0
    )
    posterior = bk.Posterior(base.prior, never, prompts=[[0], [1]], max_new_tokens=3)
    with pytest.raises(bk.UnboundedLossError, match=r"with ids \[1, \d, \d\].*eps.*bk.SMC"):
        sampled(posterior, guide, ESTIMATORS[estimator](64), 5)


def test_sites_that_would_be_dropped_are_refused() -> None:
    """What joint models may have is in test_joint_pyro.py."""
    posterior, guide = table_problem()
    inner, program = pyro_model(posterior), pyro_guide(posterior, guide)

    def sampled_first(rest: Any) -> Any:
        def with_temperature() -> Any:
            pyro.sample("temperature", pyro.distributions.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
            return rest()

        return with_temperature

    with pyro.get_param_store().scope():
        with pytest.raises(bk.BayesKLRLError, match=r"'temperature' that the guide does not draw"):
            LeaveOneOutELBO(4).loss_and_grads(sampled_first(inner), program)
        with pytest.raises(bk.BayesKLRLError, match=r"'temperature' beside.*LeaveOneOutELBO"):
            RaoBlackwellELBO(4).loss_and_grads(sampled_first(inner), sampled_first(program))
