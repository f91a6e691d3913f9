"""Log-space weights against plain arithmetic, and our PSIS against ArviZ's."""

import importlib.util

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import weights

LOG_WEIGHTS = {
    "plain": [0.3, -1.2, 2.0, 0.0, 0.7],
    "with zeros": [-np.inf, 0.0, -np.inf, 1.5],
    "one draw": [0.7],
    "constant": [2.0, 2.0, 2.0],
}


@pytest.fixture(params=LOG_WEIGHTS)
def log_w(request: pytest.FixtureRequest) -> np.ndarray:
    return np.array(LOG_WEIGHTS[request.param])


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4], ids=["", "huge", "tiny"])
def test_sums_are_those_of_the_weights_at_any_scale(log_w: np.ndarray, shift: float) -> None:
    w = np.exp(log_w)
    assert weights.logsumexp(log_w + shift) == pytest.approx(np.log(w.sum()) + shift, rel=1e-12)
    assert weights.logmeanexp(log_w + shift) == pytest.approx(np.log(w.mean()) + shift, rel=1e-12)
    np.testing.assert_allclose(weights.normalised(log_w + shift), w / w.sum(), rtol=1e-10)
    expected = w.sum() ** 2 / np.square(w).sum()
    assert weights.effective_sample_size(log_w + shift) == pytest.approx(expected, rel=1e-10)


def test_everything_acts_on_the_last_axis() -> None:
    log_w = np.random.default_rng(0).normal(size=(2, 3, 50))
    for function in (
        weights.logsumexp,
        weights.logmeanexp,
        weights.normalised,
        weights.effective_sample_size,
        lambda w: weights.psis(w)[0],
        lambda w: weights.psis(w)[1],
    ):
        rows = [[function(row) for row in block] for block in log_w]
        np.testing.assert_array_equal(function(log_w), rows)


def test_all_weights_0() -> None:
    dead = np.full((2, 3), -np.inf)
    dead[1] = 0.0
    np.testing.assert_array_equal(weights.logsumexp(dead), [-np.inf, np.log(3)])
    np.testing.assert_array_equal(weights.effective_sample_size(dead) > 0, [False, True])
    assert weights.grouped_ess(dead[0], np.arange(3)) == 0
    assert np.isnan(weights.psis(dead)[1][0])
    with pytest.raises(bk.BayesKLRLError, match="All log-weights are -inf"):
        weights.normalised(dead)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["logsumexp", "logmeanexp", "normalised", "effective_sample_size", "psis"])
def test_nan_and_plus_infinity_are_errors_everywhere(name: str, bad: float) -> None:
    with pytest.raises(bk.BayesKLRLError, match=f"got {bad}"):
        getattr(weights, name)([0.0, bad, 1.0])


def test_the_callers_arrays_are_never_written_to() -> None:
    log_w = np.random.default_rng(0).normal(size=(2, 60)) * 3
    log_w[0, :5] = -np.inf
    log_w.setflags(write=False)
    for name in ("logsumexp", "logmeanexp", "normalised", "effective_sample_size"):
        getattr(weights, name)(log_w)
    smoothed, _ = weights.psis(log_w)
    weights.grouped_ess(log_w[0], np.arange(60))
    dead = np.full(60, -np.inf)
    for row in (log_w[0], dead, np.zeros(60)):
        assert not np.shares_memory(weights.psis(row)[0], row)
    assert smoothed.flags.writeable


def test_families_of_one_are_kishs_ess_and_one_family_is_one_draw() -> None:
    log_w = np.random.default_rng(0).normal(size=40)
    kish = float(weights.effective_sample_size(log_w))
    assert weights.grouped_ess(log_w, np.arange(40)) == pytest.approx(kish)
    assert weights.grouped_ess(log_w, np.zeros(40, int)) == pytest.approx(1)
    pairs = np.logaddexp(log_w[0::2], log_w[1::2])
    merged = float(weights.effective_sample_size(pairs))
    assert weights.grouped_ess(log_w, np.arange(40) // 2) == pytest.approx(merged)


@pytest.mark.parametrize("num", [2, 5, 1000])
def test_the_standard_error_without_resampling_is_that_of_a_mean_relative_to_it(num: int) -> None:
    w = np.random.default_rng(num).gamma(1.0, size=num)
    expected = w.std(ddof=1) / np.sqrt(num) / w.mean()
    ess = weights.effective_sample_size(np.log(w))
    assert weights.log_evidence_se(ess, num) == pytest.approx(expected, rel=1e-8)
    formula = np.sqrt((1 / ess - 1 / num) * num / (num - 1))
    assert weights.log_evidence_se(ess, num, 0) == pytest.approx(formula, rel=1e-8)


def test_the_standard_error_with_resampling_is_lee_and_whiteleys() -> None:
    num, families, resampled = 50, 3.5, np.array([0, 1, 7])
    expected = np.sqrt(1 - (num / (num - 1)) ** (resampled + 1) * (1 - 1 / families))
    np.testing.assert_allclose(weights.log_evidence_se(np.full(3, families), num, resampled), expected)


def test_the_standard_error_is_not_0_because_its_estimate_came_out_negative() -> None:
    assert weights.log_evidence_se(25.0, 50, 100) == weights.log_evidence_se(25.0, 50) > 0.1


@pytest.mark.parametrize("ess, num, se", [(10.0, 10, 0.0), (0.0, 10, np.inf), (1.0, 1, np.nan), (1.0, 10, 1.0)])
def test_the_standard_error_at_its_ends(ess: float, num: int, se: float) -> None:
    np.testing.assert_allclose(weights.log_evidence_se(ess, num), se, atol=1e-7)


needs_arviz_0 = pytest.mark.skipif(
    not importlib.util.find_spec("arviz") or bool(importlib.util.find_spec("arviz_stats")),
    reason="psislw is ArviZ 0.x's",
)


@needs_arviz_0
@pytest.mark.parametrize("num", [21, 25, 100, 1001])
@pytest.mark.parametrize("kind", ["light", "heavy", "bounded", "ties"])
def test_psis_is_arvizs(kind: str, num: int) -> None:
    from arviz import psislw

    rng = np.random.default_rng([num, len(kind)])
    log_w = {
        "light": rng.normal(size=num) * 0.3,
        "heavy": 2 * rng.exponential(size=num) - 50,
        "bounded": np.log(rng.beta(2, 1, size=num)) + 7,
        "ties": np.round(rng.exponential(size=num) * 10) / 10,
    }[kind]
    smoothed, k = weights.psis(log_w)
    if np.isnan(k):
        assert kind == "ties"
        assert num < 100
        return
    expected, expected_k = psislw(log_w.copy())
    assert k == pytest.approx(float(expected_k), abs=1e-10)
    if kind == "ties":  # equal weights get unequal quantiles, in whatever order they were sorted
        smoothed, expected = np.sort(smoothed), np.sort(expected)
    np.testing.assert_allclose(smoothed, expected, rtol=0, atol=1e-10)


def test_psis_tells_tails_apart() -> None:
    rng = np.random.default_rng(0)
    for shape in (0.2, 0.5, 0.9):
        log_w = shape * rng.exponential(size=100_000)  # weights are Pareto of that shape
        assert weights.psis(log_w)[1] == pytest.approx(shape, abs=0.1)


def test_psis_leaves_weights_of_0_alone() -> None:
    log_w = np.random.default_rng(0).normal(size=200)
    holes = np.insert(log_w, [0, 7, 150, 200], -np.inf)
    smoothed, k = weights.psis(holes)
    expected, expected_k = weights.psis(log_w)
    assert k == expected_k
    np.testing.assert_array_equal(np.isneginf(smoothed), np.isneginf(holes))
    np.testing.assert_allclose(smoothed[np.isfinite(smoothed)], expected, atol=1e-12)


LEVELS = {
    "constant": (np.full(500, 3.0), -np.inf),
    "constant but for rounding": (np.arange(500) * 1e-16, -np.inf),
    "constant where positive": (np.where(np.arange(500) % 2, 0.0, -np.inf), -np.inf),
    "top level fills the tail": (np.where(np.arange(500) % 3, 0.0, 2.0), -np.inf),
    "two levels": (np.where(np.arange(500) < 3, 9.0, 0.0), np.nan),
    "three levels": (np.where(np.arange(500) < 9, np.arange(500) % 2 + 4.0, 0.0), np.nan),
    "few draws": (np.arange(20.0), np.nan),
    "few draws of positive weight": (np.r_[np.arange(20.0), np.full(500, -np.inf)], np.nan),
}


@pytest.mark.parametrize("case", LEVELS)
def test_psis_neither_fits_nor_smooths_what_has_no_tail(case: str) -> None:
    log_w, expected = LEVELS[case]
    smoothed, k = weights.psis(log_w)
    np.testing.assert_array_equal(k, expected)
    np.testing.assert_allclose(smoothed, log_w - weights.logsumexp(log_w), atol=1e-12)


@pytest.mark.parametrize("log_w", [np.r_[np.zeros(99), 800.0], np.linspace(-1e5, 1e5, 400)])
def test_psis_survives_extreme_weights(log_w: np.ndarray) -> None:
    smoothed, _ = weights.psis(log_w)
    assert weights.logsumexp(smoothed) == pytest.approx(0, abs=1e-9)
    assert (np.diff(smoothed) >= -1e-9).all()
