"""Pictures of weights and of training: files are written, are PNGs of some size, and cope with what draws can hold."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.export.pictures import _running_mean, plot_history, plot_weights
from bayes_klrl.export.plot_style import spread_out
from tests.helpers.pictures import ONE, TWO, odd_draws, png_size


@pytest.mark.slow
@pytest.mark.parametrize("posterior", [ONE, TWO], ids=["one prompt", "two prompts"])
def test_weights(posterior: bk.Posterior, tmp_path: Path) -> None:
    for algorithm in (bk.ImportanceSampling(100), bk.BestOfN(2, 10), bk.Exact()):
        png_size(plot_weights(algorithm.run(posterior, seed=0), tmp_path / "weights.png"))


@pytest.mark.slow
def test_weights_of_odd_draws(tmp_path: Path) -> None:
    for odd in odd_draws().values():
        png_size(plot_weights(odd, tmp_path / "weights.png"))


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
