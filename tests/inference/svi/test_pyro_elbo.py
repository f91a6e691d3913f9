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



# --- what theory promises -----------------------------------------------------------------------------------



class Recording(LeaveOneOutELBO):
    """Keeps what was drawn."""

    sequences: bk.Sequences

    def terms(self, model_trace: Any, guide_trace: Any) -> Any:
        site = guide_trace.nodes["x"]
        self.sequences = to_sequences(site["value"], site["fn"].lm)
        return super().terms(model_trace, guide_trace)



# --- refusals ---------------------------------------------------------------------------------------------



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
