"""Losses as `bk.audit` takes them, trained by SVI; forward KL on a sampler's draws; hard constraints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.losses import DPO, GRPO, KLPenalty, LeaveOneOut, LogVariance, RaoBlackwell
from bayes_klrl.inference.svi.pyro_backend.training import TorchTraining
from bayes_klrl.posterior import completion_log_probs
from tests.helpers.tiny_models import tiny_gpt2
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p


def mine(batch: bk.LossInputs) -> torch.Tensor:
    """A loss as a user writes it, without any of our functions."""
    returns = batch.rewards - batch.alpha * (batch.log_probs.detach() - batch.ref_log_probs).sum(dim=1)
    others = (returns.sum() - returns) / (len(returns) - 1)
    return -((returns - others) * batch.log_probs.sum(dim=1)).mean()


def problem(num_prompts: int = 1) -> tuple[bk.Posterior, bk.NgramLM]:
    """Fifteen completions per prompt, and a guide away from prior and posterior."""
    prompts = [(0,), (1,)][:num_prompts]
    posterior = random_posterior(10, vocab_size=3, eos=(2,), num_tokens=3, prompts=prompts, alpha=0.6)
    return posterior, full_table(posterior.prior, 4, noise=0.6, seed=1)  # type: ignore[arg-type]


def gradients(training: TorchTraining, num_runs: int) -> np.ndarray:
    """Gradients of independent steps, (runs, parameters)."""
    found = []
    for _ in range(num_runs):
        training.guide.logits.grad = None
        training.elbo.loss_and_grads(training.model, training.program)
        found.append(training.guide.logits.grad.numpy().ravel().copy())
    return np.stack(found)


def enumerated(posterior: bk.Posterior, training: TorchTraining, value: Any) -> np.ndarray:
    """The gradient of value(log q, truth), a scalar of log q (P, X) of all completions."""
    training.guide.logits.grad = None
    truth = Truth(posterior)
    log_q = training.guide.token_log_probs(posterior.prompt_ids, truth.sequences).sum(dim=2)
    value(log_q, truth).backward()
    found: np.ndarray = training.guide.logits.grad.numpy().ravel().copy()
    return found


def minus_elbo(log_q: torch.Tensor, truth: Truth) -> torch.Tensor:
    return (log_q.exp() * (log_q - torch.as_tensor(truth.log_posterior))).sum()


def preferences(log_q: torch.Tensor, truth: Truth) -> torch.Tensor:
    """DPO's loss on all pairs of the prior's completions, over alpha, times (N - 1) / N of its pairs that differ."""
    posterior = truth.posterior
    log_p, reward = (
        torch.as_tensor(values) for values in (posterior.log_prior(truth.sequences), posterior.reward(truth.sequences))
    )
    total = torch.zeros((), dtype=torch.float64)
    for q, p, r in zip(log_q, log_p, reward, strict=True):
        h = posterior.alpha * (q - p)
        losses = -2 * torch.sigmoid(r[:, None] - r) * torch.nn.functional.logsigmoid(h[:, None] - h)
        total = total + (p.exp()[:, None] * p.exp() * losses).sum()
    return total / posterior.alpha * (127 / 128)


LOSSES = {
    "leave-one-out": (LeaveOneOut(), minus_elbo),
    "the variance of log w": (LogVariance(), minus_elbo),
    "the KL over the vocabulary": (RaoBlackwell(), minus_elbo),
    "a user's": (mine, minus_elbo),
    "DPO, drawn from the prior": (DPO(), preferences),
}


@pytest.mark.slow
@pytest.mark.parametrize("name,num_prompts", [*((name, 2) for name in LOSSES), ("DPO, drawn from the prior", 1)])
def test_a_loss_has_its_enumerated_gradient(name: str, num_prompts: int) -> None:
    loss, value = LOSSES[name]
    posterior, guide = problem(num_prompts)
    torch.manual_seed(0)
    training = TorchTraining(bk.SVI(1, 128, objective=loss, initial_guide=guide), posterior, 0)
    exact = enumerated(posterior, training, value)
    runs = gradients(training, 100)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    assert t_square_p(1.2 * runs, exact, num_directions=6) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("loss,num_steps", [(mine, 150), (DPO(), 400)], ids=["a user's", "DPO"])
def test_it_is_trained_to_the_posterior(loss: Any, num_steps: int) -> None:
    base = random_posterior(51, num_tokens=3)
    posterior = bk.Posterior(full_table(base.prior, 3), base.likelihood, prompts=[()], max_new_tokens=3)  # type: ignore[arg-type]
    fit = bk.SVI(num_steps, 64, objective=loss, learning_rate=0.1).fit(posterior, seed=0)
    assert kl_to_posterior(fit.guide, posterior) < 0.06 < kl_to_posterior(posterior.prior, posterior)


def kl_to_posterior(guide: Any, posterior: bk.Posterior) -> float:
    truth = Truth(posterior)
    log_q = completion_log_probs(guide, posterior.prompt_ids, truth.sequences)
    return float((np.exp(log_q) * (log_q - truth.log_posterior)).sum())


def test_the_leave_one_out_loss_trains_the_guide_of_the_elbo() -> None:
    """One estimator by two paths: on a transformer, where gradients come from another scoring call."""
    posterior = bk.Posterior(
        bk.TorchLM(tiny_gpt2(6)),
        bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=0.7),
        prompts=[[0], [1]],
        max_new_tokens=4,
    )
    first, second = (
        bk.SVI(5, 8, objective=objective, optimizer="adam").fit(posterior, seed=1)
        for objective in ("elbo", LeaveOneOut())
    )
    for name in ("elbo", "kl", "reward", "log_weight_sd", "ess"):
        np.testing.assert_allclose(first.history[name], second.history[name], rtol=1e-4, err_msg=name)


def test_prompts_in_turn_and_a_resume(tmp_path: Path) -> None:
    posterior, _ = problem(2)
    svi = bk.SVI(8, 16, objective=GRPO(), prompts_per_step=1)
    whole = svi.fit(posterior, seed=0)
    with pytest.raises(RuntimeError, match="enough"):
        svi.fit(posterior, seed=0, checkpoint=bk.Checkpoint(tmp_path, every=3), callbacks=[enough])
    again = svi.fit(posterior, seed=0, resume=tmp_path)
    np.testing.assert_array_equal(whole.history["elbo"], again.history["elbo"])


def enough(record: bk.StepRecord, guide: Any) -> None:
    if record.step == 4:
        raise RuntimeError("enough")


def test_draws_of_the_prior_are_weighted_for_the_history() -> None:
    """With many draws "elbo" is the guide's, although the prior drew."""
    posterior, guide = problem()
    torch.manual_seed(0)
    training = TorchTraining(bk.SVI(1, 20_000, objective=Small(), initial_guide=guide), posterior, 0)
    history = training.step(0)
    truth = Truth(posterior)
    log_q = completion_log_probs(guide, posterior.prompt_ids, truth.sequences)
    log_w = truth.log_posterior + truth.log_evidence[:, None] - log_q
    assert history["elbo"] == pytest.approx(float((np.exp(log_q) * log_w).sum()), abs=0.05)
    assert history["ess"] == pytest.approx(
        20_000 / float(np.exp(2 * truth.log_posterior - posterior.log_prior(truth.sequences)).sum()), rel=0.05
    )


class Small:
    """A loss of the prior's draws whose cost is linear in their number."""

    draw_from = "prior"

    def __call__(self, batch: bk.LossInputs) -> torch.Tensor:
        return -batch.log_probs.sum(dim=1).mean()


@pytest.mark.parametrize(
    "loss,message",
    [
        (lambda batch: batch.log_probs, "tensor of shape"),
        (lambda batch: 3.0, "must return a torch scalar"),
        (lambda batch: batch.rewards.mean(), "does not depend on the policy"),
        (lambda batch: batch.nothing, "The loss raised AttributeError"),
        (lambda batch: batch.log_probs.mean() / 0.0, "The loss is"),
    ],
)
def test_what_is_no_loss_is_refused_in_words(loss: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.SVI(3, 8, objective=loss).fit(problem()[0], seed=0)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"objective": mine, "particles_per_pass": 4}, "reads all completions of a prompt at once"),
        ({"objective": mine, "twist": bk.PartialRewardTwist()}, 'A critic \\(twist=\\) is for objective="elbo"'),
        ({"objective": mine, "optimizer": "natural"}, "gradient of its own"),
        ({"objective": KLPenalty}, "a function of bk.LossInputs"),
        ({"objective": bk.ForwardKL(bk.SMC(8)), "particles_per_pass": 4}, "its sampler draws"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.SVI(3, **options)


def test_a_sampler_is_an_algorithm() -> None:
    with pytest.raises(bk.BayesKLRLError, match="sampler is an algorithm"):
        bk.ForwardKL(sampler=64)  # type: ignore[arg-type]


# --- forward KL on a sampler's draws, and likelihoods of 0 --------------------------------------------------------------


@pytest.mark.parametrize("sampler", [bk.SMC(1024), bk.ImportanceSampling(1024)], ids=["SMC", "importance sampling"])
def test_draws_of_a_sampler_have_the_gradient_of_the_forward_kl(sampler: Any) -> None:
    posterior, guide = problem(2)
    torch.manual_seed(0)
    training = TorchTraining(bk.SVI(1, objective=bk.ForwardKL(sampler), initial_guide=guide), posterior, 0)
    exact = enumerated(
        posterior, training, lambda log_q, truth: -(torch.as_tensor(truth.log_posterior).exp() * log_q).sum()
    )
    runs = gradients(training, 50)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    assert t_square_p(1.2 * runs, exact, num_directions=6) < 0.005


def test_all_completions_have_it_exactly() -> None:
    posterior, guide = problem(2)
    training = TorchTraining(bk.SVI(1, objective=bk.ForwardKL(bk.Exact()), initial_guide=guide), posterior, 0)
    exact = enumerated(
        posterior, training, lambda log_q, truth: -(torch.as_tensor(truth.log_posterior).exp() * log_q).sum()
    )
    np.testing.assert_allclose(gradients(training, 1)[0], exact, atol=1e-6)
    log_q = completion_log_probs(guide, posterior.prompt_ids, Truth(posterior).sequences)
    log_w = Truth(posterior).log_posterior + Truth(posterior).log_evidence[:, None] - log_q
    assert training.step(0)["elbo"] == pytest.approx(float((np.exp(log_q) * log_w).sum(axis=1).mean()), abs=1e-5)


def sums_to_five() -> bk.Posterior:
    """A hard constraint that the prior meets in one of twelve completions."""
    base = random_posterior(51, num_tokens=3)
    divisible = bk.Constraint(lambda completion_ids: [sum(ids) % 5 == 0 for ids in completion_ids])
    return bk.Posterior(full_table(base.prior, 3), divisible, prompts=[()], max_new_tokens=3)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["forward_kl", bk.ForwardKL(bk.SMC(64))], ids=["own draws", "SMC"])
def test_a_hard_constraint_is_learned(objective: Any) -> None:
    posterior = sums_to_five()
    fit = bk.SVI(120, 64, objective=objective, learning_rate=0.2).fit(posterior, seed=0)
    truth = Truth(posterior)
    log_q = completion_log_probs(fit.guide, posterior.prompt_ids, truth.sequences)
    alive = np.isfinite(truth.log_posterior)
    forward = float((np.exp(truth.log_posterior[alive]) * (truth.log_posterior - log_q)[alive]).sum())
    assert forward < 0.1 < -truth.log_evidence[0]
    assert np.isfinite(fit.history["kl"]).all()


@pytest.mark.parametrize("objective", ["js", "tv"])
def test_bounded_divergences_take_it_too(objective: str) -> None:
    """They are flat far from the posterior, so no more is asked than that nothing is undefined."""
    fit = bk.SVI(20, 32, objective=objective, optimizer="kl_sgd").fit(sums_to_five(), seed=0)
    for name in ("kl", "log_weight_sd", "gradient_norm"):
        assert np.isfinite(fit.history[name]).all(), name


@pytest.mark.parametrize("objective", ["elbo", "log_variance"])
def test_the_elbo_does_not(objective: str) -> None:
    with pytest.raises(bk.UnboundedLossError):
        bk.SVI(20, 32, objective=objective).fit(sums_to_five(), seed=0)


def test_steps_without_a_possible_draw_change_nothing() -> None:
    posterior = sums_to_five()
    never = bk.Constraint(lambda completion_ids: [False for _ in completion_ids])
    impossible = bk.Posterior(posterior.prior, never, prompts=[()], max_new_tokens=3)
    fit = bk.SVI(3, 8, objective="forward_kl", optimizer="kl_sgd").fit(impossible, seed=0)
    draws = fit.run(200, seed=0)
    np.testing.assert_allclose(draws.log_proposal, draws.log_prior, atol=1e-6)


@pytest.mark.slow
def test_a_gap_knows_of_impossible_draws() -> None:
    """Half of the draws are impossible: neither is the training over, nor are its steps of length 0."""
    posterior = sums_to_five()
    stopping = bk.EarlyStopping(gap=0.05)
    for optimizer in ("adam", "kl_sgd"):
        fit = bk.SVI(60, 64, objective="forward_kl", optimizer=optimizer).fit(posterior, seed=0, callbacks=[stopping])
        alive = np.isfinite(fit.run(2000, seed=1).reward).mean()
        assert fit.history["log_weight_sd"][0] ** 2 / 2 > 1.0
        assert alive > 0.93 or len(fit.history["elbo"]) == 60  # -log 0.95 is the gap
        assert alive > 1.5 * np.exp(Truth(posterior).log_evidence[0])


@pytest.mark.parametrize("sampler", [bk.BestOfN(4, 64), bk.QuasiRejection(64, 2.0), bk.SVI(5, 8)], ids=repr)
def test_samplers_of_something_else_are_refused(sampler: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="draws of the posterior; those of"):
        bk.SVI(3, objective=bk.ForwardKL(sampler)).fit(problem()[0], seed=0)


@pytest.mark.slow
def test_what_would_be_fitted_anew_or_find_other_prompts_is_refused() -> None:
    posterior, _ = problem(2)
    anew = bk.ForwardKL(bk.SMC(16, twist=bk.PartialRewardTwist()))
    with pytest.raises(bk.BayesKLRLError, match="twist anew in each step"):
        bk.SVI(3, objective=anew, prompts_per_step=1).fit(posterior, seed=0)
    numbered = bk.ForwardKL(bk.SMC(16, twist=lambda posterior, prompt_index, prefixes: 0.0 * prompt_index))
    with pytest.raises(bk.BayesKLRLError, match="prompt_index, would find other numbers"):
        bk.SVI(3, objective=numbered, prompts_per_step=1).fit(posterior, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="at least 2 draws"):
        bk.SVI(3, objective=bk.ForwardKL(bk.Exact(1))).fit(posterior, seed=0)


@pytest.mark.slow
def test_steps_of_some_prompts_tell_a_reward_the_numbers_of_the_whole() -> None:
    """Only prompt 1 pays for token 0: the guide goes to probability 0.88 there, and stays at 0.5 after prompt 0."""
    paid = bk.TokenReward(lambda tokens, lengths, prompt_index: 2.0 * prompt_index * (tokens[:, 0] == 0), alpha=1.0)
    coin = bk.NgramLM(np.log([[0.5, 0.5], [0.5, 0.5]]), eos_token_id=())
    posterior = bk.Posterior(coin, paid, prompts=[[0], [1]], max_new_tokens=1)
    fit = bk.SVI(150, objective=bk.ForwardKL(bk.SMC(64)), prompts_per_step=1).fit(posterior, seed=0)
    log_q = fit.guide.log_probs  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.exp(log_q[:, 0]), [0.5, 1 / (1 + np.exp(-2.0))], atol=0.05)


def test_a_sampler_with_a_twist_goes_on_as_it_would_have(tmp_path: Path) -> None:
    posterior, _ = problem()
    svi = bk.SVI(9, objective=bk.ForwardKL(bk.SMC(16, twist=bk.LearnedTwist(5))))
    whole = svi.fit(posterior, seed=0)
    with pytest.raises(RuntimeError, match="enough"):
        svi.fit(posterior, seed=0, checkpoint=bk.Checkpoint(tmp_path, every=2), callbacks=[enough])
    again = svi.fit(posterior, seed=0, resume=tmp_path)
    np.testing.assert_array_equal(whole.history["elbo"], again.history["elbo"])
    assert whole.training_tokens == again.training_tokens


def test_a_context_without_gradients_changes_nothing() -> None:
    posterior, _ = problem()
    fit = bk.SVI(5, 16).fit(posterior, seed=0)
    with torch.no_grad():
        again = bk.SVI(5, 16).fit(posterior, seed=0)
    np.testing.assert_array_equal(fit.history["elbo"], again.history["elbo"])
    assert fit.history["gradient_norm"][0] > 0


class Weights:
    """An objective of one's own whose weights are wrong."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def weights(self, log_weights: Any, log_evidence: Any, xp: Any) -> Any:
        return self.found(log_weights)


@pytest.mark.parametrize(
    "found,message",
    [
        (lambda w: w[:1], r"one per draw, \(N, P\) = \(8, 1\); got \(1, 1\)"),
        (lambda w: w.tolist(), "got list"),
        (lambda w: w / 0.0, "are not finite"),
        (lambda w: w.nothing, "raised AttributeError"),
    ],
)
def test_weights_of_ones_own_objective_are_checked(found: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.SVI(3, 8, objective=Weights(found)).fit(problem()[0], seed=0)
