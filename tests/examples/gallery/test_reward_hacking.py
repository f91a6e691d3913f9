"""`reward_hacking`: curves and alarms against sums over all completions, and against what the package says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.gallery.models.proxies import GRID, TARGETS, Proxy, gold_features
from bayes_klrl.problems.preferences import Overoptimisation, gold_reward, overoptimisation
from bayes_klrl.reward_models.features import FeatureMap
from tests.examples.gallery import is_short
from tests.helpers.truth import Truth

AT = 35  # b = 0.05 * 600^(34 / 59), about 2


class Thetas:
    """Draws of theta by hand, in place of NUTS: unsure of most features, and right on average about none."""

    from_preferences = True
    features = FeatureMap(bk.TokenFeatures(gold_features), np.zeros(5), None, np.ones(5))
    draws = np.random.default_rng(0).normal([0.2, -0.3, 0.8, -0.05, 0.6], 0.4, size=(12, 5))

    def thetas(self, num: int | None = None) -> np.ndarray:
        return self.draws[:num]


@pytest.fixture(scope="module")
def problem() -> Overoptimisation:
    return overoptimisation(max_new_tokens=4)


@pytest.fixture(scope="module")
def proxy(problem: Overoptimisation) -> Proxy:
    return Proxy.of(problem, Thetas(), gold_features, 12)  # type: ignore[arg-type]


def posterior(problem: Overoptimisation, target: str) -> bk.Posterior:
    anchor = "mean" if target in ("joint", "conservative") else None
    options: Any = {"target": target, "anchor": anchor, "num_thetas": 12, "alpha": 1 / GRID[AT]}
    return bk.Posterior(problem.posterior.prior, bk.EnsembleReward(Thetas(), **options), max_new_tokens=4)


@pytest.mark.parametrize("target", TARGETS)
def test_gold_and_kl_along_b_are_sums_over_completions(problem: Overoptimisation, proxy: Proxy, target: str) -> None:
    truth = Truth(posterior(problem, target))
    gold = gold_reward(truth.sequences.tokens[0], truth.sequences.lengths[0])
    probs = proxy.target(target)
    assert probs[AT] @ proxy.gold == pytest.approx(float(truth.p[0] @ gold), abs=1e-10)
    assert probs[0] @ proxy.gold == pytest.approx(float(np.exp(truth.log_prior[0]) @ gold), abs=1e-10)
    if target == "plug-in":
        kl = float(truth.p[0] @ (truth.log_posterior[0] - truth.log_prior[0]))
        assert proxy.kl[AT] == pytest.approx(kl, abs=1e-10)
        assert proxy.gain[AT] == pytest.approx(float((truth.p[0] - np.exp(truth.log_prior[0])) @ gold), abs=1e-10)


def test_alarms_are_what_the_package_says(problem: Overoptimisation, proxy: Proxy) -> None:
    """The certificate of the plug-in policy, the share of the variance, KLs between posteriors, and the ESS of a pool."""
    alarms = {name: float(values[AT]) for name, values in proxy.alarms().items()}
    cut, plug_in = posterior(problem, "cut"), posterior(problem, "plug-in")
    certificate = bk.certify(cut, bk.posterior_policy(plug_in).language_model(), seed=0)
    assert alarms["certificate"] == pytest.approx(certificate.reverse_kl[0].mean(), abs=1e-8)
    draws = bk.Exact().run(cut, seed=0)
    told = bk.reward_uncertainty(cut, draws)
    assert alarms["share"] == pytest.approx(told.decompose(told.reward_mean).share[0], abs=1e-9)
    assert 0.05 < alarms["share"] < 0.95
    each = told.weights[0]  # p*_theta of every completion
    information = (each * np.log(each / each.mean(axis=0))).sum(axis=1).mean()
    assert alarms["information"] == pytest.approx(information, abs=1e-9)
    truth = Truth(plug_in)
    weights = np.exp(truth.reward[0] * GRID[AT])
    prior = np.exp(truth.log_prior[0])
    assert np.exp(-alarms["ESS"]) == pytest.approx(float((prior @ weights) ** 2 / (prior @ weights**2)), rel=1e-9)


def test_the_turn_over_alarm_counts_rewards_that_fall(proxy: Proxy) -> None:
    """P(Cov(r_theta, r) < 0), against the slope of E[r_theta] along b, by finite differences."""
    step = 1e-5
    moved = np.exp(proxy.log_prior + (GRID[:, None] + step) * proxy.mean)
    before = np.exp(proxy.log_prior + (GRID[:, None] - step) * proxy.mean)
    slope = (moved / moved.sum(axis=1, keepdims=True) - before / before.sum(axis=1, keepdims=True)) @ proxy.rewards.T
    moving = proxy.plug_in.max(axis=1) < 1 - 1e-6  # a point mass no longer moves, to rounding
    assert moving.sum() > 50
    np.testing.assert_allclose(proxy.alarms()["turn-over"][moving], (slope < 0).mean(axis=1)[moving], atol=1e-12)
    assert 0 < proxy.alarms()["turn-over"][AT] < 1


def test_alarms_do_not_read_the_gold_reward(proxy: Proxy) -> None:
    blind = Proxy(proxy.rewards, proxy.log_prior, np.full_like(proxy.gold, np.nan))
    for name, values in blind.alarms().items():
        np.testing.assert_array_equal(values, proxy.alarms()[name])


def test_stops_are_judged_by_gold_and_the_budget_by_the_other_data_sets(proxy: Proxy) -> None:
    from bayes_klrl.gallery.decisions.reward_hacking import BUDGET, LIMITS, Judgement, stops

    others = [Proxy(proxy.rewards[k:], proxy.log_prior, proxy.gold) for k in (1, 3, 5)]
    judged = Judgement.of([proxy, *others])
    for name, limit in LIMITS.items():
        values = proxy.alarms()[name]
        first = next((i for i, value in enumerate(values) if value >= limit), len(GRID) - 1)
        assert stops(proxy)[name] == first
        assert judged.gain[name][0] == pytest.approx(proxy.gain[first])
        assert judged.before[name][0] == (first <= proxy.gain.argmax())
    assert judged.gain["the peak"][0] == pytest.approx(proxy.gain.max())
    kls = np.linspace(0, 5, 101)
    means = np.mean([np.interp(kls, each.kl, each.gain) for each in others], axis=0)
    own = np.interp(kls[means.argmax()], proxy.kl, proxy.gain)
    assert judged.gain[BUDGET][0] == pytest.approx(own)
    turned = Judgement.of([Proxy(proxy.rewards, proxy.log_prior, -proxy.gold), *others])
    assert turned.gain[BUDGET][0] == pytest.approx(-own)  # its own gold reward has no say in its budget


@pytest.mark.slow
def test_the_example_ends_in_a_report(tmp_path: Path) -> None:
    pytest.importorskip("numpyro")
    from bayes_klrl.gallery.decisions import reward_hacking as module

    found = module.main(tmp_path / "out", num_sets=2, num_pairs=20)
    page = found.report.read_text(encoding="utf-8")
    assert page.count("<figure>") >= 3
    assert f"from the posterior at alpha {module.ALPHA}" in page
    assert found.numbers["data sets"] == 2
    assert is_short(found)
