"""Plots: files are written, are PNGs of some size, and cope with what draws can hold."""

import struct
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.draws import Draws
from bayes_klrl.export.pictures import _running_mean, plot_comparison, plot_history, plot_weights
from bayes_klrl.export.plot_style import spread_out

TABLE = np.log([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
LM = bk.NgramLM(TABLE, eos_token_id=2)
LONG = bk.TokenReward(lambda tokens, lengths: lengths + 0.1 * tokens[:, 0], alpha=0.7)
ONE = bk.Posterior(LM, LONG, prompts=[[0]], max_new_tokens=4)
TWO = bk.Posterior(LM, LONG, prompts=[[0], [1]], max_new_tokens=4)
EDGE = float(np.nextafter(0, 1))


def png_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def guide_draws(posterior: bk.Posterior) -> Draws:
    """What a fitted guide's draws look like."""
    draws = bk.ImportanceSampling(60).run(posterior, seed=4).resample(60, seed=0)
    elbo = np.full(posterior.num_prompts, 1.0)
    return replace(draws, method="SVI", elbo=elbo, log_proposal=draws.log_prior + 0.4)


def dead(draws: Draws, *prompts: int) -> Draws:
    """The draws of prompts that have no positive weight."""
    arrays = {name: getattr(draws, name).copy() for name in ("log_weights", "log_evidence", "elbo", "ess")}
    for name, value in (("log_weights", -np.inf), ("log_evidence", -np.inf), ("elbo", -np.inf), ("ess", 0.0)):
        arrays[name][list(prompts)] = value
    return replace(draws, **arrays, log_evidence_se=np.full(draws.shape[0], np.inf))


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


def test_a_comparison_of_twelve_methods(tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(20).run(ONE, seed=0)
    results = {f"a rather long name of method {number}": draws for number in range(12)}
    assert png_size(plot_comparison(results, tmp_path / "many.png"))[1] > 1500


def test_a_comparison_copes_with_dead_and_constant_draws(tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(20).run(TWO, seed=0)
    constant = replace(draws, reward=np.ones(draws.shape), log_weights=np.zeros(draws.shape))
    hard = replace(draws, reward=np.full(draws.shape, -np.inf), elbo=np.full(2, -np.inf))
    single = bk.ImportanceSampling(1).run(TWO, seed=0)
    results = {
        "dead": dead(draws, 0, 1),
        "half": dead(draws, 1),
        "constant": constant,
        "hard": hard,
        "single": single,
        "tiny": replace(draws, ess=np.full(2, EDGE)),
    }
    png_size(plot_comparison(results, tmp_path / "odd.png"))
    for name, odd in results.items():
        png_size(plot_comparison({name: odd}, tmp_path / "odd.png"))
        png_size(plot_weights(odd, tmp_path / "weights.png"))


def test_an_empty_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(bk.BayesKLRLError, match="nothing to plot"):
        plot_comparison({}, tmp_path / "none.png")


@pytest.mark.parametrize("posterior", [ONE, TWO], ids=["one prompt", "two prompts"])
def test_weights(posterior: bk.Posterior, tmp_path: Path) -> None:
    for algorithm in (bk.ImportanceSampling(100), bk.BestOfN(2, 10), bk.Exact()):
        png_size(plot_weights(algorithm.run(posterior, seed=0), tmp_path / "weights.png"))


@pytest.mark.parametrize("num_steps", [1, 2, 300])
def test_a_history(num_steps: int, tmp_path: Path) -> None:
    elbo = np.linspace(-1, 1, num_steps)
    elbo[0] = -np.inf
    history = {"elbo": elbo, "reward": np.full(num_steps, np.nan), "kl": np.ones(num_steps), "seconds": elbo}
    width, height = png_size(plot_history(history, tmp_path / "h.png", title="$", log_evidence=[1.0, 2.0]))
    assert width > 2 * height
    png_size(plot_history({"elbo": elbo}, tmp_path / "h.png"))
    with pytest.raises(bk.BayesKLRLError, match="got \\['loss'\\]"):
        plot_history({"loss": elbo}, tmp_path / "h.png")


def test_plots_leave_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_history({"elbo": [0.0, 1.0]}, tmp_path / "h.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_labels_are_spread_without_changing_their_order() -> None:
    rng = np.random.default_rng(0)
    for positions in (rng.random(6), np.full(6, 0.97), np.zeros(6), np.array([0.5])):
        placed = spread_out(positions, gap=0.1)
        assert (np.diff(np.sort(placed)) >= 0.1 - 1e-12).all()
        assert (np.argsort(placed) == np.argsort(positions, kind="stable")).all()
        assert placed.min() >= 0
        assert placed.max() <= 1
    np.testing.assert_array_equal(spread_out(np.array([0.2, 0.8, 0.5]), gap=0.1), [0.2, 0.8, 0.5])


def test_running_mean_leaves_out_what_is_unknown() -> None:
    np.testing.assert_allclose(_running_mean(np.array([1.0, 2.0, 6.0, np.nan, 4.0])), [1.5, 3.0, 4.0, 5.0, 4.0])
    assert np.isnan(_running_mean(np.array([np.nan]))).all()
