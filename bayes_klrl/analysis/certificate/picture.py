"""The picture of a certificate: log Z between its bounds with the ELBO, both KLs, and the cells of a feature."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bayes_klrl.analysis.certificate.record import CertificateRecord
from bayes_klrl.analysis.certificate.text import bounds_text, cell_text, farthest, verdict
from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing, legend_above, number_text, plain_text
from bayes_klrl.typing import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_certificate"]

_EVIDENCE, _ELBO, _FORWARD = COLOURS[0], COLOURS[1], COLOURS[2]
_MOST_ROWS = 12


def plot_certificate(certificate: CertificateRecord, file: str | Path) -> Path:
    """Draw a certificate and return the file.

    Parameters
    ----------
    certificate
        The certificate to draw; of many prompts, the twelve farthest from the posterior are shown.
    file
        The PNG to write.
    """
    rows = _rows(certificate)
    with_cells = certificate.coverage is not None
    height = 2.1 + 0.42 * len(rows) + (0.6 if with_cells else 0.0)
    with drawing(file, (11.0 if with_cells else 8.4, max(height, 3.2))) as figure:
        axes = figure.subplots(1, 3 if with_cells else 2, width_ratios=[1.2, 1, 1] if with_cells else [1.2, 1])
        _draw_evidence(axes[0], rows)
        _draw_kls(axes[1], rows, _on_support(certificate))
        if with_cells:
            _draw_cells(axes[2], certificate)
        lines = textwrap.wrap(verdict(certificate), width=150 if with_cells else 110)
        title = "\n".join([*lines, bounds_text(certificate)])
        figure.suptitle(plain_text(title), fontsize=9.5, x=0.02, ha="left")
    return Path(file)


def _rows(certificate: CertificateRecord) -> list[tuple[str, FloatArray, FloatArray, FloatArray, FloatArray]]:
    """Return label, log Z, ELBO, reverse and forward KL: the mean over prompts, then the farthest prompts."""
    pooled = certificate.pooled
    rows = [("mean", pooled.log_evidence_bounds, pooled.elbo, pooled.reverse_kl, pooled.forward_kl)]
    num_prompts = len(certificate.reverse_kl)
    if num_prompts == 1:
        return [("", *rows[0][1:])]
    words = certificate.draws.prompt_words(most=24)
    rows += [
        (
            words[p],
            certificate.log_evidence_bounds[p],
            certificate.elbo[p],
            certificate.reverse_kl[p],
            certificate.forward_kl[p],
        )
        for p in farthest(certificate, _MOST_ROWS - 1)
    ]
    return rows


def _on_support(certificate: CertificateRecord) -> list[FloatArray]:
    """Return KL(policy || posterior) on the posterior's support, in the order of `_rows`."""
    prompts = farthest(certificate, _MOST_ROWS - 1) if len(certificate.reverse_kl) > 1 else []
    return [certificate.pooled.reverse_kl_on_support, *certificate.reverse_kl_on_support[prompts]]


def _draw_evidence(axes: Axes, rows: list[tuple[str, FloatArray, FloatArray, FloatArray, FloatArray]]) -> None:
    """Draw where log Z lies, and the ELBO below it: the space between is KL(policy || posterior)."""
    ends = np.concatenate([np.concatenate([evidence, elbo]) for _, evidence, elbo, _, _ in rows])
    edge = _edge(ends)
    for y, (_, evidence, elbo, _, _) in enumerate(rows):
        _bar(axes, y - 0.14, evidence, edge, _EVIDENCE, "log Z" if y == 0 else None)
        _bar(axes, y + 0.14, elbo, edge, _ELBO, "ELBO of the policy" if y == 0 else None)
    axes.set_xlabel("nats")
    axes.set_title("Evidence", loc="left", pad=22)
    _finish(axes, [row[0] for row in rows])
    legend_above(axes)


def _draw_kls(
    axes: Axes, rows: list[tuple[str, FloatArray, FloatArray, FloatArray, FloatArray]], on_support: list[FloatArray]
) -> None:
    """Draw both KLs as intervals, an open end as an arrow; below it the KL on the posterior's support, if that is finite."""
    ends = [np.concatenate([reverse, forward]) for _, _, _, reverse, forward in rows]
    edge = _edge(np.concatenate([*ends, *on_support]))
    label: str | None = "on its support"
    for y, (_, _, _, reverse, forward) in enumerate(rows):
        _bar(axes, y - 0.14, reverse, edge, BLACK, "KL(policy || posterior)" if y == 0 else None)
        if np.isposinf(reverse[1]) and np.isfinite(on_support[y]).all():
            _bar(axes, y, on_support[y], edge, GREY, label)
            label = None
        _bar(axes, y + 0.14, forward, edge, _FORWARD, "KL(posterior || policy)" if y == 0 else None)
    axes.set_xlim(left=min(0.0, -0.02 * edge[1]))
    axes.set_xlabel("nats")
    axes.set_title("Distance", loc="left", pad=22)
    _finish(axes, ["" for _ in rows])
    legend_above(axes)


def _draw_cells(axes: Axes, certificate: CertificateRecord) -> None:
    """Draw the masses of a feature's cells under policy and posterior."""
    cells = certificate.coverage
    assert cells is not None
    num = min(len(cells.cells), _MOST_ROWS)
    y = np.arange(num)
    for shift, mass, error, colour, label in (
        (-0.19, cells.posterior, cells.posterior_se, _EVIDENCE, "posterior"),
        (0.19, cells.policy, cells.policy_se, _ELBO, "policy"),
    ):
        axes.barh(y + shift, mass[:num], 0.36, color=colour, label=label)
        axes.errorbar(mass[:num], y + shift, xerr=1.96 * error[:num], fmt="none", ecolor=GREY, elinewidth=1)
    dropped = set(map(str, cells.dropped))
    labels = [f"{cell_text(cell)}{' (dropped)' if str(cell) in dropped else ''}" for cell in cells.cells[:num]]
    axes.set_xlabel("mass")
    axes.set_xlim(left=0)
    axes.set_title("Coverage", loc="left", pad=22)
    _finish(axes, labels)
    legend_above(axes)


def _edge(ends: FloatArray) -> tuple[float, float]:
    """Return where open ends are cut off: a little outside of all that is finite."""
    finite = ends[np.isfinite(ends)]
    if not finite.size:
        return -1.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    room = 0.15 * (high - low) or 1.0
    return low - room, high + room


def _bar(axes: Axes, y: float, interval: FloatArray, edge: tuple[float, float], colour: str, label: str | None) -> None:
    """Draw an interval as a bar with ends; an infinite end as an arrowhead at the edge."""
    low, high = float(interval[0]), float(interval[1])
    shown_low, shown_high = max(low, edge[0]), min(high, edge[1])
    shown_low, shown_high = min(shown_low, edge[1]), max(shown_high, edge[0])
    axes.plot([shown_low, shown_high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt", label=label)
    axes.plot([shown_low], [y], marker="<" if np.isneginf(low) else "|", color=colour, markersize=8)
    axes.plot([shown_high], [y], marker=">" if np.isposinf(high) else "|", color=colour, markersize=8)
    if np.isfinite(low) and np.isfinite(high) and high - low < 1e-3:
        axes.annotate(
            number_text(high, 3), (high, y), xytext=(5, 5), textcoords="offset points", fontsize=7.5, color=colour
        )


def _finish(axes: Axes, labels: list[str]) -> None:
    """Label the rows, the first on top."""
    axes.set_yticks(np.arange(len(labels)), [plain_text(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
