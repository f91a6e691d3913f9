"""What is special to Pyro's gradient estimators: a transformer as a guide, and refusals. The rest is in `test_elbo.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.models.programs.pyro_program import pyro_guide, pyro_model
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import full_table, random_posterior, t_square_p
from tests.inference.svi.engines import ESTIMATORS, PyroEngine, enumerated

PYRO = PyroEngine()


def table_problem(prompts: Any = ((0,),)) -> tuple[bk.Posterior, TableLM]:
    """Fifteen completions, and a guide of full order away from both prior and posterior."""
    posterior = random_posterior(10, vocab_size=3, eos=(2,), num_tokens=3, prompts=prompts, alpha=0.6)
    return posterior, TableLM(full_table(posterior.prior, 4, noise=0.6, seed=1))


def transformer_problem() -> tuple[bk.Posterior, bk.TorchLM]:
    """Forty completions of eight copies of a prompt, and a GPT-2 whose weights have been moved off the prior's."""
    posterior = problems.random_gpt2_task(3, vocab_size=4, max_new_tokens=3, hidden=16, layers=1, target_kl=0.5)
    copies = [list(posterior.prompt_ids[0])] * 8
    posterior = bk.Posterior(posterior.prior, posterior.likelihood, prompts=copies, max_new_tokens=3)
    guide = posterior.prior.copy()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return posterior, guide


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_transformer_gradients_are_unbiased(estimator: str) -> None:
    posterior, guide = transformer_problem()
    exact = enumerated(PYRO, posterior, guide)
    runs = PYRO.gradients(posterior, guide, PYRO.elbo(estimator, 32), 40)
    assert t_square_p(runs, exact) > 0.005
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > 1e-7
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    assert np.abs(z).max() < 5
    mean = runs.mean(axis=0)
    assert mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact) > 0.97


def test_the_value_has_no_gradient_of_its_own() -> None:
    posterior, guide = table_problem()
    PYRO.losses(posterior, guide, PYRO.elbo("LeaveOneOutELBO", 8), 2)
    assert not any(parameter.grad is not None for parameter in guide.parameters())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_likelihood_of_zero_is_named(estimator: str) -> None:
    base, guide = table_problem(prompts=((0,), (1,)))
    never = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens[:, 0] == 1) & (lengths == 3), -np.inf, 0.0), alpha=1.0
    )
    posterior = bk.Posterior(base.prior, never, prompts=[[0], [1]], max_new_tokens=3)
    with pytest.raises(bk.UnboundedLossError, match=r"with ids \[1, \d, \d\].*eps.*bk.SMC"):
        PYRO.gradients(posterior, guide, PYRO.elbo(estimator, 64), 5)


def test_sites_that_would_be_dropped_are_refused() -> None:
    """What joint models may have is in test_joint.py."""
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
