"""Objectives and critics: gradients against enumeration, optima, one gradient whatever the split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.objectives import ELBO, JS, OBJECTIVES, TV, ForwardKL, LogVariance, objective_of
from bayes_klrl.inference.svi.objectives.critics import Rows, TwistCritic, advantages
from bayes_klrl.inference.svi.objectives.regressions import (
    HiddenStateCritic,
    PrefixRewardCritic,
    critic_of,
    prefix_log_likelihoods,
)
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.inference.svi.pyro_backend.scores import ScoreELBO
from bayes_klrl.models.programs.pyro_program import pyro_guide, pyro_model
from bayes_klrl.models.torch_lm.table import TableLM
from tests.helpers.truth import Truth, full_table, random_posterior, t_square_p
from tests.inference.svi import engines
from tests.inference.svi.engines import ENGINES, Engine

ENGINE = ENGINES["pyro"]


def problem(prompts: Any = ((0,),)) -> tuple[bk.Posterior, TableLM]:
    """Fifteen completions, a lopsided reward, a guide away from prior and posterior."""
    posterior = random_posterior(10, vocab_size=3, eos=(2,), num_tokens=3, prompts=prompts, alpha=0.6)
    return posterior, TableLM(full_table(posterior.prior, 4, noise=0.6, seed=1))  # type: ignore[arg-type]


def js(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    middle = (q.exp() + p.exp()) / 2
    return 0.5 * (q.exp() * q + p.exp() * p) - middle * middle.log()


DIVERGENCES: dict[str, tuple[Any, Any]] = {
    "elbo": (ELBO(), lambda q, p: q.exp() * (q - p)),
    "log_variance": (LogVariance(), lambda q, p: q.exp() * (q - p)),
    "forward_kl": (ForwardKL(), lambda q, p: p.exp() * (p - q)),
    "js": (JS(), js),
    "tv": (TV(), lambda q, p: 0.5 * abs(q.exp() - p.exp())),
}
"""Objectives, and what they minimise: functions of (log q, log p*), each (P, all completions)."""


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Pyro or NumPyro."""
    return ENGINES[request.param]


AT_LEISURE = pytest.mark.parametrize("engine", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)], indirect=True)


def on_engine(engine: Engine, posterior: bk.Posterior) -> bk.Posterior:
    """The posterior with its table on the engine, the reward called on the host."""
    reward: Any = posterior.likelihood
    called = bk.TokenReward(reward.fn, alpha=reward.alpha, callback=True)
    prior = engine.prior(posterior.prior)  # type: ignore[arg-type]
    prompts = [list(ids) for ids in posterior.prompt_ids]
    return bk.Posterior(prior, called, prompts=prompts, max_new_tokens=posterior.max_new_tokens)


def sampled(
    engine: Engine, name: str, num_particles: int, prompts: Any = ((0,),), **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Fifty gradients of an objective whose log Z-hat is log Z, and the enumerated gradient of what it minimises."""
    base, _ = problem(prompts)
    posterior = on_engine(engine, base)
    guide = engine.guide(full_table(base.prior, 4, noise=0.6, seed=1))  # type: ignore[arg-type]
    log_evidence = Truth(posterior).log_evidence
    objective, divergence = DIVERGENCES[name]

    def value(exp: Any, log_q: Any, log_p: Any, log_lik: Any) -> Any:
        return divergence(log_q, log_p + log_lik - torch.as_tensor(log_evidence[:, None])).sum()

    exact = engines.enumerated(engine, posterior, guide, value)
    return engine.gradients(
        posterior, guide, engine.scores(num_particles, objective, log_evidence), 50, **options
    ), exact


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_objective_has_its_enumerated_gradient(name: str, engine: Engine) -> None:
    num_particles = 4000 if name == "forward_kl" else 200  # its bias is of order 1 / N
    runs, exact = sampled(engine, name, num_particles)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    assert t_square_p(1.25 * runs, exact, num_directions=6) < 0.005
    assert np.linalg.norm(exact) > 0.01


@AT_LEISURE
def test_a_subsample_of_prompts_is_scaled_up_and_has_the_evidence_of_its_own_prompts(engine: Engine) -> None:
    runs, exact = sampled(engine, "js", 400, prompts=((0,), (1,), (1, 0)), prompts_per_step=2)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    assert t_square_p(1.25 * runs, exact, num_directions=6) < 0.005


def enumerable(engine: Engine) -> bk.Posterior:
    """Forty completions, 1.27 nats from prior to posterior, every prefix a row of the table."""
    base = random_posterior(51, num_tokens=3)
    table = bk.Posterior(full_table(base.prior, 3), base.likelihood, prompts=[[]], max_new_tokens=3)  # type: ignore[arg-type]
    return on_engine(engine, table)


@pytest.mark.slow
@AT_LEISURE
@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"elbo", "tv"}))
def test_each_objective_ends_at_the_posterior(name: str, engine: Engine) -> None:
    """The ELBO's does in `test_svi.py`."""
    posterior = enumerable(engine)
    truth = Truth(posterior)
    fit = bk.SVI(150, 128, learning_rate=0.1, objective=name).fit(posterior, seed=0)
    assert truth.kl(fit.guide)[0] < 0.03 * truth.kl(posterior.prior)[0]


@pytest.mark.slow
@AT_LEISURE
def test_total_variation_falls(engine: Engine) -> None:
    posterior = enumerable(engine)
    truth = Truth(posterior)

    def distance(lm: Any) -> float:
        log_q = np.asarray(lm.token_log_probs(posterior.prompt_ids, truth.sequences)).sum(axis=2)
        return float(np.abs(np.exp(log_q) - truth.p).sum() / 2)

    fit = bk.SVI(150, 128, learning_rate=0.1, objective="tv").fit(posterior, seed=0)
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


@pytest.mark.slow
def test_replay_starts_from_draws_of_another_method_and_of_this_prior_alone() -> None:
    posterior, _ = problem([(0,), (1,)])
    draws = bk.SMC(32).run(posterior, seed=0)
    svi = bk.SVI(60, 8, objective=bk.LogVariance(replay=draws))
    fit, plain = svi.fit(posterior, seed=0), bk.SVI(60, 8, objective="log_variance").fit(posterior, seed=0)
    assert fit.history["elbo"][-20:].mean() > plain.history["elbo"][-20:].mean()
    other = random_posterior(11, vocab_size=3, eos=(2,), num_tokens=3, prompts=[(0,), (1,)], alpha=0.6)
    with pytest.raises(bk.BayesKLRLError, match="of another prior, or of other prompts"):
        svi.fit(other, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="are of 2 prompts, the posterior has 1"):
        svi.fit(problem()[0], seed=0)


def test_rewards_of_earlier_draws_count_at_the_present_alpha() -> None:
    """At another alpha a draw has another log-weight, but the same log p0 and reward."""
    posterior, guide = problem([(0,), (1,)])
    alphas = [posterior.alpha, 0.2]
    now = [0]
    loss = ScoreELBO(6, LogVariance(replay=6), alpha=lambda: alphas[now[0]])
    model, program = pyro_model(posterior), pyro_guide(posterior, guide)
    torch.manual_seed(0)
    loss.differentiable_loss(model, program)
    assert loss.replay is not None
    tokens, lengths, _, reward = loss.replay.of([0, 1])  # type: ignore[misc]
    np.testing.assert_allclose(reward, posterior.reward(bk.Sequences(tokens, lengths)))
    now[0] = 1
    colder = posterior.at_alpha(0.2)
    loss.differentiable_loss(pyro_model(colder), program)
    again = guide.token_log_probs(posterior.prompt_ids, bk.Sequences(tokens, lengths)).sum(dim=2).detach().numpy()
    log_w = colder.log_joint(bk.Sequences(tokens, lengths)) - again
    whole = np.concatenate([loss.last.log_weights.numpy(), log_w.T])
    weights = LogVariance().weights(torch.as_tensor(whole), torch.zeros(0), torch)
    np.testing.assert_allclose(loss.last.surrogate.detach().numpy()[6:], (weights.numpy()[6:] * again.T), atol=1e-6)


# --- critics ----------------------------------------------------------------------------------------------------


def any_value(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """A twist that is far from any truth."""
    return np.cos(prefixes.sum(axis=1) + 2.0 * prefixes.shape[1]) * 2.0 - 0.7


@pytest.mark.parametrize("kind", ["any twist", "rewards of prefixes"])
def test_with_lambda_1_the_gradient_is_the_elbos_whatever_the_critic(kind: str) -> None:
    posterior, guide = problem()
    exact = engines.enumerated(ENGINE, posterior, guide)
    critic: Any = TwistCritic(any_value, posterior) if kind == "any twist" else PrefixRewardCritic(posterior, 0)
    runs = ENGINE.gradients(posterior, guide, ScoreELBO(200, ELBO(), critic, 1.0), 50)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    assert t_square_p(1.25 * runs, exact, num_directions=6) < 0.005


@pytest.mark.slow
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

    exact = engines.enumerated(ENGINE, posterior, guide)
    runs = ENGINE.gradients(posterior, guide, ScoreELBO(200, ELBO(), TwistCritic(soft_value, posterior), 0.5), 50)
    assert t_square_p(runs, exact, num_directions=6) > 0.005
    wrong = ENGINE.gradients(posterior, guide, ScoreELBO(200, ELBO(), TwistCritic(any_value, posterior), 0.5), 50)
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


@pytest.mark.slow
def test_a_critic_lowers_the_variance_where_the_reward_accrues_token_by_token() -> None:
    prior = full_table(bk.NgramLM(np.log(np.full((4, 4), 0.25)), eos_token_id=3), 2)
    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.5)
    posterior = bk.Posterior(prior, ones, max_new_tokens=8)
    guide = TableLM(prior)
    plain = ENGINE.gradients(posterior, guide, ScoreELBO(32, ELBO()), 60)
    critic = PrefixRewardCritic(posterior, 0)
    with_critic = ENGINE.gradients(posterior, guide, ScoreELBO(32, ELBO(), critic, 1.0), 60)
    assert with_critic.var(axis=0).sum() < 0.5 * plain.var(axis=0).sum()


@pytest.mark.parametrize("options", [{"optimizer": "kl_sgd"}, {"twist": bk.PartialRewardTwist()}], ids=str)
def test_a_constant_in_the_reward_changes_no_step_of_a_critic(options: dict[str, Any]) -> None:
    """The regression's penalty drew V to 0, so that 1,000 more of reward were another critic."""

    def history(constant: float) -> dict[str, np.ndarray]:
        base = random_posterior(51, vocab_size=4, num_tokens=4, prompts=[(0,), (1,)])
        reward: Any = base.likelihood

        def more(tokens: np.ndarray, lengths: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
            return np.asarray(reward.fn(tokens, lengths, prompt_index)) + constant

        moved = bk.TokenReward(more, alpha=0.5)
        posterior = bk.Posterior(full_table(base.prior, 5), moved, prompts=[[0], [1]], max_new_tokens=4)  # type: ignore[arg-type]
        return dict(bk.SVI(20, 32, **options).fit(posterior, seed=0).history)

    plain, shifted = history(0.0), history(1000.0)
    np.testing.assert_allclose(shifted["elbo"] - 1000 / 0.5, plain["elbo"], atol=1e-4)
    np.testing.assert_allclose(shifted["kl"], plain["kl"], atol=1e-4)
    assert plain["kl"][-1] > 0.1


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
        ({"objective": 3.0}, "or a loss as bk.audit takes it"),
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


def tiny_target(**options: Any) -> bk.Posterior:
    """A transformer of six tokens; the reward counts ones, which its hidden states know nothing of before training."""
    from tests.helpers.tiny_models import tiny_gpt2

    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.4)
    return bk.Posterior(bk.TorchLM(tiny_gpt2(6)), ones, prompts=[[1, 2], [3]], max_new_tokens=3, **options)


def parameter_gradients(guide: bk.TorchLM) -> np.ndarray:
    """All gradients in one vector, which are then forgotten."""
    found = np.concatenate([p.grad.double().numpy().ravel() for p in guide.parameters() if p.grad is not None])
    for parameter in guide.parameters():
        parameter.grad = None
    return found


@pytest.mark.slow
def test_a_head_on_hidden_states_leaves_the_gradient_unbiased_and_lowers_its_variance() -> None:
    posterior = tiny_target()
    truth, guide = Truth(posterior), posterior.prior.copy()  # type: ignore[attr-defined]
    log_q = guide.token_log_probs(posterior.prompt_ids, truth.sequences).double().sum(dim=2)
    (log_q.exp() * (log_q - torch.as_tensor(truth.log_posterior))).sum().backward()
    exact = parameter_gradients(guide)
    model, program = pyro_model(posterior), pyro_guide(posterior, guide)
    variances = []
    for critic in (None, HiddenStateCritic(posterior, 0)):
        torch.manual_seed(0)
        loss, runs = ScoreELBO(64, ELBO(), critic, 1.0), []
        for _ in range(60):
            loss.loss_and_grads(model, program)
            runs.append(parameter_gradients(guide))
        assert t_square_p(np.stack(runs), exact, num_directions=4) > 0.005
        variances.append(float(np.stack(runs).var(axis=0).sum()))
    assert t_square_p(1.5 * np.stack(runs), exact, num_directions=4) < 0.005
    assert variances[1] < 0.7 * variances[0]


def test_wide_hidden_states_are_projected_and_a_table_has_none() -> None:
    posterior = tiny_target()
    narrow, whole = HiddenStateCritic(posterior, 0, width=5), HiddenStateCritic(posterior, 0)
    draws = bk.ImportanceSampling(4).run(posterior, seed=0)
    rows = Rows(np.repeat([0, 1], 4), draws.tokens.reshape(8, 3), draws.lengths.ravel())
    assert narrow.read(rows).shape == (8, 3, 5)
    assert whole.read(rows).shape[2] > 5
    inside = whole.read(rows)[:, 0]
    np.testing.assert_allclose(inside[:4], np.broadcast_to(inside[0], inside[:4].shape))  # the prompt's own
    assert np.abs(inside[0] - inside[4]).max() > 0.1
    with pytest.raises(bk.BayesKLRLError, match=r"hidden states of a bk.TorchLM"):
        critic_of("hidden_states", problem()[0], 0)


def test_a_slow_reward_has_no_critic_by_default_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.inference.svi.pyro_backend import training
    from tests.helpers.tiny_models import tiny_gpt2

    reward = bk.TokenReward(lambda tokens, lengths: (tokens % 2).mean(axis=1), alpha=0.5)
    posterior = bk.Posterior(bk.TorchLM(tiny_gpt2(6)), reward, prompts=[[1, 2]], max_new_tokens=3)
    monkeypatch.setattr(training, "_NO_MATTER", 0.0)
    monkeypatch.setattr(training, "_MOST_OF_PREFIXES", 0.0)
    with pytest.warns(UserWarning, match=r"Rewards of prefixes would take .* so there is no critic"):
        made = training.TorchTraining(bk.SVI(3, 4, optimizer="kl_sgd"), posterior, 0)
    assert made.critic is None
