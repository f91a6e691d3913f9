"""The picture of over-optimisation: the gold reward of each target of an uncertain proxy, against KL and against 1 / alpha."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from study import GoldStudy

__all__ = ["plot_gold_study"]

_LOOK = {
    "conservative": (COLOURS[2], "-"),
    "plug-in": (COLOURS[0], "-"),
    "cut": (COLOURS[1], "-"),
    "joint": (COLOURS[3], (0, (4, 2))),
}


def plot_gold_study(study: GoldStudy, file: str | Path) -> Path:
    """Draw E[gold] of each target, mean over data sets with a band of two standard errors, and return the file.

    On the left at equal KL to the prior, as far as every data set reaches; on the right at equal b, with the worst tenth
    of the data sets dotted.
    """
    with drawing(file, (9.6, 4.6)) as figure:
        left, right = figure.subplots(1, 2)
        _against_kl(left, study)
        _against_b(right, study)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8.5)
        num = len(study.gold["cut"])
        left.set_title(f"{num} data sets of {study.num_pairs} preferences; features: {study.knows}", loc="left")
        right.set_title("the same by temperature; dotted: the worst tenth", loc="left")
    return Path(file)


def _against_kl(axes: Axes, study: GoldStudy) -> None:
    """Draw the gold reward at equal KL: a frontier for each target."""
    axes.set(xlabel="KL to the prior (nats)", ylabel="expected gold reward")
    furthest = max(float(study.kl[name].max(axis=1).min()) for name in _LOOK if name != "joint")  # that goes far astray
    for name, (colour, style) in _LOOK.items():
        kl = np.linspace(0.0, min(float(study.kl[name].max(axis=1).min()), furthest), 120)
        _band(axes, kl, study.at_kl(name, kl), colour, style, name)
    _prior_line(axes, study)


def _against_b(axes: Axes, study: GoldStudy) -> None:
    """Draw the gold reward at equal b = 1 / alpha."""
    axes.set(xlabel="b = 1 / α (nats per unit of reward)", xscale="log")
    shown = study.b > 0
    for name, (colour, style) in _LOOK.items():
        gold = study.gold[name][:, shown]
        _band(axes, study.b[shown], gold, colour, style, name)
        axes.plot(study.b[shown], np.quantile(gold, 0.1, axis=0), color=colour, linestyle=":", linewidth=1.1)
    _prior_line(axes, study)


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, colour: str, style: Any, label: str) -> None:
    """Draw the mean over data sets, of values (D, X), with two standard errors."""
    mean, half = values.mean(axis=0), 2 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    axes.plot(x, mean, color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0, zorder=-1)


def _prior_line(axes: Axes, study: GoldStudy) -> None:
    """Draw a line at the prior's mean gold reward."""
    if study.b[0] > 0:
        return
    prior = float(study.gold["plug-in"][0, 0])
    axes.axhline(prior, color=GREY, linewidth=0.8, zorder=-2)
    axes.annotate(
        "prior",
        (0.99, prior),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=BLACK,
    )
