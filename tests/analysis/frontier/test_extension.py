"""Frontiers that an algorithm extends past the end of their draws."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.frontier.extension import annealed_points
from bayes_klrl.analysis.frontier.path_points import PathPoints
from tests.analysis.frontier.test_frontier import GOLD, TWO, exact, exact_points
from tests.helpers.backends import on


@dataclass(frozen=True)
class Annealer:
    """Reports the enumerated path with errors of known size, on a schedule of its own for each prompt, padded with 1."""

    noise: float = 0.0

    def run(self, posterior: bk.Posterior, *, seed: int, progress: bool = False) -> bk.Draws:
        rng = np.random.default_rng(seed)
        prompts = posterior.num_prompts
        s = np.minimum(np.linspace(0, 1, 41) ** 1.5 * rng.uniform(1.0, 1.1, (prompts, 1)), 1.0)
        whole = [exact_points(posterior, row / posterior.alpha) for row in (np.unique(each) for each in s)]
        at = [points.at(row / posterior.alpha) for points, row in zip(whole, s, strict=True)]
        log_z, reward = (np.stack([at[p][name][p] for p in range(prompts)]) for name in ("log_evidence", "reward"))
        info = {
            "schedule": s,
            "path_log_evidence": log_z + self.noise * rng.standard_normal((prompts, 1)),
            "path_reward": reward + self.noise * rng.standard_normal((prompts, 1)),
        }
        return replace(bk.ImportanceSampling(10).run(posterior, seed=0), info=info)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_algorithm_that_reports_its_path_extends_the_frontier(mixed: bool) -> None:
    """Also where factors have different alphas, so that tempering changes the reward and not alpha."""
    posterior = TWO
    if mixed:
        slope = bk.TokenReward(lambda tokens, lengths: 0.2 * lengths, alpha=1.3)
        posterior = bk.Posterior(TWO.prior, TWO.likelihood * slope, prompts=TWO.prompts, max_new_tokens=5)
    curve = bk.frontier(posterior, num_draws=600, seed=0, extend=Annealer())
    cold = curve.alphas < curve.cut
    assert cold.any()
    assert curve.within.all()
    for a in np.flatnonzero(cold)[::5]:
        truth = exact(posterior, curve.alphas[a])
        for name in ("log_evidence", "reward", "kl"):
            assert getattr(curve, name)[a] == pytest.approx(truth[name], rel=0.01, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("posterior", [GOLD, TWO], ids=["gold", "two prompts"])
def test_annealed_smc_extends_the_frontier(backend: str, posterior: bk.Posterior) -> None:
    """600 prior draws end above alpha 0.2; what annealing adds below is judged by its own errors."""
    alphas = np.array([0.15, 0.1])
    curve = bk.frontier(
        on(backend, posterior), num_draws=600, seed=0, alphas=[0.6, *alphas], extend=bk.AnnealedSMC(256)
    )
    assert curve.cut > alphas.max()
    assert curve.within[1:].all()
    for a, alpha in enumerate(alphas, start=1):
        truth = exact(posterior, alpha)
        for name in ("log_evidence", "reward", "kl"):
            assert abs(getattr(curve, name)[a] - truth[name]) < 4 * curve.mean.se[name][a]
    assert curve.alpha_for(kl=float(curve.kl[2])) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5, 6, 7, 8])  # 3 contradicts the truth, by 2.3 errors, as one in ten does
def test_alphas_are_found_up_to_the_end_of_an_extension(seed: int) -> None:
    """Past that end the draws' own extrapolation may lie far below it, and does not hide what the extension knows."""
    last = 1 / 0.1
    curve = bk.frontier(GOLD, num_draws=600, seed=seed, extend=exact_points(GOLD, np.linspace(0, last, 200)))
    assert curve.cut > 0.1
    for share in (0.9, 0.99, 0.999, 1.0):
        at = curve.at(1 / (share * last))
        for name in ("kl", "reward"):
            target = float(getattr(at, name)[0])
            assert curve.alpha_for(**{name: target}) == pytest.approx(1 / (share * last), rel=1e-3)
        assert curve.implied_alpha(float(at.reward[0])).valid
    with pytest.raises(bk.BayesKLRLError, match="cannot be had"):
        curve.alpha_for(kl=float(curve.at(0.1).kl[0]) * 1.001)


@pytest.mark.slow
def test_the_errors_of_an_extension_are_the_spread_of_its_runs() -> None:
    found = [annealed_points(GOLD, Annealer(0.05), 0.1, seed=seed).at(np.array([9.0])) for seed in range(40)]
    truth = exact(GOLD, 1 / 9.0)
    scores = [(f[n][0, 0] - truth[n]) / f[f"{n}_se"][0, 0] for f in found for n in ("log_evidence", "reward")]
    assert abs(np.mean(scores)) < 0.4
    assert np.mean(np.abs(scores) < 1.96) > 0.85  # 80 scores, 0.95 +- 0.025
    assert 0.7 < np.std(scores) < 1.3


def test_what_cannot_extend() -> None:
    with pytest.raises(bk.BayesKLRLError, match="reports its path"):
        bk.frontier(GOLD, num_draws=600, seed=0, extend=bk.ImportanceSampling(10))
    with pytest.raises(bk.BayesKLRLError, match="extend must be PathPoints or an algorithm"):
        bk.frontier(GOLD, num_draws=600, seed=0, extend=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("posterior", [GOLD, TWO], ids=["gold", "two prompts"])
def test_an_extension_goes_on_where_the_draws_end(posterior: bk.Posterior) -> None:
    short = bk.frontier(posterior, num_draws=600, seed=0)
    nodes = np.linspace(0, 4 / short.cut, 60)
    points = exact_points(posterior, nodes)
    curve = bk.frontier(posterior, num_draws=600, seed=0, extend=points)
    cold = curve.alphas < curve.cut
    assert curve.cut == short.cut
    assert cold.any()
    assert curve.within[curve.alphas > curve.cut / 4].all()
    for name in ("log_evidence", "reward", "kl"):
        np.testing.assert_array_equal(getattr(curve, name)[~cold], getattr(short, name)[~cold])
        for a in np.flatnonzero(curve.within & cold):
            assert getattr(curve, name)[a] == pytest.approx(exact(posterior, curve.alphas[a])[name], rel=0.01, abs=0.01)
    num_prompts = posterior.num_prompts
    np.testing.assert_allclose(
        curve.mean.se["log_evidence"][curve.within & cold], 0.01 / np.sqrt(num_prompts), rtol=1e-4
    )
    target = exact(posterior, curve.cut / 2.2)
    with pytest.raises(bk.BayesKLRLError, match="cannot be had"):
        short.alpha_for(kl=target["kl"])
    assert curve.alpha_for(kl=target["kl"]) == pytest.approx(curve.cut / 2.2, rel=0.03)
    assert curve.alpha_for(reward=target["reward"]) == pytest.approx(curve.cut / 2.2, rel=0.03)
    half = exact(posterior, curve.cut / 1.9)
    planned = curve.at(curve.cut / 1.9).ess[0]
    assert planned == pytest.approx(600 * half["ess"], rel=0.03)
    assert curve.alpha_for(ess=float(planned)) == pytest.approx(curve.cut / 1.9, rel=1e-6)
    implied = curve.implied_alpha(target["reward"], reward_se=0.01)
    assert implied.alpha == pytest.approx(curve.cut / 2.2, rel=0.03)
    assert implied.valid
    gap = curve.gap(target["reward"], target["kl"] + 0.5, kl_se=0.02)
    assert gap.value == pytest.approx(0.5, abs=0.02)
    assert gap.se > 0.02
    assert "the extension down to" in str(curve)


def test_an_extension_that_does_not_fit_is_refused() -> None:
    curve = bk.frontier(GOLD, num_draws=600, seed=0)
    late = exact_points(GOLD, np.array([2.0, 3.0]) / curve.cut)
    with pytest.raises(bk.BayesKLRLError, match="leave a hole"):
        curve.extended(late)
    with pytest.raises(bk.BayesKLRLError, match="of 2 prompts"):
        curve.extended(exact_points(TWO, np.array([0.0, 9.0])))


def test_points_without_errors_extend_the_curve_but_not_the_intervals() -> None:
    curve = bk.frontier(GOLD, num_draws=600, seed=0)
    points = exact_points(GOLD, np.linspace(0, 3 / curve.cut, 40))
    bare = curve.extended(PathPoints(points.inverse_alpha, points.log_evidence, points.reward))
    cold = bare.within & (bare.alphas < bare.cut)
    assert cold.any()
    assert not bare.valid["kl"][cold].any()
    assert np.isnan(bare.upper["kl"][cold]).all()
    assert "nan" not in str(bare)


def dense(last: float, **changed: float) -> PathPoints:
    """Enumerated points of GOLD with small errors, some quantities shifted; a reward takes its log Z with it."""
    points = exact_points(GOLD, np.linspace(0, last, 800))
    small = np.full_like(points.reward, 1e-3)
    shift = changed.get("reward", 0.0)
    return PathPoints(
        points.inverse_alpha[0],
        points.log_evidence + changed.get("log_evidence", 0.0) + shift * points.inverse_alpha,
        points.reward + shift,
        small,
        small,
        small,
    )


@pytest.mark.slow
def test_true_points_meet_the_draws_and_false_ones_do_not() -> None:
    """Over 50 pools: z of log Z is standard normal, those of E[r] and KL nearly; the check warns of one in ten."""
    short = [bk.frontier(GOLD, num_draws=600, seed=seed, alphas=[1.0, 0.2]) for seed in range(50)]
    points = dense(40.0)
    joins = [curve.extended(points).join for curve in short]
    z = np.array([[join.z[name] for name in ("log_evidence", "reward", "kl")] for join in joins if join is not None])
    assert len(z) == 50
    assert abs(z[:, 0].mean()) < 4 / np.sqrt(50)
    assert (np.abs(z.std(axis=0) - 1) < 0.4).all()  # sd of a sd of 50: 0.1
    assert np.mean([join is not None and join.agrees for join in joins]) > 0.75
    lower = dense(40.0, log_evidence=-0.6)
    assert np.mean([not curve.extended(lower).join.agrees for curve in short]) > 0.95  # type: ignore[union-attr]


@pytest.mark.parametrize("shift, said", [({"log_evidence": -2.0}, "KL is"), ({"reward": -1.0}, "log Z is")])
def test_an_extension_that_contradicts_the_draws_is_not_relied_on(shift: dict[str, float], said: str) -> None:
    short = bk.frontier(GOLD, num_draws=600, seed=0)
    good, bad = short.extended(dense(40.0)), short.extended(dense(40.0, **shift))
    cold = good.within & (good.alphas < good.cut)
    assert good.valid["reward"][cold].all()
    assert good.notes == []
    assert not any(bad.valid[name][cold].any() for name in ("log_evidence", "reward", "kl"))
    assert not bad.per_prompt.valid["reward"][:, cold].any()
    assert f"the extension does not meet the draws at alpha = {bad.cut:.4g}" in str(bad)
    assert said in str(bad)
    assert "does not meet the draws" in bad._repr_html_()
    np.testing.assert_array_equal(bad.valid["reward"][~cold], short.valid["reward"][~cold])


def test_where_an_extension_goes_back_it_is_not_relied_on() -> None:
    """E[r] drops by 0.3 between two alphas, and is true on both sides of them."""
    short = bk.frontier(GOLD, num_draws=600, seed=0)
    points = dense(40.0)
    nodes = points.inverse_alpha[0] * short.cut
    dip = (nodes > 2) & (nodes < 2.5)
    dented = short.extended(
        PathPoints(
            points.inverse_alpha,
            points.log_evidence,
            points.reward - 0.3 * dip,
            points.log_evidence_se,
            points.reward_se,
            points.kl_se,
        )
    )
    at = dented.at(dented.cut / np.array([1.5, 2.2, 3.5]))
    assert at.within.all()
    assert at.valid["reward"].tolist() == [True, False, True]
    grid = replace(dented, mean=dented.at(dented.cut / np.array([1.5, 2.2, 3.5])))
    (note,) = grid.notes
    assert f"goes back at alpha = {dented.cut / 2.2:.4g} as alpha falls" in note


def test_runs_of_few_particles_are_shown_and_not_relied_on() -> None:
    curve = bk.frontier(GOLD, num_draws=600, seed=0, extend=Annealer(0.01))
    cold = curve.alphas < curve.cut
    assert curve.within.all()
    assert not curve.valid["reward"][cold].any()
    assert "runs have 10 particles each" in str(curve)
    assert np.isfinite(curve.upper["reward"][cold]).all()
    with pytest.warns(UserWarning, match="an extension that is not reliable there.*10 particles each"):
        alpha = curve.alpha_for(reward=float(curve.at(curve.cut / 2).reward[0]))
    assert alpha == pytest.approx(curve.cut / 2)
