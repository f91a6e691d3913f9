"""What only Pyro has: provenance, gradients of scores, plates that are guessed, one parameter store for all guides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.pyro_program import to_sequences
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth
from tests.inference.svi.engines import enumerated
from tests.models.programs.engines import PyroEngine, sequences_of, table_of, text_posterior
from tests.models.programs.test_own_svi import cosine, halfway

PYRO = PyroEngine()


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        pyro.set_rng_seed(0)
        yield


def text_problem(prompts: Any = "a") -> tuple[bk.Posterior, TableLM]:
    """A reward of texts, and the prior as a guide that is trained."""
    posterior = text_posterior(PYRO, prompts)
    return posterior, TableLM(table_of(posterior))


def taken(guide: torch.nn.Module) -> np.ndarray:
    """The gradients of all parameters that have one as a vector, taken away from them."""
    parts = [p.grad.flatten().double() for p in guide.parameters() if p.grad is not None]
    for parameter in guide.parameters():
        parameter.grad = None
    return np.array(torch.cat(parts).numpy())


def without_provenance(model: Any) -> Any:
    """The model as a user would write it who does not know: its factor has forgotten where x came from."""

    class Forget(poutine.messenger.Messenger):
        def _pyro_sample(self, message: dict[str, Any]) -> None:
            if message["name"] == "likelihood":
                factor = message["fn"].log_factor
                plain = torch.tensor(factor.tolist(), dtype=torch.float64)
                message["fn"] = pyro.distributions.Unit(plain)

    return Forget()(model)


# --- gradients and provenance ---------------------------------------------------------------------------------


def test_the_prior_is_frozen_and_a_guide_is_not() -> None:
    posterior, guide = text_problem(["a", "ba", ""])
    trace = poutine.trace(posterior.pyro_model()).get_trace()
    trace.compute_log_prob()
    assert not trace.nodes["x"]["log_prob"].requires_grad
    site = poutine.trace(posterior.pyro_guide(guide)).get_trace().nodes["x"]
    assert site["fn"].log_prob(site["value"]).requires_grad


def test_completions_become_sequences() -> None:
    """`to_sequences` cuts at the first EOS and puts the prompts first."""
    posterior, _ = text_problem(["a", "ba", ""])
    x = poutine.trace(pyro.plate("particles", 5, dim=-2)(posterior.pyro_model())).get_trace().nodes["x"]["value"]
    found, expected = to_sequences(x, posterior.prior), sequences_of(posterior, x)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    assert found.tokens.shape == (3, 5, 3)


def test_a_text_reward_without_provenance_is_lost() -> None:
    """Only the pull back to the prior is left, silently: what `test_trace_graph_elbo_sees_a_text_reward` finds out."""
    posterior = text_posterior(PYRO)
    guide = TableLM(halfway(posterior))
    exact = enumerated(PYRO, posterior, guide)
    model, program = without_provenance(posterior.pyro_model()), posterior.pyro_guide(guide)
    runs = []
    for _ in range(60):
        PYRO.trace_graph_elbo(64).loss_and_grads(model, program)
        runs.append(taken(guide))
    assert cosine(np.mean(runs, axis=0), exact) < -0.5


def test_a_transformer_guide_sees_its_text_reward_too() -> None:
    """A TorchLM's log-probs carry their provenance, and its gradient has the enumerated direction."""
    posterior = problems.random_gpt2_task(4, vocab_size=4, max_new_tokens=2, hidden=16, layers=1, target_kl=0.5)
    guide = posterior.prior.copy()  # type: ignore[attr-defined]
    truth = Truth(posterior)
    log_q = guide.token_log_probs(posterior.prompt_ids, truth.sequences).sum(dim=2).double()
    joint = torch.as_tensor(truth.log_posterior + truth.log_evidence[:, None])
    (log_q.exp() * (log_q - joint)).sum().backward()
    exact = taken(guide)
    loss = PYRO.trace_graph_elbo(400)
    for _ in range(10):
        loss.loss_and_grads(posterior.pyro_model(), posterior.pyro_guide(guide))
    assert cosine(taken(guide), exact) > 0.9


# --- plates, and one parameter store --------------------------------------------------------------------------


def test_trace_graph_elbo_guesses_the_plates_itself() -> None:
    posterior, guide = text_problem()
    loss = TraceGraph_ELBO(num_particles=8, vectorize_particles=True)
    assert np.isfinite(loss.loss_and_grads(posterior.pyro_model(), posterior.pyro_guide(guide)))
    serial = TraceGraph_ELBO(num_particles=2)
    assert np.isfinite(serial.loss_and_grads(posterior.pyro_model(), posterior.pyro_guide(guide)))


def test_batch_sizes_may_change_from_step_to_step() -> None:
    posterior, guide = text_problem(["a", "b"])
    model, program = posterior.pyro_model(), posterior.pyro_guide(guide)
    for num_particles in (2, 16, 5):
        assert np.isfinite(LeaveOneOutELBO(num_particles).loss_and_grads(model, program))
        assert np.isfinite(PYRO.trace_graph_elbo(num_particles).loss_and_grads(model, program))
    assert np.isfinite(taken(guide)).all()


def test_a_second_guide_in_one_parameter_store_trains() -> None:
    """Under one name Pyro would go on training the first (theory.md 9.8)."""
    posterior = text_posterior(PYRO)
    truth, model = Truth(posterior), posterior.pyro_model()
    for _ in range(2):
        guide = TableLM(table_of(posterior))
        svi = SVI(model, posterior.pyro_guide(guide), pyro.optim.Adam({"lr": 0.1}), loss=LeaveOneOutELBO(16))
        for _ in range(40):
            svi.step()
        assert truth.kl(guide.to_ngram())[0] < 0.2 * truth.kl(posterior.prior)[0]
    assert len(pyro.get_param_store()) == 2
