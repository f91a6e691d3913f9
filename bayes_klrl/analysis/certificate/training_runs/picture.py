"""The picture of a training's checkpoints: distance to the posterior over steps, beside what the trainer logged."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing, plain_text
from bayes_klrl.typing import FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bayes_klrl.analysis.certificate.training_runs.curve import CertificateCurve

__all__ = ["plot_curve"]

_REVERSE, _FORWARD, _PRIOR = BLACK, COLOURS[2], COLOURS[3]


def plot_curve(curve: CertificateCurve, file: str | Path) -> Path:
    """Draw a curve of certificates and return the file.

    Parameters
    ----------
    curve
        The certificates by step, and the trainer's log.
    file
        The PNG to write.
    """
    log = curve.log
    logged = [] if log is None else log.main_names
    with drawing(file, (4.2 * (1 + len(logged)), 3.6)) as figure:
        panels = np.ravel(figure.subplots(1, 1 + len(logged), sharex=True))
        _draw_distance(panels[0], curve)
        for axes, name in zip(panels[1:], logged, strict=True):
            assert log is not None
            _draw_logged(axes, name, *log.rows(name), curve)
        title = "\n".join(textwrap.wrap(curve.verdict, width=62 * panels.size))
        figure.suptitle(plain_text(title), fontsize=9.5, x=0.02, ha="left")
    return Path(file)


def _draw_distance(axes: Axes, curve: CertificateCurve) -> None:
    """Draw both KLs to the posterior as intervals, an open end as an arrow, and the KL to the prior."""
    from matplotlib.ticker import MaxNLocator

    steps = curve.steps
    pooled = [each.pooled for each in curve.certificates.values()]
    reverse, forward = (np.array([getattr(each, name) for each in pooled]) for name in ("reverse_kl", "forward_kl"))
    prior = np.array([each.kl_prior for each in curve.certificates.values()])
    _interval(axes, steps, reverse, _REVERSE, "KL(policy || posterior)")
    _interval(axes, steps, forward, _FORWARD, "KL(posterior || policy)")
    axes.plot(steps, np.where(np.isfinite(prior), prior, np.nan), "--", color=_PRIOR, label="KL(policy || prior)")
    axes.set(xlabel="step", ylabel="nats per completion")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Certified", loc="left")
    axes.legend(frameon=False, fontsize=8)


def _interval(axes: Axes, steps: IntArray, interval: FloatArray, colour: str, label: str) -> None:
    """Draw intervals (C, 2) over steps: the middle as a line, or the lower end where the upper one is open."""
    low, high = interval.T
    shown = np.isfinite(low)
    is_open = shown & ~np.isfinite(high)
    middle = np.where(is_open, low, np.where(shown, (low + np.where(np.isfinite(high), high, 0.0)) / 2, np.nan))
    half = np.where(shown & ~is_open, (np.where(np.isfinite(high), high, 0.0) - np.where(shown, low, 0.0)) / 2, 0.0)
    axes.errorbar(
        steps, middle, yerr=half, color=colour, marker="o", markersize=4, capsize=3, linewidth=1.4, label=label
    )
    axes.plot(steps[is_open], low[is_open], "^", color=colour, markersize=8)  # at least so much


def _draw_logged(axes: Axes, name: str, steps: IntArray, values: FloatArray, curve: CertificateCurve) -> None:
    """Draw a logged quantity over steps; for the reward also that of the policy's own draws."""
    axes.plot(steps, values, color=GREY, linewidth=1.2, label=f"{name}, as logged")
    if name in ("reward", "objective/scores"):
        ours = [each.reward for each in curve.certificates.values()]
        axes.plot(curve.steps, ours, "o", color=COLOURS[0], markersize=5, label="E[r] of the policy's draws")
    for step in curve.steps:
        axes.axvline(step, color="#E5E5E5", linewidth=0.8, zorder=0)
    unit = {"kl": "nats per token", "objective/kl": "nats per completion"}.get(name, name)
    axes.set(xlabel="step", ylabel=plain_text(unit))
    axes.set_title("Logged by the trainer", loc="left")
    axes.legend(frameon=False, fontsize=8)
