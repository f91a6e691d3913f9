"""P13 with an uncertain proxy: its curves are those of enumeration, and who gets more of the gold reward."""

from __future__ import annotations

import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
from study import TARGETS, GoldStudy, UncertainProxy, gold_study, uncertain_proxy  # examples/over_optimisation

import bayes_klrl as bk
from bayes_klrl.problems.preferences import gold_reward
from tests.helpers.truth import Truth

pytest.importorskip("numpyro")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def study() -> GoldStudy:
    return gold_study(15, seeds=range(24), num_thetas=50, b=[0.0, *np.geomspace(0.1, 30.0, 16)])


@pytest.fixture(scope="module")
def small() -> UncertainProxy:
    """Its completions are few enough for the tests' own enumeration; as many pairs as in the study, compiled for once."""
    return uncertain_proxy(15, max_new_tokens=5, seed=3)


@pytest.mark.parametrize("target", TARGETS)
def test_curves_are_those_of_the_posteriors_of_the_ensemble(small: UncertainProxy, target: str) -> None:
    b = 1.7
    reward = small.fit.reward(1 / b, target=target, anchor="mean" if target in ("joint", "conservative") else None)
    truth = Truth(bk.Posterior(small.fit.prior, reward, max_new_tokens=5))
    gold = gold_reward(truth.sequences.tokens[0], truth.sequences.lengths[0])
    (kl,), (mean_gold,), _ = small.curve(target, b)
    assert mean_gold == pytest.approx(float(truth.p[0] @ gold), abs=1e-9)
    assert kl == pytest.approx(float(truth.p[0] @ (truth.log_posterior[0] - truth.log_prior[0])), abs=1e-9)
    assert small.curve(target, 0.0)[0][0] == pytest.approx(0, abs=1e-12)


def test_no_target_has_more_of_the_expected_reward_at_equal_kl_than_plug_in(small: UncertainProxy) -> None:
    """It is linear in the policy: a bound that holds for every data set, which the gold reward need not keep."""
    grid = np.concatenate([[0.0], np.geomspace(0.05, 60, 200)])
    kl, _, reward = small.curve("plug-in", grid)
    for target in ("cut", "joint", "conservative"):
        other_kl, _, other = small.curve(target, grid[::10])
        inside = other_kl < kl.max()
        bound = np.interp(other_kl[inside], kl, reward)  # chords of a concave curve lie below it, by less than this
        assert (other[inside] <= bound + 1e-3).all()
        assert (other[inside] < bound - 0.01).any()


@pytest.mark.slow
def test_what_the_gold_reward_says(study: GoldStudy) -> None:
    """On average at equal KL: conservative, plug-in, cut; in the worst data sets, where b is large, cut loses less."""
    for better, worse in (("conservative", "plug-in"), ("plug-in", "cut")):
        gain, se = study.gain(better, worse, kl=1.0)
        assert gain > 2.5 * se
    at_one = int(np.abs(study.b - 1.0).argmin())
    lost = study.gold["cut"][:, at_one] - study.gold["joint"][:, at_one]
    assert lost.mean() > 4 * lost.std() / np.sqrt(len(lost))  # optimism costs most
    worst = {name: np.quantile(gold[:, -1], 0.1) for name, gold in study.gold.items()}
    assert worst["joint"] <= worst["plug-in"] < worst["cut"] < worst["conservative"]
    for name in ("plug-in", "cut", "joint"):  # the gold reward peaks and falls below the prior's
        gold = study.gold[name].mean(axis=0)
        assert 0 < gold.argmax() < len(study.b) - 5
        assert gold[-1] < gold[0]


@pytest.mark.slow
def test_a_study_prints_and_plots(study: GoldStudy, tmp_path: Path) -> None:
    assert "24 data sets of 15 preferences; features: gold" in str(study)
    assert len(str(study).splitlines()) == 2 + len(TARGETS)
    head = study.plot(tmp_path / "gold.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 800
    at = study.at_kl("cut", [0.0, 0.5, 1e3])
    assert at.shape == (24, 3)
    assert np.isnan(at[:, 2]).all()
    with pytest.raises(bk.BayesKLRLError, match="Fewer than two data sets reach a KL of 1000"):
        study.gain("cut", "plug-in", kl=1000)


def test_bad_input() -> None:
    with pytest.raises(bk.BayesKLRLError, match="num_pairs must be"):
        uncertain_proxy(1)
    with pytest.raises(bk.BayesKLRLError, match="knows must be one of"):
        uncertain_proxy(20, knows="all")  # type: ignore[arg-type]


def test_a_target_has_a_name(small: UncertainProxy) -> None:
    with pytest.raises(bk.BayesKLRLError, match="target must be one of"):
        small.weights("bayes", 1.0)


@pytest.mark.slow
def test_the_example_of_over_optimisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "over_optimisation"))
    study = example["main"](range(3), str(tmp_path / "gold.png"), num_pairs=15)
    printed = capsys.readouterr().out
    assert f"{study.gain('cut', 'plug-in', 1.0)[0]:+.2f}" in printed
    assert (tmp_path / "gold.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_example_of_an_uncertain_reward(capsys: pytest.CaptureFixture[str]) -> None:
    """The weights that NUTS finds are those of the taste, in the units of the features' standardisation."""
    fit, uncertain = runpy.run_path(str(EXAMPLES / "uncertain_reward.py"))["main"]()
    true = np.array([1.0, 1.0, 0.0, -0.1]) * fit.features.scale
    assert (np.abs(fit.mean - true) < 4 * fit.diagnostics.sd).all()
    assert (uncertain.reward_sd > 0).all()
    assert "new comparisons" in capsys.readouterr().out
