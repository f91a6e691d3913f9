"""The picture of a comparison: it is written, is a PNG of some size, and copes with what draws can hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.comparison.picture import plot_comparison
from tests.helpers.pictures import ONE, TWO, odd_draws, png_size


def guide_draws(posterior: bk.Posterior) -> bk.Draws:
    """What a fitted guide's draws look like."""
    draws = bk.ImportanceSampling(60).run(posterior, seed=4).resample(60, seed=0)
    elbo = np.full(posterior.num_prompts, 1.0)
    return replace(draws, method="SVI", elbo=elbo, log_proposal=draws.log_prior + 0.4)


@pytest.mark.parametrize("posterior", [ONE, TWO], ids=["one prompt", "two prompts"])
def test_a_comparison_of_every_kind_of_draws(posterior: bk.Posterior, tmp_path: Path) -> None:
    results = {
        "prior IS": bk.ImportanceSampling(200).run(posterior, seed=0),
        "SMC, N = 32": bk.SMC(32).run(posterior, seed=0),
        "SVI ($\\alpha_$ 5%)": guide_draws(posterior),
        "best of 4": bk.BestOfN(4, 50).run(posterior, seed=0),
        "Exact": bk.Exact().run(posterior, seed=0),
        "exact draws": bk.Exact(num_draws=50).run(posterior, seed=0),
    }
    file = plot_comparison(results, tmp_path / "all.png", kl={"best of 4": 0.6, "SMC, N = 32": np.nan})
    assert file == tmp_path / "all.png"
    assert min(png_size(file)) > 1000


@pytest.mark.parametrize("name", ["prior IS", "BestOfN", "SVI", "Exact"])
def test_a_comparison_of_one_method(name: str, tmp_path: Path) -> None:
    draws = {
        "prior IS": bk.ImportanceSampling(20).run(ONE, seed=0),
        "BestOfN": bk.BestOfN(2, 5).run(ONE, seed=0),
        "SVI": guide_draws(ONE),
        "Exact": bk.Exact().run(ONE, seed=0),
    }[name]
    png_size(plot_comparison({name: draws}, str(tmp_path / "one.png"), log_evidence=2.5))


@pytest.mark.slow
def test_a_comparison_of_twelve_methods(tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(20).run(ONE, seed=0)
    results = {f"a rather long name of method {number}": draws for number in range(12)}
    assert png_size(plot_comparison(results, tmp_path / "many.png"))[1] > 1500


@pytest.mark.slow
def test_a_comparison_copes_with_dead_and_constant_draws(tmp_path: Path) -> None:
    results = odd_draws()
    png_size(plot_comparison(results, tmp_path / "odd.png"))
    for name, odd in results.items():
        png_size(plot_comparison({name: odd}, tmp_path / "odd.png"))


def test_an_empty_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(bk.BayesKLRLError, match="nothing to plot"):
        plot_comparison({}, tmp_path / "none.png")
