"""Bayesian reward models: NUTS against quadrature and closed forms, calibrated predictions, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

import bayes_klrl as bk
from bayes_klrl.export.installed_arviz import installed_arviz
from bayes_klrl.problems.preferences import bradley_terry
from bayes_klrl.reward_models import posterior as reward_posterior
from bayes_klrl.reward_models.features import FeatureMap
from bayes_klrl.reward_models.model import diagnosed

pytest.importorskip("numpyro")
TOKENS = bk.NgramLM(np.log(np.full(4, 0.25)), eos_token_id=3)
NUM_TOKENS = 6


def counts(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How often 0 and 1 occur."""
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    return np.stack([((tokens == a) & inside).sum(axis=1) for a in (0, 1)], axis=1)


def zeros(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return counts(tokens, lengths)[:, :1]


def simulated(
    num: int, seed: int, weights: tuple[float, float] | None = None, *, units: tuple[float, float] = (1.0, 1.0)
) -> tuple[bk.Preferences, np.ndarray]:
    """Preferences between completions of uniform tokens, and what the winners' true probabilities were."""
    rng = np.random.default_rng(seed)
    theta = np.asarray(weights) if weights is not None else rng.standard_normal(2)
    pairs: list[tuple[Any, Any]] = []
    probs = []
    while len(pairs) < num:
        tokens = rng.integers(0, 3, size=(2, NUM_TOKENS))
        f = counts(tokens, np.full(2, NUM_TOKENS)) / units
        if (f[0] == f[1]).all():
            continue
        p = 1 / (1 + np.exp(-(f[0] - f[1]) @ theta))
        first = bool(rng.random() < p)
        pairs.append(tuple(tokens.tolist() if first else tokens[::-1].tolist()))
        probs.append(p if first else 1 - p)
    return bk.Preferences([()] * num, [a for a, _ in pairs], [b for _, b in pairs]), np.array(probs)


@pytest.fixture(scope="module")
def fit() -> bk.RewardPosterior:
    return bk.RewardModel(bk.TokenFeatures(counts)).fit(TOKENS, simulated(60, 1, (1.0, -0.5))[0], seed=0)


def on_a_grid(log_density: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of points (G, K) weighted by a density."""
    w = np.exp(log_density - log_density.max())
    w /= w.sum()
    mean = w @ points
    return mean, np.sqrt(w @ np.square(points - mean))


def z_scores(fit: bk.RewardPosterior, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Of means by their MCSE, and of sds by theirs, sd sqrt((kurtosis - 1) / (4 ESS of squares)), ESS taken as bulk's."""
    d = fit.diagnostics
    values = np.stack([*np.moveaxis(fit.draws, 2, 0), *fit.scales.values()]).reshape(len(d.mean), -1)
    kurtosis = stats.kurtosis(values, axis=1, fisher=False)
    ess = np.minimum(d.ess_bulk, d.ess_tail)
    return np.concatenate([(d.mean - mean) / d.mcse, (d.sd - sd) / (sd * np.sqrt((kurtosis - 1) / (4 * ess)))])


def by_quadrature(fit: bk.RewardPosterior, prior_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of two weights."""
    grid = np.linspace(-4, 5, 361)
    points = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    log_prior = -0.5 * np.square(points / prior_scale).sum(axis=1)
    return on_a_grid(log_prior - np.logaddexp(0, -(points @ fit.design.T)).sum(axis=1), points)


@pytest.mark.slow
def test_two_weights_are_those_of_quadrature(fit: bk.RewardPosterior) -> None:
    assert np.abs(z_scores(fit, *by_quadrature(fit, 1.0))).max() < 4
    # the standardised features are the raw ones' own: a pair's difference by hand
    first = simulated(60, 1, (1.0, -0.5))[0]
    raw = counts(np.array([first.chosen[0], first.rejected[0]]), np.full(2, NUM_TOKENS))
    np.testing.assert_allclose((raw[0] - raw[1]) / fit.features.scale, fit.design[0])


@pytest.mark.slow
def test_the_prior_scale_is_the_prior_scale() -> None:
    """A wrong one, or its square, is far off quadrature; of as many pairs as above, compiled for already."""
    pairs = simulated(60, 3, (1.0, 0.0))[0]
    fit = bk.RewardModel(bk.TokenFeatures(counts), prior_scale=0.3).fit(TOKENS, pairs, seed=1)
    assert np.abs(z_scores(fit, *by_quadrature(fit, 0.3))).max() < 4
    assert np.abs(z_scores(fit, *by_quadrature(fit, 0.36))).max() > 6


@pytest.mark.slow
def test_an_inferred_prior_scale_is_that_of_quadrature() -> None:
    pairs = simulated(40, 4, (1.5, 0.0))[0]
    model = bk.RewardModel(
        bk.TokenFeatures(zeros), prior_scale=None, drop_ties=True, target_accept=0.99, num_draws=2000
    )
    fit = model.fit(TOKENS, pairs, seed=2, accept_unconverged=True)
    theta, log_tau = np.meshgrid(np.linspace(-6, 6, 801), np.linspace(-7, 2, 601), indexing="ij")
    points = np.stack([theta.ravel(), np.exp(log_tau).ravel()], axis=1)
    log_likelihood = -np.logaddexp(0, -np.outer(theta[:, 0], fit.design[:, 0])).sum(axis=1)  # does not depend on tau
    log_density = (
        np.repeat(log_likelihood, log_tau.shape[1])
        - 0.5 * np.square(points[:, 0] / points[:, 1])
        - np.log(points[:, 1])
        - 0.5 * np.square(points[:, 1])
        + np.log(points[:, 1])  # the grid is even in log tau
    )
    assert list(fit.scales) == ["prior_scale"]
    assert np.abs(z_scores(fit, *on_a_grid(log_density, points))).max() < 4


def scored(num: int, seed: int) -> tuple[list[list[int]], np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 3, size=(num, NUM_TOKENS))
    reward = counts(tokens, np.full(num, NUM_TOKENS)) @ [1.0, -0.5]
    return tokens.tolist(), 7.0 + reward + 0.8 * rng.standard_normal(num)


@pytest.mark.slow
def test_scores_of_known_noise_are_ridge_regression() -> None:
    completions, y = scored(50, 0)
    data = bk.Scores([()] * 50, completions, y, noise=0.8)
    fit = bk.RewardModel(bk.TokenFeatures(counts), prior_scale=0.7).fit(TOKENS, data, seed=0)
    z = fit.design
    precision = z.T @ z / 0.64 + np.eye(2) / 0.49
    mean = np.linalg.solve(precision, z.T @ (y - y.mean()) / 0.64)
    assert np.abs(z_scores(fit, mean, np.sqrt(np.diag(np.linalg.inv(precision))))).max() < 4
    each = -0.5 * np.square((y - y.mean() - z @ fit.draws[2, 5]) / 0.8) - np.log(0.8 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(fit.log_likelihood()[2, 5], each)
    assert not fit.from_preferences


@pytest.mark.slow
def test_noise_of_scores_is_inferred() -> None:
    completions, y = scored(50, 1)
    fit = bk.RewardModel(bk.TokenFeatures(zeros)).fit(TOKENS, bk.Scores([()] * 50, completions, y), seed=0)
    centred = y - y.mean()
    theta, sigma = np.meshgrid(np.linspace(-2, 4, 601), np.linspace(0.2, 4, 761), indexing="ij")
    points = np.stack([theta.ravel(), sigma.ravel()], axis=1)
    residual = np.square(centred - np.outer(theta[:, 0], fit.design[:, 0])).sum(axis=1)  # does not depend on sigma
    log_density = (
        -0.5 * np.repeat(residual, sigma.shape[1]) / points[:, 1] ** 2
        - 50 * np.log(points[:, 1])
        - 0.5 * np.square(points[:, 0])
        - 0.5 * np.square(points[:, 1] / centred.std())
    )
    assert np.abs(z_scores(fit, *on_a_grid(log_density, points))).max() < 4


TABLE = np.random.default_rng(7).standard_normal((200, 8))  # features of 200 completions of one token
ONE_TOKEN = bk.NgramLM(np.full(201, -np.log(201)), eos_token_id=200)


def compared(theta: np.ndarray, num: int, rng: np.random.Generator) -> bk.Preferences:
    """Preferences between completions of one token, under a known reward."""
    pairs = np.stack([rng.choice(200, size=2, replace=False) for _ in range(num)])
    first = rng.random(num) < 1 / (1 + np.exp((TABLE[pairs[:, 1]] - TABLE[pairs[:, 0]]) @ theta))
    won, lost = np.where(first, pairs.T, pairs.T[::-1])
    return bk.Preferences([()] * num, won[:, None].tolist(), lost[:, None].tolist())


@pytest.mark.slow
def test_the_truth_ranks_uniformly_and_predictions_are_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 80 data sets of 12 pairs, their 8 weights from the prior, and held-out preferences of each.

    The plug-in, the most probable weights, fails the test of calibration, and predicts worse.
    """
    as_they_are = FeatureMap(
        bk.TokenFeatures(lambda tokens, lengths: TABLE[tokens[:, 0]]), np.zeros(8), None, np.ones(8)
    )
    monkeypatch.setattr(FeatureMap, "fitted", lambda *_: as_they_are)  # the truth's prior is then the model's
    model = bk.RewardModel(as_they_are.features, num_draws=150, num_warmup=150)
    ranks, predicted, plug_in, won = [], [], [], []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        theta = rng.standard_normal(8)
        fitted = model.fit(ONE_TOKEN, compared(theta, 12, rng), seed=seed, accept_unconverged=True)
        ranks.append((fitted.thetas(99) < theta).sum(axis=0))
        held_out = compared(theta, 60, rng)
        flip = rng.random(60) < 0.5  # the order in which a pair is shown must not be the answer
        chance = fitted.predict(held_out)
        mode = bradley_terry(fitted.design, precision=1.0)
        sure = 1 / (1 + np.exp((TABLE[np.ravel(held_out.rejected)] - TABLE[np.ravel(held_out.chosen)]) @ mode))
        predicted.append(np.where(flip, 1 - chance, chance))
        plug_in.append(np.where(flip, 1 - sure, sure))
        won.append(~flip)
    for rank in np.array(ranks).T:  # of 0..99, for each weight
        assert stats.chisquare(np.bincount(rank // 10, minlength=10)).pvalue > 1e-3
    p, q, y = np.array(predicted), np.array(plug_in), np.array(won)
    assert stats.chi2.sf(np.square(calibration(p, y)).sum(), 5) > 0.01
    assert stats.chi2.sf(np.square(calibration(q, y)).sum(), 5) < 1e-6
    gain = (np.log(np.where(y, p, 1 - p)) - np.log(np.where(y, q, 1 - q))).mean(axis=1)
    assert gain.mean() > 3 * gain.std() / np.sqrt(80)


def calibration(p: np.ndarray, won: np.ndarray) -> np.ndarray:
    """The z-score of won - p in bins of p; its standard error is over data sets, whose pairs share their posterior."""
    scores = []
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.7), (0.7, 0.9), (0.9, 1.0)):
        inside = (p >= low) & (p <= high)
        excess = np.where(inside, won - p, 0.0).sum(axis=1)
        scores.append(excess.sum() / np.sqrt(np.square(excess).sum()))
    return np.array(scores)


@pytest.mark.slow
def test_predictions_are_means_over_the_posterior(fit: bk.RewardPosterior) -> None:
    held_out, _ = simulated(7, 99, (1.0, -0.5))
    raw = [counts(np.array(part), np.full(7, NUM_TOKENS)) for part in (held_out.chosen, held_out.rejected)]
    reward = (raw[0] - raw[1]) / fit.features.scale @ fit.thetas().T
    np.testing.assert_allclose(fit.predict(held_out), (1 / (1 + np.exp(-reward))).mean(axis=1))
    sure = fit.predict(held_out, plug_in=True)
    assert (np.abs(sure - 0.5) > np.abs(fit.predict(held_out) - 0.5)).all()
    batch = held_out.batch(TOKENS)
    assert fit.rewards(batch, 50).shape == (50, 14)
    np.testing.assert_allclose(fit.rewards(batch)[:, :7] - fit.rewards(batch)[:, 7:], reward.T)
    assert (fit.thetas(8) == fit.draws[[0, 0, 1, 1, 2, 2, 3, 3], [250, 750] * 4]).all()


def test_the_program_is_genuine_and_its_density_the_one_that_is_reported(fit: bk.RewardPosterior) -> None:
    """NumPyro's own energy of every draw is our log-likelihood and the prior; `trace` and `Predictive` read the program."""
    import jax
    from numpyro import handlers
    from numpyro.infer import Predictive

    from bayes_klrl.reward_models.numpyro_program import reward_program

    log_prior = stats.norm.logpdf(fit.draws).sum(axis=2)
    energy = fit.sample_stats["potential_energy"]
    np.testing.assert_allclose(-energy, fit.log_likelihood().sum(axis=2) + log_prior, rtol=1e-9)
    design = fit.design.astype(np.float32)
    seeded = handlers.seed(reward_program, 0)
    sites = handlers.trace(seeded).get_trace(design, scores=design[:, 0], noise_scale=1.0)
    assert list(sites) == ["prior_scale", "z", "theta", "noise", "scores"]
    centred = handlers.trace(handlers.seed(reward_program, 0)).get_trace(design, prior_scale=1.0, centred=True)
    assert list(centred) == ["theta", "preferred"]
    drawn = Predictive(reward_program, num_samples=500)(jax.random.PRNGKey(0), design, prior_scale=2.0)
    assert np.asarray(drawn["theta"]).std() == pytest.approx(2.0, rel=0.15)


def test_the_seed_decides(fit: bk.RewardPosterior) -> None:
    pairs = simulated(60, 1, (1.0, -0.5))[0]
    model = bk.RewardModel(bk.TokenFeatures(counts))
    assert (model.fit(TOKENS, pairs, seed=0).draws == fit.draws).all()
    assert not (model.fit(TOKENS, pairs, seed=1).draws == fit.draws).any()


def test_arviz_reads_it(fit: bk.RewardPosterior) -> None:
    data = fit.to_arviz()
    az = installed_arviz()
    summary = az.summary(data)
    assert [str(name) for name in summary.index] == ["theta[0]", "theta[1]"]
    assert np.allclose(summary["mean"].astype(float), fit.mean, atol=2e-3)
    assert set(data.sample_stats.data_vars) == {"diverging", "num_steps", "accept_prob", "lp"}
    assert int(data.sample_stats["diverging"].sum()) == fit.diagnostics.num_divergent
    assert (data.observed_data["preferred"].values == 1).all()
    loo = az.loo(data)
    each = fit.log_likelihood().reshape(-1, 60)
    lppd = np.log(np.exp(each).mean(axis=0)).sum()
    assert lppd - 6 < float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd) < lppd
    assert "R-hat <=" in str(fit)
    assert "60 preferences, 2 features" in repr(fit)
    assert list(fit.diagnostics.table().columns) == ["mean", "sd", "mcse", "r_hat", "ess_bulk", "ess_tail"]


def test_chains_that_have_not_converged_are_an_error_that_keeps_them(
    fit: bk.RewardPosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = simulated(60, 1, (1.0, -0.5))[0]
    model = bk.RewardModel(bk.TokenFeatures(counts))
    monkeypatch.setattr(reward_posterior, "MIN_ESS", 4000)
    message = r"NUTS has not converged: the bulk ESS of theta\[\d\] is \d+, less than 4000; .*accept_unconverged"
    with pytest.raises(bk.ConvergenceError, match=message) as caught:
        model.fit(TOKENS, pairs, seed=0)
    assert caught.value.result is not None
    assert (caught.value.result.draws == fit.draws).all()
    accepted = model.fit(TOKENS, pairs, seed=0, accept_unconverged=True)
    assert (accepted.draws == fit.draws).all()
    assert accepted.diagnostics.problems


def test_chains_apart_and_a_single_chain_have_not_converged() -> None:
    draws = np.random.default_rng(0).standard_normal((4, 1000, 1))
    assert not diagnosed(draws, {}, 0).problems
    assert "R-hat of theta[0] is nan" in diagnosed(draws[:1], {}, 0).problems[0]
    assert "R-hat of theta[0] is 1." in diagnosed(draws + np.arange(4)[:, None, None], {}, 0).problems[0]
    few = diagnosed(draws[:, :50], {"noise": draws[:, :50, 0]}, 0).problems
    assert any("tail ESS of" in problem for problem in few)


def test_divergences_are_a_problem(fit: bk.RewardPosterior) -> None:
    from dataclasses import replace

    assert not fit.diagnostics.problems
    assert not replace(fit.diagnostics, num_divergent=4).problems
    assert "5 of 4,000 transitions diverged" in replace(fit.diagnostics, num_divergent=5).problems[0]
