"""Resampling schemes: unbiased offspring, their variances, and sums that round badly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bayes_klrl.resampling import RESAMPLING

SCHEMES = sorted(RESAMPLING)

# --- resampling schemes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_offspring_are_unbiased(scheme: str) -> None:
    weights = np.array([0.0, 0.31, 0.02, 0.0, 0.26, 0.17, 0.1, 0.14, 0.0])
    rng = np.random.default_rng(0)
    offspring = np.array([np.bincount(RESAMPLING[scheme](weights, rng), minlength=9) for _ in range(4000)], dtype=float)
    assert (offspring.sum(axis=1) == 9).all()
    assert (offspring[:, weights == 0] == 0).all()
    expected = 9 * weights
    se = offspring.std(axis=0, ddof=1) / np.sqrt(4000)
    positive = weights > 0
    assert (np.abs(offspring.mean(axis=0) - expected)[positive] < 3.5 * se[positive]).all()
    if scheme in ("systematic", "residual"):
        assert (offspring >= np.floor(expected)).all()
    if scheme == "systematic":
        assert (offspring <= np.ceil(expected)).all()


def test_schemes_differ_in_variance_as_they_should() -> None:
    weights = np.random.default_rng(1).dirichlet(np.ones(12))
    values = np.linspace(-1, 1, 12)
    spread = {}
    for name, scheme in RESAMPLING.items():
        rng = np.random.default_rng(2)
        spread[name] = np.std([values[scheme(weights, rng)].mean() for _ in range(2000)])
    assert spread["stratified"] < 0.7 * spread["multinomial"]
    assert spread["systematic"] < 0.7 * spread["multinomial"]
    assert spread["residual"] < spread["multinomial"]


class Fixed:
    """A generator whose uniforms are all the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self, size: int | None = None) -> Any:
        return self.value if size is None else np.full(size, self.value)


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cumulative_sums_that_round_badly(scheme: str, uniform: float) -> None:
    rng: Any = Fixed(uniform)
    tenths = np.full(10, 0.1)  # their running sum ends at 0.9999999999999999
    tiny = np.array([0.0, 1.0 - 1e-16, 1e-300, 0.0])
    one = np.array([0.0, 0.0, 1.0, 0.0])
    thirds = np.array([0.0, 1 / 3, 0.0, 1 / 3, 1 / 3, 0.0])
    for weights in (tenths, tiny, one, thirds):
        ancestors = RESAMPLING[scheme](weights, rng)
        assert ancestors.shape == weights.shape
        assert (weights[ancestors] > 0).all()
    assert (RESAMPLING[scheme](one, rng) == 2).all()
    if scheme != "multinomial" and uniform == 0.5:
        np.testing.assert_array_equal(np.sort(RESAMPLING[scheme](tenths, rng)), np.arange(10))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_and_one_particle(scheme: str) -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(RESAMPLING[scheme](np.ones(1), rng), [0])
    weights = np.full(7, 1 / 7)
    before = weights.copy()
    ancestors = RESAMPLING[scheme](weights, rng)
    np.testing.assert_array_equal(weights, before)
    if scheme in ("stratified", "systematic"):
        np.testing.assert_array_equal(ancestors, np.arange(7))
