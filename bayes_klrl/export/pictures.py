"""Pictures of one training and of one set of draws, written to PNG files.

Several prompts are averaged, which titles say. All densities are in nats. `plot_style` has what pictures share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing, plain_text
from bayes_klrl.typing import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history", "plot_weights"]


def plot_history(
    history: Mapping[str, ArrayLike],
    file: str | Path,
    *,
    title: str | None = None,
    log_evidence: ArrayLike | None = None,
) -> Path:
    """Draw ELBO, reward and KL to the prior over the steps of training (`Fit.history`); return the file.

    Parameters
    ----------
    history
        Values of each step by name; "elbo", "reward" and "kl" are drawn, those that are there.
    file
        The PNG to write.
    title
        The text above the panels.
    log_evidence
        log Z of each prompt, or its mean over prompts, if known: the ELBO's upper limit.
    """
    panels = {"elbo": "ELBO (nats)", "reward": "mean reward", "kl": "KL to the prior (nats)"}
    shown = {key: label for key, label in panels.items() if key in history}
    if not shown:
        raise BayesKLRLError(f"A history must have at least one of {list(panels)}; got {list(history)}.")
    with drawing(file, (3.3 * len(shown), 2.9)) as figure:
        for axes, (key, label) in zip(np.ravel(figure.subplots(1, len(shown))), shown.items(), strict=True):
            values = np.asarray(history[key], dtype=np.float64)
            values = np.where(np.isfinite(values), values, np.nan)
            steps, smooth = np.arange(1, values.size + 1), _running_mean(values)
            single = "." if values.size == 1 else ""
            axes.plot(steps, values, single, color=COLOURS[0], alpha=0.35, linewidth=0.8, label="each step")
            axes.plot(steps, smooth, color=COLOURS[0], linewidth=1.8, label="running mean")
            if key == "elbo" and log_evidence is not None:
                ceiling = float(np.mean(np.asarray(log_evidence, dtype=np.float64)))
                axes.axhline(ceiling, color=BLACK, linestyle="--", linewidth=1, label="log evidence, its ceiling")
            if axes.get_subplotspec().is_first_col():
                axes.legend(frameon=False, fontsize=8)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
        if title:
            figure.suptitle(plain_text(title), fontsize=10)
    return Path(file)


def plot_weights(draws: Draws, file: str | Path) -> Path:
    """Draw how many draws carry the estimate: sorted weights, and their cumulative sum; return the file."""
    weights = draws.weights
    alive = weights.sum(axis=1) > 0
    num_prompts, num_draws = weights.shape
    rank = np.arange(1, num_draws + 1)
    with drawing(file, (8.0, 3.3)) as figure:
        single, cumulative = figure.subplots(1, 2)
        for number, p in enumerate(np.flatnonzero(alive)):
            colour = COLOURS[number % len(COLOURS)] if alive.sum() <= len(COLOURS) else GREY
            label = f"prompt {p}" if num_prompts > 1 and alive.sum() <= len(COLOURS) else None
            ordered = np.sort(weights[p])[::-1]
            positive = ordered > 0
            single.plot(rank[positive], ordered[positive], color=colour, linewidth=1.6, label=label)
            mass = ordered.cumsum()
            cumulative.step(rank, mass, color=colour, linewidth=1.6, where="post")
            if alive.sum() == 1:
                _mark_carriers(cumulative, mass)
        single.axhline(1 / num_draws, color=GREY, linestyle="--", linewidth=1, label="1 / N: equal weights")
        single.set(xscale="log", yscale="log", xlabel="rank of the draw", ylabel="normalised weight")
        single.legend(frameon=False, fontsize=8, loc="lower left")
        cumulative.set(
            xscale="log",
            ylim=(0, 1.03),
            xlabel="number of heaviest draws",
            ylabel="their share of the weight",
        )
        dead = "" if alive.all() else f"; no positive weight for {int((~alive).sum())} of {num_prompts} prompts"
        prompts = f" for each of {num_prompts} prompts" if num_prompts > 1 else ""
        figure.suptitle(f"{plain_text(draws.method)}: {num_draws:,} draws{prompts}{dead}", fontsize=10)
    return Path(file)


def _mark_carriers(axes: Axes, mass: FloatArray) -> None:
    """Say how many draws carry half of the weight, and nine tenths."""
    for share in (0.5, 0.9):
        count = int(np.searchsorted(mass, share * (1 - 1e-12))) + 1
        axes.plot(count, mass[count - 1], "o", color=BLACK, markersize=4)
        axes.annotate(
            f"{count:,} of {mass.size:,} carry {share:.0%}",
            (count, mass[count - 1]),
            (-8, 2),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )


def _running_mean(values: FloatArray) -> FloatArray:
    """Return the mean over a window of about a twentieth of the steps, NaN left out."""
    half = max(values.size // 40, 1)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(known, values, 0.0).cumsum()])
    counts = np.concatenate([[0], known.cumsum()])
    first = np.maximum(np.arange(values.size) - half, 0)
    last = np.minimum(np.arange(values.size) + half + 1, values.size)
    number = counts[last] - counts[first]
    result: FloatArray = np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)
    return result
