"""One picture of a run of the suite: a panel for each problem, the error of log Z by method on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.export.plot_style import COLOURS, GREY, drawing
from bayes_klrl.problems.suite.cell import SuiteCell
from bayes_klrl.problems.suite.table import suite_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_suite"]

_COLUMNS = 4
_LEAST, _MOST = 1e-4, 1e2  # nats: what is smaller or larger stands at the edge


def plot_suite(cells: Sequence[SuiteCell], purposes: Mapping[str, str], file: str | Path, *, title: str) -> Path:
    """Draw |log Z error| of every repeat (small) and their mean (large), and where there is no log Z the KL (hollow).

    Parameters
    ----------
    cells
        The answers of all methods to all problems, one per repeat.
    purposes
        The purpose of each problem, by its name.
    file
        The PNG to write.
    title
        The text above all panels.
    """
    table = suite_table(cells, purposes)
    problems = list(table.index.unique("problem"))
    methods = list(table.index.unique("method"))
    num_columns = min(_COLUMNS, len(problems))
    num_rows = math.ceil(len(problems) / num_columns)
    size = (1.6 + 2.35 * num_columns, 0.9 + num_rows * (0.75 + 0.19 * len(methods)))
    with drawing(file, size) as figure:
        grid: Any = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axes, problem in zip(grid.flat, problems, strict=False):
            _panel(axes, cells, table.loc[problem], problem, methods)
            axes.set_title(f"{problem}: {_short(purposes[problem])}", loc="left", fontsize=8)
        for axes in grid.flat[len(problems) :]:
            axes.set_visible(False)
        figure.supxlabel(
            "|error of log Z| in nats: each repeat, and their mean (large); hollow: KL to the posterior, where there is no "
            "log Z",
            fontsize=8.5,
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
    return Path(file)


def _panel(axes: Axes, cells: Sequence[SuiteCell], rows: Any, problem: str, methods: list[str]) -> None:
    """Draw one problem."""
    axes.set_xscale("log")
    axes.set_xlim(_LEAST / 1.6, _MOST * 1.6)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xticks([1e-4, 1e-2, 1, 1e2], ["≤$10^{-4}$", "$10^{-2}$", "1", "≥100"])
    axes.minorticks_off()
    axes.tick_params(labelsize=7, length=2)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    for y, method in enumerate(methods):
        colour, row = COLOURS[y % len(COLOURS)], rows.loc[method]
        errors = np.abs([c.log_evidence_error for c in cells if c.problem == problem and c.method == method])
        known = errors[~np.isnan(errors)]
        if known.size:
            axes.plot(
                _inside(known), np.full(known.size, y), "o", color=colour, markersize=2.5, alpha=0.5, clip_on=False
            )
            middle = float(known.mean())
            axes.plot(
                _inside(middle), y, "o" if np.isfinite(middle) else "X", color=colour, markersize=6, clip_on=False
            )
        elif not np.isnan(row["kl_posterior"]):
            axes.plot(_inside(row["kl_posterior"]), y, "o", mfc="white", mec=colour, markersize=6, clip_on=False)
        else:
            reason = "no log Z" if row["answers"] else "no answer"
            axes.text(_LEAST, y, reason, fontsize=6.5, color=GREY, va="center")


def _inside(values: Any) -> Any:
    """Return values moved to the nearest edge of the picture."""
    return np.clip(values, _LEAST, _MOST)


def _short(purpose: str) -> str:
    """Return the purpose of a problem, up to the first comma or colon if it is long."""
    return purpose if len(purpose) <= 30 else purpose.split(":")[0].split(",")[0]
