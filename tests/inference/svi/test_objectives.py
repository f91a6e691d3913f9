"""Objectives and critics: gradients against enumeration, optima, one gradient whatever the split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.losses import LeaveOneOut
from bayes_klrl.inference.svi.objectives import ELBO, JS, OBJECTIVES, TV, ForwardKL, LogVariance, objective_of
from bayes_klrl.inference.svi.objectives.critics import (
    PrefixRewardCritic,
    Rows,
    TwistCritic,
    advantages,
    prefix_log_likelihoods,
)
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.inference.svi.pyro_backend.scores import ScoreELBO
from bayes_klrl.models.programs.pyro_program import pyro_guide, pyro_model
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p
from tests.inference.svi.engines import ENGINES

ENGINE = ENGINES["pyro"]


def problem(prompts: Any = ((0,),)) -> tuple[bk.Posterior, TableLM]:
    """Fifteen completions, a lopsided reward, a guide away from prior and posterior."""
    posterior = random_posterior(10, vocab_size=3, eos=(2,), num_tokens=3, prompts=prompts, alpha=0.6)
    return posterior, TableLM(full_table(posterior.prior, 4, noise=0.6, seed=1))  # type: ignore[arg-type]


def enumerated(posterior: bk.Posterior, guide: TableLM, divergence: Any) -> np.ndarray:
    """The gradient of a divergence of (log q, log p*) of all completions, (P, X), summed over prompts."""
    truth = Truth(posterior)
    log_q = guide.token_log_probs(posterior.prompt_ids, truth.sequences).sum(dim=2)
    divergence(log_q, torch.as_tensor(truth.log_posterior)).sum().backward()
    assert guide.logits.grad is not None
    found = guide.logits.grad.numpy().ravel().copy()
    guide.logits.grad = None
    return found


DIVERGENCES = {
    "elbo": (ELBO(), lambda q, p: q.exp() * (q - p)),
    "log_variance": (LogVariance(), lambda q, p: q.exp() * (q - p)),
    "forward_kl": (ForwardKL(), lambda q, p: p.exp() * (p - q)),
    "js": (
        JS(),
        lambda q, p: 0.5 * (q.exp() * q + p.exp() * p) - (q.exp() + p.exp()) / 2 * ((q.exp() + p.exp()) / 2).log(),
    ),
    "tv": (TV(), lambda q, p: 0.5 * (q.exp() - p.exp()).abs()),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_objective_has_its_enumerated_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, guide = problem()
    objective, divergence = DIVERGENCES[name]
    exact, truth = enumerated(posterior, guide, divergence), Truth(posterior)
    monkeypatch.setattr(
        ScoreELBO,
        "follow_evidence",
        lambda self, chosen, log_w: self.log_evidence.update({0: float(truth.log_evidence[0])}),
    )
    num_particles = 2000 if name == "forward_kl" else 100  # its bias is of order 1 / N
    runs = ENGINE.gradients(posterior, guide, ScoreELBO(num_particles, objective), 100)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    assert t_square_p(1.25 * runs, exact, num_directions=6) < 0.005
    assert np.linalg.norm(exact) > 0.01


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"tv"}))
def test_each_objective_ends_at_the_posterior(name: str) -> None:
    base = random_posterior(51, num_tokens=3)
    posterior = bk.Posterior(full_table(base.prior, 3), base.likelihood, prompts=[[]], max_new_tokens=3)  # type: ignore[arg-type]
    truth = Truth(posterior)
    fit = bk.SVI(150, 128, objective=name).fit(posterior, seed=0)
    assert truth.kl(fit.guide)[0] < 0.03 * truth.kl(posterior.prior)[0]


def test_total_variation_falls() -> None:
    base = random_posterior(51, num_tokens=3)
    posterior = bk.Posterior(full_table(base.prior, 3), base.likelihood, prompts=[[]], max_new_tokens=3)  # type: ignore[arg-type]
    truth = Truth(posterior)

    def distance(lm: Any) -> float:
        log_q = np.asarray(lm.token_log_probs(posterior.prompt_ids, truth.sequences)).sum(axis=2)
        return float(np.abs(np.exp(log_q) - truth.p).sum() / 2)

    fit = bk.SVI(150, 128, objective="tv").fit(posterior, seed=0)
    assert distance(fit.guide) < 0.15 * distance(posterior.prior)


def test_replay_has_the_gradient_of_the_variance_over_all_draws() -> None:
    """A step with earlier draws: half the variance of log w over both, differentiated by torch."""
    posterior, guide = problem(prompts=((0,), (1,)))
    loss = ScoreELBO(6, LogVariance(replay=10))
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, program = pyro_model(posterior), pyro_guide(posterior, guide)
        for _ in range(3):
            assert loss.replay is not None
            earlier = loss.replay.of([0, 1])
            guide.logits.grad = None
            loss.loss_and_grads(model, program)
            found = guide.logits.grad.clone()
        assert earlier is not None
        latest = loss.replay.of([0, 1])
        assert latest is not None
        tokens = np.concatenate([earlier[0], latest[0][:, -6:]], axis=1)
        lengths = np.concatenate([earlier[1], latest[1][:, -6:]], axis=1)
        sequences = bk.Sequences(tokens, lengths)
        joint = torch.as_tensor(posterior.log_joint(sequences))
        guide.logits.grad = None
        log_w = joint - guide.token_log_probs(posterior.prompt_ids, sequences).sum(dim=2)
        (log_w.var(dim=1) / 2).sum().backward()
        torch.testing.assert_close(guide.logits.grad, found, atol=1e-9, rtol=1e-6)
        assert earlier[0].shape[1] == 10


# --- critics ----------------------------------------------------------------------------------------------------


def any_value(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """A twist that is far from any truth."""
    return np.cos(prefixes.sum(axis=1) + 2.0 * prefixes.shape[1]) * 2.0 - 0.7


@pytest.mark.parametrize("kind", ["any twist", "rewards of prefixes"])
def test_with_lambda_1_the_gradient_is_the_elbos_whatever_the_critic(kind: str) -> None:
    posterior, guide = problem()
    exact = enumerated(posterior, guide, DIVERGENCES["elbo"][1])
    critic: Any = TwistCritic(any_value, posterior) if kind == "any twist" else PrefixRewardCritic(posterior, 0)
    runs = ENGINE.gradients(posterior, guide, ScoreELBO(50, ELBO(), critic, 1.0), 200)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    assert t_square_p(1.25 * runs, exact, num_directions=6) < 0.005


def test_the_soft_value_of_the_guide_makes_every_lambda_unbiased() -> None:
    """V = E_q[log w | prefix] by enumeration; and another V is biased at lambda = 0.5, so the test bites."""
    posterior, guide = problem()
    truth = Truth(posterior)
    log_q = guide.token_log_probs(posterior.prompt_ids, truth.sequences).detach().numpy()[0]
    log_p = np.asarray(posterior.prior.token_log_probs(posterior.prompt_ids, truth.sequences))[0]
    likelihood = posterior.log_likelihood(truth.sequences)[0]
    to_come = likelihood[:, None] - (log_q - log_p)[:, ::-1].cumsum(axis=1)[:, ::-1]
    mass = np.exp(log_q.sum(axis=1))

    def soft_value(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        t, values = prefixes.shape[1], []
        for prefix in prefixes.tolist():
            inside = [n for n, x in enumerate(truth.xs) if x[:t] == prefix and len(x) > t]
            values.append(np.average(to_come[inside, t], weights=mass[inside]))
        return np.array(values)

    exact = enumerated(posterior, guide, DIVERGENCES["elbo"][1])
    runs = ENGINE.gradients(posterior, guide, ScoreELBO(50, ELBO(), TwistCritic(soft_value, posterior), 0.5), 200)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    wrong = ENGINE.gradients(posterior, guide, ScoreELBO(50, ELBO(), TwistCritic(any_value, posterior), 0.5), 200)
    assert t_square_p(wrong, exact, num_directions=6) < 0.001


def test_advantages_are_sums_of_temporal_differences() -> None:
    rng = np.random.default_rng(0)
    values, ratio, likelihood = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.normal(size=5)
    lengths = np.array([4, 3, 2, 1, 4])
    for discount in (0.0, 0.6, 1.0):
        found = advantages(values, ratio, likelihood, lengths, discount)
        for n, length in enumerate(lengths):
            after = [*values[n, 1:length], likelihood[n]]
            delta = [after[t] - values[n, t] - ratio[n, t] for t in range(length)]
            expected = [sum(discount**k * delta[t + k] for k in range(length - t)) for t in range(length)]
            np.testing.assert_allclose(found[n, :length], expected)
            assert (found[n, length:] == 0).all()


def test_rewards_of_prefixes_are_those_of_completions_cut_there() -> None:
    posterior, _ = problem(prompts=((0,), (1,)))
    draws = bk.ImportanceSampling(8).run(posterior, seed=0)
    rows = Rows(np.repeat([0, 1], 8), draws.tokens.reshape(-1, 3), draws.lengths.reshape(-1))
    found = prefix_log_likelihoods(posterior, rows)
    for n, t in np.ndindex(*found.shape):
        if t == 0 or t >= rows.lengths[n]:
            assert np.isnan(found[n, t])
        else:
            padded = np.where(np.arange(3) < t, rows.tokens[n], posterior.pad_token)[None]
            reward = posterior.reward_of_rows(padded, np.array([t]), rows.prompt_index[n : n + 1])
            assert found[n, t] == posterior.likelihood.log_likelihood(reward)[0]


def test_a_critic_lowers_the_variance_where_the_reward_accrues_token_by_token() -> None:
    prior = full_table(bk.NgramLM(np.log(np.full((4, 4), 0.25)), eos_token_id=3), 2)
    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.5)
    posterior = bk.Posterior(prior, ones, max_new_tokens=8)
    guide = TableLM(prior)
    plain = ENGINE.gradients(posterior, guide, ScoreELBO(32, ELBO()), 60)
    critic = PrefixRewardCritic(posterior, 0)
    with_critic = ENGINE.gradients(posterior, guide, ScoreELBO(32, ELBO(), critic, 1.0), 60)
    assert with_critic.var(axis=0).sum() < 0.5 * plain.var(axis=0).sum()


# --- one gradient, whatever the split -----------------------------------------------------------------------------


@pytest.mark.parametrize("critic", [False, True])
def test_particles_per_pass_gives_the_same_gradient(critic: bool) -> None:
    posterior, guide = problem(prompts=((0,), (1, 0)))

    def gradient(per_pass: int | None) -> np.ndarray:
        made = PrefixRewardCritic(posterior, 0) if critic else None
        return ENGINE.gradients(posterior, guide, ScoreELBO(10, ELBO(), made, 0.9, per_pass), 2)

    whole = gradient(None)
    for per_pass in (1, 3, 10):
        np.testing.assert_allclose(gradient(per_pass), whole, atol=1e-12)


def test_the_elbos_scores_are_leave_one_out() -> None:
    posterior, guide = problem(prompts=((0,), (1,)))
    ours = ENGINE.gradients(posterior, guide, ScoreELBO(10, ELBO()), 3)
    np.testing.assert_allclose(ours, ENGINE.gradients(posterior, guide, LeaveOneOutELBO(10), 3), atol=1e-12)


# --- options --------------------------------------------------------------------------------------------------------


def test_names_are_shorthand() -> None:
    assert {name: type(objective_of(name)) for name in OBJECTIVES} == OBJECTIVES
    assert objective_of(LogVariance(replay=5)).replay == 5


@pytest.mark.parametrize(
    "options,message",
    [
        ({"objective": "kl"}, "Unknown objective 'kl'"),
        ({"objective": 3}, "objective is a name"),
        ({"objective": LeaveOneOut()}, "Losses of bk.audit are audited"),
        ({"objective": LogVariance(replay=4), "particles_per_pass": 2}, "leave it out with replay"),
        ({"optimizer": "sgd"}, "Unknown optimizer 'sgd'"),
        ({"objective": "js", "twist": bk.PartialRewardTwist()}, r"critic .* is for objective=\"elbo\""),
        ({"estimator": "rao_blackwell", "twist": bk.PartialRewardTwist()}, "without a critic"),
        ({"discount": 1.5}, "discount"),
        ({"optimizer": "natural", "objective": "js"}, "gradient of its own"),
        ({"optimizer": "natural", "twist": bk.PartialRewardTwist()}, "gradient of its own"),
        ({"optimizer": bk.KLSGD(), "particles_per_pass": -1}, "particles_per_pass"),
        ({"particles_per_pass": 0}, "particles_per_pass"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.SVI(3, **options)


def test_a_twist_that_is_none_is_refused() -> None:
    posterior, _ = problem()
    with pytest.raises(bk.BayesKLRLError, match="twist is a twist or a recipe"):
        bk.SVI(2, 4, twist=3.0).fit(posterior, seed=0)


def test_a_reward_of_whole_completions_only_is_no_obstacle_unless_its_critic_is_asked_for() -> None:
    """A reward that parses what it reads fails on prefixes; the default critic then knows the position alone."""
    posterior, _ = problem()

    def parsed(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        whole = (np.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0] == 2) | (lengths == 3)
        if not whole.all():
            raise ValueError("no end")
        return 1.0 * (tokens == 0).sum(axis=1)

    strict = bk.Posterior(posterior.prior, bk.TokenReward(parsed, alpha=0.6), prompts=[[0]], max_new_tokens=3)
    with pytest.raises(bk.RewardError, match="no end"):
        PrefixRewardCritic(strict, 0)
    critic = PrefixRewardCritic(strict, 0, forgiving=True)
    draws = bk.ImportanceSampling(8).run(strict, seed=0)
    values = critic.values(Rows(np.zeros(8, dtype=int), draws.tokens[0], draws.lengths[0]))
    assert np.isfinite(values).all()
    assert np.ptp(values[:, 1]) == 0


def test_the_default_is_chosen_by_the_size_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.inference.svi.pyro_backend import training
    from tests.helpers.tiny_models import tiny_gpt2

    reward = bk.TokenReward(lambda tokens, lengths: (tokens % 2).mean(axis=1), alpha=0.5)
    posterior = bk.Posterior(bk.TorchLM(tiny_gpt2(6)), reward, prompts=[[1, 2]], max_new_tokens=3)

    def chosen(**options: Any) -> tuple[str, str]:
        made = training.TorchTraining(bk.SVI(3, 4, **options), posterior, 0)
        return type(made.steps).__name__, type(made.critic).__name__

    assert chosen() == ("AdamSteps", "NoneType")
    monkeypatch.setattr(training, "LARGE", 1000)
    assert chosen() == ("MomentumSteps", "PrefixRewardCritic")
    assert chosen(twist="none") == ("MomentumSteps", "NoneType")
    assert chosen(learning_rate=1e-3) == ("AdamSteps", "NoneType")
    assert chosen(objective="js") == ("AdamSteps", "NoneType")
    assert chosen(estimator="rao_blackwell") == ("AdamSteps", "NoneType")
    assert chosen(optimizer="natural") == ("NaturalSteps", "NoneType")
    slow = bk.PartialRewardTwist()
    assert chosen(optimizer="adam", twist=slow) == ("AdamSteps", "PrefixRewardCritic")


def test_a_slow_reward_has_no_critic_by_default_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.inference.svi.pyro_backend import training
    from tests.helpers.tiny_models import tiny_gpt2

    reward = bk.TokenReward(lambda tokens, lengths: (tokens % 2).mean(axis=1), alpha=0.5)
    posterior = bk.Posterior(bk.TorchLM(tiny_gpt2(6)), reward, prompts=[[1, 2]], max_new_tokens=3)
    monkeypatch.setattr(training, "_NO_MATTER", 0.0)
    monkeypatch.setattr(training, "_MOST_OF_PREFIXES", 0.0)
    with pytest.warns(UserWarning, match="Rewards of prefixes would take .* so there is no critic"):
        made = training.TorchTraining(bk.SVI(3, 4, optimizer="kl_sgd"), posterior, 0)
    assert made.critic is None
