"""`bayesian_policy`: Bayes' rule by hand, the mixture as an average of enumerated posteriors, what each policy minimises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import bayes_klrl as bk
from bayes_klrl.gallery.models.beliefs import DrawnWorlds, FiniteBelief
from bayes_klrl.gallery.models.policies import StatelessPolicies
from bayes_klrl.gallery.models.worlds import Grid
from tests.examples.gallery import is_short


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    from bayes_klrl.gallery.decisions import bayesian_policy as module

    return vars(module)


@pytest.fixture(scope="module")
def worlds(example: dict[str, Any]) -> Any:
    return example["Worlds"](2.0)


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(15))


def test_the_belief_is_bayes_rule_by_hand() -> None:
    rewards = np.array([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    belief, squares, observed = FiniteBelief(rewards, 0.7), [0, 2, 2, 1], [0.3, -0.4, 0.9, 1.1]
    belief.see(np.array(squares[:3]), np.array(observed[:3]))
    belief.see(np.array(squares[3:]), np.array(observed[3:]))
    likelihood = [
        np.prod([stats.norm.pdf(y, world[s], 0.7) for s, y in zip(squares, observed, strict=True)]) for world in rewards
    ]
    np.testing.assert_allclose(belief.weights, likelihood / np.sum(likelihood), rtol=1e-12)


def test_posteriors_of_the_worlds_are_those_of_exact(example: dict[str, Any], worlds: Any) -> None:
    for w in (0, 7):
        exact = bk.Exact().run(example["GRID"].posterior(worlds.rewards[w]), seed=0)
        np.testing.assert_array_equal(exact.tokens[0], example["GRID"].all_actions)
        log_posterior = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
        np.testing.assert_allclose(worlds.log_posterior[w], log_posterior[0], atol=1e-10)


def test_regret_counts_the_kl_to_the_prior(example: dict[str, Any], worlds: Any, weights: np.ndarray) -> None:
    """KL(q || p*) = log Z - (E[r] - KL(q || p0)): regret and reward add up to more with the KL."""
    for policy in example["POLICIES"].values():
        log_q = policy(worlds, weights)
        regret, _, reward = example["judged"](log_q, worlds, 3)
        kl_prior = float(np.exp(log_q) @ (log_q - example["LOG_PRIOR"]))
        log_evidence = float(np.log(np.exp(example["LOG_PRIOR"] + worlds.of_walks[3]).sum()))
        assert regret + reward == pytest.approx(log_evidence + kl_prior, abs=1e-9)


def test_the_mixture_is_the_average_of_enumerated_posteriors() -> None:
    """As a `MixtureLM`, as the cut posterior of an `EnsembleReward`, and by summation."""
    grid = Grid(side=2, steps=4)
    belief = FiniteBelief(1.5 * np.eye(4)[1:], 1.0)
    belief.see(np.array([1, 3]), np.array([0.8, 0.1]))
    drawn = DrawnWorlds.of(grid, belief, 20, 0)
    paid = drawn.rewards[:, grid.squares_of(grid.all_actions)].sum(axis=2)
    joint = np.exp(paid) / 4**4
    average = (joint / joint.sum(axis=1, keepdims=True)).mean(axis=0)
    everything = bk.Sequences(grid.all_actions[None], np.full((1, 256), 4))
    log_q = drawn.mixture().token_log_probs([()], everything).sum(axis=2)[0]
    np.testing.assert_allclose(np.exp(log_q), average, atol=1e-12)
    cut = bk.Posterior(grid.prior(), bk.EnsembleReward(drawn, alpha=1.0, num_thetas=20), max_new_tokens=4)
    exact = bk.Exact().run(cut, seed=0)
    np.testing.assert_allclose(np.exp(exact.log_prior + exact.log_likelihood)[0], average, atol=1e-12)
    certificate = bk.certify(cut, drawn.mixture(), seed=0)
    assert np.abs(certificate.reverse_kl).max() < 1e-8


def test_what_each_policy_minimises(example: dict[str, Any], worlds: Any, weights: np.ndarray) -> None:
    """E_w KL(q || p_w) is more than plug-in's by KL(q || plug-in), E_w KL(p_w || q) than the mixture's by KL(mixture || q)."""
    log_p = worlds.log_posterior
    log_q = {name: policy(worlds, weights) for name, policy in example["POLICIES"].items()}
    plug_in, mixture = log_q["plug-in"], log_q["mixture (Thompson)"]
    for name, each in log_q.items():
        assert np.exp(each).sum() == pytest.approx(1, abs=1e-12), name
        reverse = np.exp(each) @ (each - weights @ log_p) - np.exp(plug_in) @ (plug_in - weights @ log_p)
        assert reverse == pytest.approx(float(np.exp(each) @ (each - plug_in)), abs=1e-10)
        forward = weights @ (np.exp(log_p) @ (mixture - each))
        assert forward == pytest.approx(float(np.exp(mixture) @ (mixture - each)), abs=1e-10)
    true = 4
    found = example["judged"](mixture, worlds, true)
    assert found[0] == pytest.approx(float(np.exp(mixture) @ (mixture - log_p[true])), abs=1e-12)
    assert found[1] == pytest.approx(float(np.exp(log_p[true]) @ (log_p[true] - mixture)), abs=1e-12)


def test_plug_in_joint_and_per_token_by_their_definitions(
    example: dict[str, Any], worlds: Any, weights: np.ndarray
) -> None:
    grid = example["GRID"]
    exact = bk.Exact().run(grid.posterior(weights @ worlds.rewards), seed=0)
    plug_in = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
    np.testing.assert_allclose(worlds.plug_in(weights), plug_in[0], atol=1e-10)
    favoured = weights * np.exp(worlds.of_walks).T.mean(axis=0)  # w times the evidence of each world
    by_hand = np.log(np.exp(worlds.log_posterior).T @ (favoured / favoured.sum()))
    np.testing.assert_allclose(worlds.joint(weights), by_hand, atol=1e-10)
    walk = [3, 3, 1, 0, 2, 1]
    models = [grid.policy(each) for each in worlds.rewards]
    states = [model.prefill([()]) for model in models]
    total = 0.0
    for action in walk:
        probs = [np.exp(model.next_log_probs(state))[0, action] for model, state in zip(models, states, strict=True)]
        total += np.log(weights @ probs)
        states = [model.append(state, np.array([action])) for model, state in zip(models, states, strict=True)]
    index = int((grid.all_actions == walk).all(axis=1).argmax())
    assert worlds.per_token(weights)[index] == pytest.approx(total, abs=1e-10)


def test_one_world_drawn_for_each_walk_is_the_mixture(
    example: dict[str, Any], worlds: Any, weights: np.ndarray
) -> None:
    """Thompson sampling: the frequencies of where walks end, against those of the mixture."""
    grid, rng, num = example["GRID"], np.random.default_rng(1), 2500
    tables = grid.log_policy(worlds.rewards)
    ends = [grid.walk(tables[w], rng)[-1] for w in rng.choice(15, size=num, p=weights)]
    expected = np.bincount(example["SQUARES"][:, -1], weights=np.exp(worlds.mixture(weights)), minlength=16) * num
    z = (np.bincount(ends, minlength=16) - expected) / np.sqrt(np.maximum(expected * (1 - expected / num), 1e-9))
    possible = expected > 5
    assert possible.sum() > 8
    assert np.abs(z[possible]).max() < 4


@pytest.fixture(scope="module")
def stateless() -> StatelessPolicies:
    return StatelessPolicies(
        Grid(side=3, steps=4), np.random.default_rng(3).normal(size=9), weight=3.0, prior_scale=0.8
    )


def test_stateless_policies_against_enumeration(stateless: StatelessPolicies) -> None:
    """ELBO of one policy over all 256 walks; the distribution over policies against prior draws of the logits."""
    grid, rng = stateless.grid, np.random.default_rng(4)
    phi = rng.normal(size=4)
    log_move = phi - np.log(np.exp(phi).sum())
    log_q = log_move[grid.all_actions].sum(axis=1)
    paid = stateless.rewards[grid.squares_of(grid.all_actions)].sum(axis=1)
    by_hand = np.exp(log_q) @ (paid - grid.steps * np.log(4) - log_q)
    assert stateless.elbo(phi[None])[0] == pytest.approx(float(by_hand), abs=1e-12)
    draws = stateless.prior_scale * rng.normal(size=(15_000, 4))
    mass = np.exp(stateless.weight * stateless.elbo(draws))
    z = (mass.mean() - np.exp(stateless.log_normaliser())) / (mass.std() / np.sqrt(len(mass)))
    assert abs(z) < 4
    reward, _ = stateless.reward_and_entropy(draws)
    mean = stateless.truth()["E[r] (nats)"]
    error = np.std(mass * (reward - mean)) / mass.mean() / np.sqrt(len(mass))
    assert abs((mass @ reward / mass.sum() - mean) / error) < 4


def test_the_distance_of_a_gaussian_over_policies(stateless: StatelessPolicies) -> None:
    """For the prior itself it is log E[exp(n ELBO)] - n E[ELBO], and the summary's information is that of its mixture."""
    scale = stateless.prior_scale
    found = stateless.of_gaussian(np.zeros(4), np.full(4, scale), seed=5)
    draws = scale * np.random.default_rng(6).normal(size=(20_000, 4))
    elbo = stateless.weight * stateless.elbo(draws)
    distance = stateless.log_normaliser() - elbo.mean()
    error = elbo.std() * np.sqrt(1 / 20_000 + 1 / 20_000)
    assert abs(found["KL to the exact distribution (nats)"] - distance) < 4 * error
    pair = np.array([[1.0, 0, 0, 0], [0, 0, 2.0, 0]])
    log_move = pair - np.log(np.exp(pair).sum(axis=1, keepdims=True))
    q = np.exp(log_move[:, stateless.grid.all_actions].sum(axis=2))
    information = (0.5 * q * np.log(q / q.mean(axis=0))).sum()
    told = stateless.summary(pair, np.array([0.5, 0.5]))
    assert told["I(policy; walk) (nats)"] == pytest.approx(float(information), abs=1e-12)


@pytest.mark.slow
def test_the_example_ends_in_a_report(example: dict[str, Any], tmp_path: Path) -> None:
    found = example["main"](tmp_path / "out", num_agents=4, num_walks=3, num_steps=20)
    page = found.report.read_text(encoding="utf-8")
    assert page.count("<figure>") >= 3
    assert "0.00 nats from the posterior at alpha 1" in page
    assert found.numbers["policies, Gaussian: KL to the exact distribution (nats)"] > 0
    assert is_short(found)
    assert all(np.isfinite(value) for value in found.numbers.values())
