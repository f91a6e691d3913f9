"""`bayesian_value`: gridworlds against enumeration, the Gaussian last layer against kriging, and calibrated intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayes_klrl.gallery.models.beliefs import GaussianBelief
from bayes_klrl.gallery.models.worlds import Grid
from tests.examples.gallery import is_short
from tests.helpers.truth import Truth

SMALL = Grid(side=3, steps=4, start=1)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    from bayes_klrl.gallery.decisions import bayesian_value as module

    return vars(module)


@pytest.fixture(scope="module")
def rewards() -> np.ndarray:
    return np.random.default_rng(0).normal(size=9)


def of_walks(grid: Grid, log_policy: np.ndarray, walks: np.ndarray) -> np.ndarray:
    """log q of walks (N, T) under a policy, action by action."""
    total, at = np.zeros(len(walks)), np.full(len(walks), grid.start)
    for t, action in enumerate(walks.T):
        total += log_policy[t, at, action]
        at = grid.after[at, action]
    return total


def test_a_grid_is_its_enumerated_posterior(rewards: np.ndarray) -> None:
    """Values, policy, distance, E[r] and twist, by sums over all 256 walks."""
    posterior = SMALL.posterior(rewards)
    truth = Truth(posterior)
    walks = truth.sequences.tokens[0]
    squares = SMALL.squares_of(walks)
    np.testing.assert_allclose(rewards[squares].sum(axis=1), truth.reward[0], atol=1e-12)
    assert SMALL.values(rewards)[0, 1] == pytest.approx(truth.log_evidence[0], abs=1e-12)
    np.testing.assert_allclose(of_walks(SMALL, SMALL.log_policy(rewards), walks), truth.log_posterior[0], atol=1e-12)
    other = SMALL.log_policy(rewards[::-1] / 2)
    log_q = of_walks(SMALL, other, walks)
    q = np.exp(log_q)
    assert SMALL.distance(other, rewards) == pytest.approx(float(q @ (log_q - truth.log_posterior[0])), abs=1e-12)
    assert SMALL.expected_reward(other, rewards) == pytest.approx(float(q @ truth.reward[0]), abs=1e-12)
    twist = SMALL.twist(rewards)
    for prefix in ([], [2], [0, 3, 1]):
        log_psi = twist(posterior, np.zeros(1, int), np.array([prefix], dtype=int))[0]
        assert log_psi == pytest.approx(truth.log_psi(0, prefix), abs=1e-12)
    in_bulk = SMALL.values(np.stack([rewards, 2 * rewards]))
    np.testing.assert_allclose(in_bulk[1], SMALL.values(2 * rewards), atol=1e-12)


def test_walks_are_draws_of_the_policy(rewards: np.ndarray) -> None:
    policy, rng = SMALL.log_policy(rewards), np.random.default_rng(1)
    paid = np.array([rewards[SMALL.walk(policy, rng)].sum() for _ in range(2000)])
    z = (paid.mean() - SMALL.expected_reward(policy, rewards)) / (paid.std() / np.sqrt(len(paid)))
    assert abs(z) < 4


def believes(num_members: int = 10) -> tuple[GaussianBelief, np.ndarray, np.ndarray]:
    """A belief that has seen 12 squares, and its mean and covariance by the other formula, conditioning on the data."""
    rng = np.random.default_rng(2)
    features, strength = rng.normal(size=(9, 5)), 1.7
    belief = GaussianBelief(features, strength, np.random.default_rng(3), num_members)
    squares, observed = rng.integers(9, size=(3, 4)), rng.normal(size=(3, 4))
    for s, y in zip(squares, observed, strict=True):
        belief.see(s, y)
    kernel = strength**2 * features @ features.T
    seen, y = squares.ravel(), observed.ravel()
    gain = np.linalg.solve(kernel[np.ix_(seen, seen)] + strength**2 * np.eye(len(seen)), kernel[seen]).T
    return belief, gain @ y, kernel - gain @ kernel[seen]


def test_the_gaussian_last_layer_is_the_closed_form() -> None:
    belief, mean, covariance = believes()
    np.testing.assert_allclose(belief.mean(), mean, atol=1e-10)
    np.testing.assert_allclose(belief.sd(), np.sqrt(np.diag(covariance)), atol=1e-10)


@pytest.mark.parametrize("kind", ["draws", "ensemble"])
def test_draws_and_randomised_priors_have_the_moments_of_the_closed_form(kind: str) -> None:
    """An ensemble of regressions with randomised priors is a sample of the posterior."""
    num = 6000
    belief, mean, covariance = believes(num)
    sample = belief.draws(num) if kind == "draws" else belief.ensemble()
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((sample.mean(axis=0) - mean) / (sd / np.sqrt(num))).max() < 4
    found = np.cov(sample.T)
    error = np.sqrt((covariance**2 + np.outer(sd, sd) ** 2) / num)  # of a covariance of Gaussians
    assert np.abs((found - covariance) / error).max() < 4.5


@pytest.mark.slow
def test_intervals_of_the_values_are_calibrated_in_the_prior_s_worlds(example: dict[str, Any]) -> None:
    """90 % of the exact values lie inside, over worlds; with half of the true scale of the reward, far fewer."""
    grid = example["GRID"]
    inside: dict[float, list[float]] = {1.0: [], 0.5: []}
    for d in range(60):
        rng = np.random.default_rng([5, d])
        rewards = example["smooth_world"](1.0, rng)
        squares = [grid.walk(grid.log_policy(np.zeros(25)), rng) for _ in range(3)]
        observed = [rewards[s] + rng.normal(size=grid.steps) for s in squares]
        for scale, found in inside.items():
            belief = example["nothing_seen"](scale, np.random.default_rng(d))
            for s, y in zip(squares, observed, strict=True):
                belief.see(s, y)
            found.append(example["covered"](belief, rewards)[0])
    z = {scale: (np.mean(found) - 0.9) / (np.std(found) / np.sqrt(60)) for scale, found in inside.items()}
    assert abs(z[1.0]) < 3
    assert z[0.5] < -4


def test_the_regret_of_the_prior_is_its_distance(example: dict[str, Any]) -> None:
    """A rule that never learns has the same regret in every walk, and rules see the same worlds."""
    found = example["study"](example["goal_world"], 2.0, 2, 3, (7,))
    grid = example["GRID"]
    for d in range(2):
        rewards = example["goal_world"](2.0, np.random.default_rng([7, d]))
        uniform = grid.log_policy(np.zeros(25))
        assert found.regret["the prior's walks"][d] == pytest.approx(grid.distance(uniform, rewards))
        assert found.reward["the prior's walks"][d] == pytest.approx(grid.expected_reward(uniform, rewards))
    assert found.regret["mean (Boltzmann)"][:, 0] == pytest.approx(found.regret["the prior's walks"][:, 0])


@pytest.mark.slow
def test_the_example_ends_in_a_report(example: dict[str, Any], tmp_path: Path) -> None:
    found = example["main"](tmp_path / "out", num_worlds=3, num_walks=6)
    page = found.report.read_text(encoding="utf-8")
    assert page.count("<figure>") >= 3
    assert "nats from the posterior at alpha 1" in page
    assert is_short(found)
    assert all(np.isfinite(value) for value in found.numbers.values())
