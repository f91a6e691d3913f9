"""The look that all pictures share, and the numbers that they take from draws.

Pictures are made on a canvas of their own: no display, no pyplot, no global state of matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.draws import Draws
from bayes_klrl.typing import FloatArray
from bayes_klrl.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "COLOURS",
    "GREY",
    "MARKERS",
    "drawing",
    "kl_to_prior",
    "legend_above",
    "number_text",
    "plain_text",
    "spread_out",
    "weighted_mean",
]

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F6000",
    "#6A51A3",
)  # Okabe and Ito, and two
BLACK, GREY = "#000000", "#767676"
MARKERS = "osD^vPX*"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
}


@contextmanager
def drawing(file: str | Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure, and write it to the file afterwards, whole or not at all."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with whole_file(file) as unfinished:
            figure.savefig(unfinished, format="png", dpi=200)


def weighted_mean(weights: FloatArray, values: FloatArray) -> float:
    """Return the weighted mean over draws, then over prompts; NaN if some prompt has no weight."""
    if not weights.any(axis=1).all():
        return float("nan")
    return float(np.multiply(weights, values, where=weights > 0, out=np.zeros_like(weights)).sum(axis=1).mean())


def kl_to_prior(draws: Draws, weights: FloatArray) -> float:
    """Return the KL of an answer to the prior, mean over prompts; NaN where it is unknown.

    For weighted draws that of the posterior, E[r] / alpha - log Z; for draws from a guide mean(log q - log p0).
    """
    if np.isnan(draws.log_evidence).any():
        return float((draws.log_proposal - draws.log_prior).mean())
    return weighted_mean(weights, draws.log_likelihood) - float(draws.log_evidence.mean())


def legend_above(axes: Axes) -> None:
    """Put the legend between the axes and their title."""
    where: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)}
    axes.legend(frameon=False, fontsize=8, ncols=3, borderpad=0, columnspacing=1, **where)


def number_text(value: float, digits: int) -> str:
    """Return a number with a true minus sign."""
    return f"{value:,.{digits}f}".replace("-", "−").replace("inf", "∞")


def spread_out(positions: FloatArray, gap: float) -> FloatArray:
    """Return positions in 0..1, in the same order, moved apart to at least `gap` of each other."""
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(order.size)
    placed = np.maximum.accumulate(np.maximum(positions[order], 0.02) - steps) + steps
    placed = np.minimum.accumulate((np.minimum(placed, 0.98) - steps)[::-1])[::-1] + steps
    result = np.empty_like(positions)
    result[order] = placed
    return result


def plain_text(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
