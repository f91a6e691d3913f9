"""The posterior as a Pyro program: trace, condition, replay, Predictive, a user's own SVI; text rewards included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceGraph_ELBO

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, to_sequences
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior, t_square_p

TEXTS = ["abab", "bba", "ab", "ba", "aab", "b"]


@pytest.fixture(autouse=True)
def own_parameters() -> Any:
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        pyro.set_rng_seed(0)
        yield


def text_posterior(prompts: Any = "a") -> bk.Posterior:
    """Fifteen completions, and a reward that reads them as text."""
    prior = full_table(bk.NgramLM.fit(TEXTS, order=2), 4)
    reward = bk.Reward(lambda completions: [2.0 * c.count("b") - 0.5 * len(c) for c in completions], alpha=0.7)
    return bk.Posterior(prior, reward, prompts=prompts, max_new_tokens=3)


# --- traces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["a", ["a", "ba", ""]])
def test_trace_log_prob_is_the_log_joint(prompts: Any) -> None:
    posterior = text_posterior(prompts)
    for _ in range(5):
        trace = poutine.trace(posterior.pyro_model()).get_trace()
        x = trace.nodes["x"]["value"]
        assert x.shape == (posterior.num_prompts, 3)
        assert x.dtype == torch.int64
        sequences = to_sequences(x, posterior.prior)
        joint = posterior.log_joint(sequences)
        assert float(trace.log_prob_sum()) == pytest.approx(joint.sum(), abs=1e-10)
        trace.compute_log_prob()
        np.testing.assert_allclose(trace.nodes["x"]["log_prob"], posterior.log_prior(sequences)[:, 0], atol=1e-12)
        np.testing.assert_allclose(trace.nodes["reward"]["value"], posterior.reward(sequences)[:, 0], atol=1e-12)
        np.testing.assert_allclose(
            trace.nodes["likelihood"]["log_prob"], posterior.log_likelihood(sequences)[:, 0], atol=1e-12
        )
        assert not trace.nodes["x"]["log_prob"].requires_grad  # the prior is frozen


def test_condition_scores_any_completion_whatever_stands_past_its_end() -> None:
    posterior = text_posterior()
    truth, model = Truth(posterior), posterior.pyro_model()
    total = 0.0
    for x, joint in zip(truth.xs, (truth.log_posterior + truth.log_evidence[:, None])[0], strict=True):
        padded = torch.tensor([x + [0] * (3 - len(x))])
        trace = poutine.trace(poutine.condition(model, data={"x": padded})).get_trace()
        assert float(trace.log_prob_sum()) == pytest.approx(joint, abs=1e-12)
        total += float(trace.log_prob_sum().exp())
    assert np.log(total) == pytest.approx(truth.log_evidence[0], abs=1e-12)


def test_replay_takes_the_guides_draw() -> None:
    posterior = text_posterior(["a", "b"])
    guide = posterior.pyro_guide(TableLM(posterior.prior))  # type: ignore[arg-type]
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(posterior.pyro_model(), trace=guide_trace)).get_trace()
    assert torch.equal(model_trace.nodes["x"]["value"], guide_trace.nodes["x"]["value"])
    assert guide_trace.nodes["x"]["fn"].log_prob(guide_trace.nodes["x"]["value"]).requires_grad
    model_trace.compute_log_prob()
    joint = posterior.log_joint(to_sequences(guide_trace.nodes["x"]["value"], posterior.prior))
    assert float(model_trace.log_prob_sum()) == pytest.approx(joint.sum(), abs=1e-10)


def test_draws_of_the_program_follow_the_prior_and_its_seed() -> None:
    posterior = text_posterior()
    truth = Truth(posterior)
    distribution = SequenceDistribution(posterior.prior, posterior.prompt_ids, 3, frozen=True)
    x = distribution.sample((3000,))
    assert x.shape == (3000, 1, 3)
    assert chi_square_p(counts(truth, x[:, 0].numpy()), np.exp(truth.log_prior[0])) > 0.001
    pyro.set_rng_seed(5)
    first = posterior.pyro_model()()
    pyro.set_rng_seed(5)
    assert torch.equal(first, posterior.pyro_model()())
    assert distribution.log_prob(x).shape == (3000, 1)
    wide = distribution.expand((4, 7, 1))
    assert wide.sample().shape == (4, 7, 1, 3)
    assert wide.log_prob(wide.sample()).shape == (4, 7, 1)
    assert wide.log_prob(x[0]).shape == (4, 7, 1)
    assert distribution.sample((2, 5)).shape == (2, 5, 1, 3)


# --- Predictive ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("prompts", ["a", ["a", "ba", ""]])
def test_predictive(parallel: bool, prompts: Any) -> None:
    posterior = text_posterior(prompts)
    num_prompts, num_samples = posterior.num_prompts, 300 if parallel else 12
    found = Predictive(posterior.pyro_model(), num_samples=num_samples, parallel=parallel)()
    assert found["x"].shape == (num_samples, num_prompts, 3)
    assert found["reward"].shape == (num_samples, num_prompts)
    sequences = to_sequences(found["x"], posterior.prior)
    np.testing.assert_allclose(found["reward"].numpy().T, posterior.reward(sequences), atol=1e-12)
    if parallel:
        truth = Truth(posterior)
        for p in range(num_prompts):
            observed = counts(truth, found["x"][:, p].numpy())
            assert chi_square_p(observed, np.exp(truth.log_prior[p])) > 0.001


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_with_a_guide_draws_from_the_guide(parallel: bool) -> None:
    posterior = text_posterior()
    truth = Truth(posterior)
    best = truth.policy()
    program = posterior.pyro_guide(TableLM(best))
    num_samples = 600 if parallel else 12
    found = Predictive(posterior.pyro_model(), guide=program, num_samples=num_samples, parallel=parallel)()
    assert found["x"].shape == (num_samples, 1, 3)
    np.testing.assert_allclose(
        found["reward"][:, 0], posterior.reward(to_sequences(found["x"], posterior.prior))[0], atol=1e-12
    )
    if parallel:
        assert chi_square_p(counts(truth, found["x"][:, 0].numpy()), truth.p[0]) > 0.001


# --- a user's own SVI ----------------------------------------------------------------------------------------


def exact_gradient(posterior: bk.Posterior, guide: TableLM) -> np.ndarray:
    """Of -ELBO, summed over prompts, by enumeration."""
    truth = Truth(posterior)
    log_q = guide.token_log_probs(posterior.prompt_ids, truth.sequences).sum(dim=2)
    joint = torch.as_tensor(truth.log_posterior + truth.log_evidence[:, None])
    (log_q.exp() * (log_q - joint)).sum().backward()
    return taken(guide)


def taken(guide: TableLM) -> np.ndarray:
    assert guide.logits.grad is not None
    gradient = guide.logits.grad.numpy().ravel().copy()
    guide.logits.grad = None
    return gradient


def gradients(model: Any, program: Any, guide: TableLM, loss: Any, num_runs: int) -> np.ndarray:
    rows = []
    for _ in range(num_runs):
        loss.loss_and_grads(model, program)
        rows.append(taken(guide))
    return np.array(rows)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def without_provenance(model: Any) -> Any:
    """The model as a user would write it who does not know: its factor has forgotten where x came from."""

    class Forget(poutine.messenger.Messenger):
        def _pyro_sample(self, message: dict[str, Any]) -> None:
            if message["name"] == "likelihood":
                factor = message["fn"].log_factor
                plain = torch.tensor(factor.tolist(), dtype=torch.float64)
                message["fn"] = pyro.distributions.Unit(plain)

    return Forget()(model)


def halfway(posterior: bk.Posterior) -> TableLM:
    """A guide between prior and posterior: the reward pulls it one way and the prior the other."""
    guide = TableLM(posterior.prior)  # type: ignore[arg-type]
    policy = torch.tensor(Truth(posterior).policy().log_probs).reshape(guide.logits.shape)
    with torch.no_grad():
        guide.logits.copy_((guide.logits + policy) / 2)
    return guide


def test_trace_graph_elbo_sees_a_text_reward() -> None:
    """The reward is computed from decoded text; its gradient must not get lost on the way (theory.md 9.7)."""
    posterior = text_posterior()
    guide = halfway(posterior)
    exact = exact_gradient(posterior, guide)
    model, program = posterior.pyro_model(), posterior.pyro_guide(guide)
    loss = TraceGraph_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    runs = gradients(model, program, guide, loss, 60)
    assert cosine(runs.mean(axis=0), exact) > 0.97
    assert t_square_p(runs, exact) > 0.005
    # the test bites: with the provenance lost only the pull back to the prior is left, silently
    blind = gradients(without_provenance(model), program, guide, loss, 60)
    assert cosine(blind.mean(axis=0), exact) < -0.5


@pytest.mark.parametrize("num_particles", [16, 5])
def test_a_users_svi_with_trace_graph_elbo_trains(num_particles: int) -> None:
    posterior = text_posterior()
    truth, guide = Truth(posterior), TableLM(posterior.prior)  # type: ignore[arg-type]
    before = truth.kl(guide.to_ngram())[0]
    loss = TraceGraph_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(posterior.pyro_model(), posterior.pyro_guide(guide), pyro.optim.Adam({"lr": 0.1}), loss=loss)
    losses = [svi.step() for _ in range(60)]
    assert np.isfinite(losses).all()
    assert truth.kl(guide.to_ngram())[0] < 0.3 * before


@pytest.mark.parametrize("estimator", [LeaveOneOutELBO, RaoBlackwellELBO])
def test_our_losses_work_in_pyros_svi(estimator: Any) -> None:
    posterior = text_posterior(["a", "b"])
    truth, guide = Truth(posterior), TableLM(full_table(posterior.prior, 5))  # type: ignore[arg-type]
    before = truth.kl(guide.to_ngram())
    svi = SVI(
        posterior.pyro_model(),
        posterior.pyro_guide(guide),
        pyro.optim.ClippedAdam({"lr": 0.15, "lrd": 0.98}),
        loss=estimator(32),
    )
    losses = [svi.step() for _ in range(100)]
    assert (truth.kl(guide.to_ngram()) < 0.1 * before).all()
    assert np.mean(losses[-20:]) == pytest.approx(-truth.log_evidence.sum(), abs=0.25)
    evaluated = np.mean([svi.evaluate_loss() for _ in range(20)])
    assert evaluated == pytest.approx(-truth.log_evidence.sum(), abs=0.25)


def test_a_second_guide_in_one_parameter_store_trains() -> None:
    """Under one name Pyro would go on training the first (theory.md 9.8)."""
    posterior = text_posterior()
    truth, model = Truth(posterior), posterior.pyro_model()
    for _ in range(2):
        guide = TableLM(posterior.prior)  # type: ignore[arg-type]
        svi = SVI(model, posterior.pyro_guide(guide), pyro.optim.Adam({"lr": 0.1}), loss=LeaveOneOutELBO(16))
        for _ in range(40):
            svi.step()
        assert truth.kl(guide.to_ngram())[0] < 0.2 * truth.kl(posterior.prior)[0]
    assert len(pyro.get_param_store()) == 2


def test_batch_sizes_may_change_from_step_to_step() -> None:
    posterior = text_posterior(["a", "b"])
    guide = TableLM(posterior.prior)  # type: ignore[arg-type]
    model, program = posterior.pyro_model(), posterior.pyro_guide(guide)
    for num_particles in (2, 16, 5):
        assert np.isfinite(LeaveOneOutELBO(num_particles).loss_and_grads(model, program))
        graph = TraceGraph_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        assert np.isfinite(graph.loss_and_grads(model, program))
    assert np.isfinite(taken(guide)).all()


def test_trace_graph_elbo_guesses_the_plates_itself() -> None:
    posterior = text_posterior()
    guide = TableLM(posterior.prior)  # type: ignore[arg-type]
    loss = TraceGraph_ELBO(num_particles=8, vectorize_particles=True)
    assert np.isfinite(loss.loss_and_grads(posterior.pyro_model(), posterior.pyro_guide(guide)))
    serial = TraceGraph_ELBO(num_particles=2)
    assert np.isfinite(serial.loss_and_grads(posterior.pyro_model(), posterior.pyro_guide(guide)))


def test_a_transformer_guide_sees_its_text_reward_too() -> None:
    """A TorchLM's log-probs carry their provenance, and its gradient has the enumerated direction."""
    from bayes_klrl import problems

    task = problems.random_gpt2_task(4, vocab_size=4, max_new_tokens=2, hidden=16, layers=1, target_kl=0.5)
    posterior, guide = task, task.prior.copy()  # type: ignore[attr-defined]
    truth = Truth(posterior)
    log_q = guide.token_log_probs(posterior.prompt_ids, truth.sequences).sum(dim=2).double()
    joint = torch.as_tensor(truth.log_posterior + truth.log_evidence[:, None])
    (log_q.exp() * (log_q - joint)).sum().backward()

    def gradient() -> np.ndarray:
        parts = [p.grad.flatten().double() for p in guide.parameters() if p.grad is not None]
        for parameter in guide.parameters():
            parameter.grad = None
        return torch.cat(parts).numpy()

    exact = gradient()
    loss = TraceGraph_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    for _ in range(10):
        loss.loss_and_grads(posterior.pyro_model(), posterior.pyro_guide(guide))
    assert cosine(gradient(), exact) > 0.9


def test_several_prompts_with_a_lopsided_token_reward() -> None:
    """Per-prompt rewards reach their own prompt's rows, particle by particle."""
    posterior = random_posterior(3, num_tokens=3, prompts=((0,), (1,), (2,)), prompt_shift=1.0)
    trace = poutine.trace(pyro.plate("particles", 5, dim=-2)(posterior.pyro_model())).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 3, 3)
    sequences = to_sequences(x, posterior.prior)
    np.testing.assert_allclose(trace.nodes["reward"]["value"].numpy().T, posterior.reward(sequences), atol=1e-12)
    assert float(trace.log_prob_sum()) == pytest.approx(posterior.log_joint(sequences).sum(), abs=1e-9)
