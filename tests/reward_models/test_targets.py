"""Plug-in, joint and cut posteriors of an uncertain reward, against enumeration; who is moved by a shift (theory.md 9.30)."""

from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.problems import gold_posterior
from bayes_klrl.reward_models.targets import Target, reward_target_weights
from tests.helpers.truth import Truth, z_score

TRUTH = Truth(gold_posterior())
P0 = np.exp(TRUTH.log_prior[0])
ALPHA = 0.7
RNG = np.random.default_rng(0)
MEMBERS = TRUTH.reward[0] + RNG.standard_normal((5, 1)) * TRUTH.sequences.tokens[0, :, 0] / 2


def enumerated(target: str, rewards: np.ndarray) -> np.ndarray:
    """The three definitions, straight from their formulas."""
    tilted = P0 * np.exp(rewards / ALPHA)
    if target == "cut":
        return (tilted / tilted.sum(axis=1, keepdims=True)).mean(axis=0)
    p = tilted.mean(axis=0) if target == "joint" else P0 * np.exp(rewards.mean(axis=0) / ALPHA)
    return np.asarray(p / p.sum())


def weights(target: Target, rewards: np.ndarray) -> np.ndarray:
    """Of all completions there are, the prior as their log-weights."""
    return reward_target_weights(rewards, alpha=ALPHA, target=target, log_weights=TRUTH.log_prior[0])


@pytest.mark.parametrize("target", ["cut", "joint", "plug-in"])
def test_each_target_is_its_definition(target: Target) -> None:
    np.testing.assert_allclose(weights(target, MEMBERS), enumerated(target, MEMBERS), atol=1e-14)


def test_a_shift_of_a_member_moves_the_joint_posterior_alone() -> None:
    shifted = MEMBERS + np.array([[0.0], [1.0], [0.0], [-2.0], [0.5]])
    moved = {
        name: 0.5 * np.abs(weights(name, shifted) - weights(name, MEMBERS)).sum()
        for name in ("cut", "joint", "plug-in")  # type: ignore[misc]
    }
    assert moved["cut"] < 1e-14
    assert moved["plug-in"] < 1e-14
    assert moved["joint"] > 0.02


def test_anchored_at_equal_evidence_the_joint_posterior_is_the_cut_one() -> None:
    log_z = np.log((P0 * np.exp(MEMBERS / ALPHA)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(weights("joint", MEMBERS - ALPHA * log_z), weights("cut", MEMBERS), atol=1e-14)


def test_one_member_is_no_uncertainty() -> None:
    for target in ("cut", "joint", "plug-in"):
        np.testing.assert_allclose(weights(target, MEMBERS[:1]), weights("cut", MEMBERS[:1]), atol=1e-14)  # type: ignore[arg-type]


def test_a_pool_of_draws_estimates_the_cut_posterior() -> None:
    """E[f] by self-normalised weights of prior draws; the bias of order 1 / N is far below the error of 200 pools."""
    f = TRUTH.sequences.lengths[0] == TRUTH.posterior.max_new_tokens
    truth = float(enumerated("cut", MEMBERS) @ f)
    estimates = []
    for seed in range(200):
        drawn = np.random.default_rng(seed).choice(P0.size, size=4000, p=P0 / P0.sum())
        estimates.append(reward_target_weights(MEMBERS[:, drawn], alpha=ALPHA) @ f[drawn])
    assert abs(z_score(np.array(estimates), truth)) < 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"alpha": 0.0}, "alpha must be a positive"),
        ({"target": "bayes"}, "target must be"),
        ({"rewards": np.zeros(3)}, r"shape \(S, N\)"),
        ({"rewards": np.zeros((0, 3))}, r"shape \(S, N\)"),
        ({"rewards": np.full((1, 3), -np.inf)}, "All log-weights are -inf"),
        ({"rewards": np.full((1, 3), np.nan)}, "finite or -inf"),
        ({"log_weights": np.zeros(4)}, r"shape \(N,\)"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        reward_target_weights(**{"rewards": np.zeros((2, 3)), "alpha": 1.0, **arguments})
