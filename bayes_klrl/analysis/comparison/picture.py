"""The picture of a comparison: evidence, reward against KL, effective sample sizes and rewards of several methods.

Several prompts are averaged, which titles say. All densities are in nats.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.plot_style import (
    BLACK,
    COLOURS,
    GREY,
    MARKERS,
    drawing,
    kl_to_prior,
    legend_above,
    number_text,
    plain_text,
    spread_out,
    weighted_mean,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_comparison"]

_MAX_LEVELS = 60  # rewards with no more distinct values than this are drawn as bars


@dataclass(frozen=True)
class _Row:
    """One method: its look, and the numbers that the panels show, means over prompts, NaN where undefined."""

    name: str
    draws: Draws
    colour: str
    marker: str
    log_evidence: float
    log_evidence_se: float
    elbo: float
    reward: float
    kl: float


def plot_comparison(
    results: Mapping[str, Draws],
    file: str | Path,
    *,
    log_evidence: ArrayLike | None = None,
    kl: Mapping[str, float] | None = None,
) -> Path:
    """Draw evidence, reward against KL, effective sample sizes and rewards of several methods; return the file.

    Parameters
    ----------
    results
        The draws of each method, by name.
    file
        The PNG to write.
    log_evidence
        The exact log Z of each prompt, or its mean over prompts. None: that of a method `Exact`, if there is one.
    kl
        KL of each method's answer to the prior, in nats, mean over prompts. If it is None, or NaN for a method, it is taken
        from the draws: E[r] / alpha - log Z for weighted draws, mean(log q - log p0) for draws from a guide.
    """
    if not results:
        raise BayesKLRLError("There is nothing to plot: results is empty.")
    rows = _rows(results, kl or {})
    exact = _exact_log_evidence(rows, log_evidence)
    height = 2.1 + 0.34 * len(rows)
    with drawing(file, (9.6, max(2 * height, 6.2))) as figure:
        panels = figure.subplots(2, 2, width_ratios=(1.0, 1.0))
        (evidence, plane), (ess, rewards) = panels
        _draw_evidence(evidence, rows, exact)
        _draw_plane(plane, rows, exact)
        _draw_ess(ess, rows)
        _draw_rewards(rewards, rows)
        num_prompts = rows[0].draws.shape[0]
        if num_prompts > 1:
            figure.suptitle(f"Averages over {num_prompts} prompts", fontsize=10)
    return Path(file)


def _rows(results: Mapping[str, Draws], kl: Mapping[str, float]) -> list[_Row]:
    """Return the rows to draw, in the order given; `Exact` is black, the others take colours in turn."""
    rows: list[_Row] = []
    for name, draws in results.items():
        number = sum(row.colour != BLACK for row in rows)
        weights = draws.weights
        given = kl.get(name, np.nan)
        rows.append(
            _Row(
                name=textwrap.fill(plain_text(name), 24),
                draws=draws,
                colour=BLACK if draws.method == "Exact" else COLOURS[number % len(COLOURS)],
                marker="*" if draws.method == "Exact" else MARKERS[number % len(MARKERS)],
                log_evidence=float(draws.log_evidence.mean()),
                log_evidence_se=float(np.sqrt(np.square(draws.log_evidence_se).sum()) / draws.shape[0]),
                elbo=float(draws.elbo.mean()),
                reward=weighted_mean(weights, draws.reward),
                kl=kl_to_prior(draws, weights) if np.isnan(given) else given,
            )
        )
    return rows


def _exact_log_evidence(rows: Sequence[_Row], given: ArrayLike | None) -> float:
    """Return the exact log Z, a mean over prompts; NaN if it is not known."""
    if given is not None:
        return float(np.mean(np.asarray(given, dtype=np.float64)))
    return next((row.log_evidence for row in rows if row.draws.method == "Exact"), float("nan"))


def _draw_evidence(axes: Axes, rows: Sequence[_Row], exact: float) -> None:
    """Panel a: log evidence with two standard errors, and ELBOs; ELBOs far below are marked at the edge."""
    _name_rows(axes, rows)
    low, high = _evidence_limits(rows, exact)
    axes.set_xlim(low, high)
    if np.isfinite(exact):
        axes.axvline(exact, color=BLACK, linewidth=1, label=f"exact: {exact:.3f}")
    across = axes.get_yaxis_transform()
    for y, row in enumerate(rows):
        known = np.isfinite(row.log_evidence)
        error = 2 * row.log_evidence_se if np.isfinite(row.log_evidence_se) else 0.0
        hollow: Any = {"color": row.colour, "markerfacecolor": "white", "markersize": 5}
        if known:
            axes.errorbar(row.log_evidence, y, xerr=error, color=row.colour, fmt=row.marker, capsize=3)
        if row.elbo >= low:
            axes.plot(row.elbo, y, "D", **hollow)
        elif row.elbo < low:
            axes.plot(0.012, y, "<", transform=across, **hollow)
            if known:
                axes.text(
                    0.04, y, f"ELBO {number_text(row.elbo, 1)}", transform=across, va="center", color=GREY, fontsize=8
                )
        if known:
            _remark(axes, y, number_text(row.log_evidence, 3) + (f" ± {error:.3f}" if error > 0 else ""))
        elif np.isneginf(row.log_evidence):
            _remark(axes, y, "no positive weight")
        else:
            _remark(axes, y, "no estimate" if np.isnan(row.elbo) else f"ELBO {number_text(row.elbo, 3)}")
    axes.plot([], [], "o", color=GREY, label="log evidence ± 2 se")
    axes.plot([], [], "D", color=GREY, markerfacecolor="white", markersize=5, label="ELBO")
    legend_above(axes)
    axes.set_title("(a) Log evidence and its lower bound", loc="left", pad=21)
    axes.set_xlabel("log evidence (nats)")


def _evidence_limits(rows: Sequence[_Row], exact: float) -> tuple[float, float]:
    """Return limits that show every error bar, and the ELBOs that do not dwarf them."""
    se = np.nan_to_num([row.log_evidence_se for row in rows], nan=0.0, posinf=0.0)
    middle, elbo = np.array([row.log_evidence for row in rows]), np.array([row.elbo for row in rows])
    elbo = elbo[np.isfinite(elbo)]
    ends = np.concatenate([middle - 2 * se, middle + 2 * se, [exact]])
    ends = ends[np.isfinite(ends)]
    if not ends.size:
        ends = elbo if elbo.size else np.zeros(1)
    span = max(np.ptp(ends), 0.2)
    shown = np.concatenate([ends, elbo[elbo >= ends.min() - 4 * span]])
    margin = 0.08 * max(np.ptp(shown), span)
    return float(shown.min() - margin), float(shown.max() + margin)


def _draw_plane(axes: Axes, rows: Sequence[_Row], exact: float) -> None:
    """Panel b: E[r] against KL to the prior, under the line that no policy can cross: E[r] / alpha - KL = log Z."""
    shown = [row for row in rows if np.isfinite(row.kl) and np.isfinite(row.reward)]
    axes.set_title("(b) Reward bought with distance from the prior", loc="left", pad=21)
    missing = [row.name.replace("\n", " ") for row in rows if row not in shown]
    unknown = f"\nnot shown, KL unknown: {', '.join(missing)}" if missing else ""
    axes.set(xlabel=f"KL to the prior (nats){unknown}", ylabel="expected reward")
    if not shown:
        axes.set(xticks=[], yticks=[])
        return
    for row in shown:
        axes.plot(row.kl, row.reward, row.marker, color=row.colour, markersize=11 if row.marker == "*" else 7)
    kls, rewards = np.array([row.kl for row in shown]), np.array([row.reward for row in shown])
    pad_kl, pad_reward = 0.15 * max(np.ptp(kls), 0.1), 0.2 * max(np.ptp(rewards), 0.05)
    x = np.array([kls.min() - pad_kl, kls.max() + pad_kl])
    y = np.array([rewards.min() - pad_reward, rewards.max() + pad_reward])
    axes.set(xlim=x, ylim=y)
    if np.isfinite(exact):
        ceiling = shown[0].draws.alpha * (exact + x)
        axes.plot(x, ceiling, color=BLACK, linewidth=1, label="E[r] / α − KL = log Z: no policy is above", zorder=0)
        axes.fill_between(x, ceiling, max(y[1], ceiling.max()), color="0.93", zorder=-1)
        legend_above(axes)
    heights = spread_out((rewards - y[0]) / (y[1] - y[0]), gap=min(0.09, 0.96 / len(shown)))
    for row, height in zip(shown, heights, strict=True):
        axes.annotate(
            row.name,
            (row.kl, row.reward),
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            color=row.colour,
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": row.colour, "linewidth": 0.6, "shrinkB": 5, "relpos": (0, 0.5)},
        )


def _draw_ess(axes: Axes, rows: Sequence[_Row]) -> None:
    """Panel c: the effective share of the draws, with the numbers; of several prompts, the worst."""
    _name_rows(axes, rows)
    shares = [float(row.draws.ess.min()) / row.draws.shape[1] for row in rows]
    left = min([0.01, *(share / 3 for share in shares if share > 0)])
    axes.set(xscale="log", xlim=(left, 1))
    for y, (row, share) in enumerate(zip(rows, shares, strict=True)):
        if np.isnan(share):
            text = "equal weights" if (row.draws.log_weights == 0).all() else "every completion"
        else:
            axes.barh(y, max(share - left, 0), left=left, color=row.colour, height=0.6)
            ess, k = float(row.draws.ess.min()), float(row.draws.pareto_k.max())
            text = f"{ess:,.{0 if ess >= 10 else 1}f} of {row.draws.shape[1]:,}"
            text += f", k {number_text(k, 2)}" if np.isfinite(k) else ""
        _remark(axes, y, text)
    worst = ", worst prompt" if rows[0].draws.shape[0] > 1 else ""
    axes.set_title("(c) How many draws the weights are worth", loc="left")
    axes.set_xlabel(f"effective sample size / draws{worst}  (k: Pareto tail)")


def _draw_rewards(axes: Axes, rows: Sequence[_Row]) -> None:
    """Panel d: the distribution of the reward under each answer, on the rows of panel c."""
    _name_rows(axes, rows)
    axes.tick_params(labelleft=False)
    masses = [row.draws.weights.ravel() / row.draws.shape[0] for row in rows]
    values = [row.draws.reward.ravel() for row in rows]
    kept = [(mass > 0) & np.isfinite(value) for mass, value in zip(masses, values, strict=True)]
    pooled = np.concatenate([value[keep] for value, keep in zip(values, kept, strict=True)])
    levels = np.unique(np.round(pooled, 9))
    axes.set_title("(d) Rewards under each answer", loc="left")
    axes.set_xlabel("reward (| mean; each row scaled to its own height)")
    if not pooled.size:
        return
    extent = max(np.ptp(levels), 1e-9) if levels.size > 1 else 1.0
    for y, (row, mass, value, keep) in enumerate(zip(rows, masses, values, kept, strict=True)):
        if not keep.any():
            continue
        if levels.size <= _MAX_LEVELS:
            heights = np.array([mass[keep][np.abs(value[keep] - level) < 1e-8].sum() for level in levels])
            width = max(0.8 * np.diff(levels).min(initial=extent), extent / 120)
            centres = levels
        else:
            heights, edges = np.histogram(value[keep], bins=40, range=(levels[0], levels[-1]), weights=mass[keep])
            width, centres = edges[1] - edges[0], (edges[1:] + edges[:-1]) / 2
        axes.bar(
            centres,
            -0.8 * heights / heights.max(),
            width,
            bottom=y + 0.4,
            color=row.colour,
            alpha=0.75,
            linewidth=0,
        )
        axes.plot([row.reward] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.4)
    axes.set_xlim(levels[0] - 0.05 * extent, levels[-1] + 0.05 * extent)


def _name_rows(axes: Axes, rows: Sequence[_Row]) -> None:
    """Make one row per method, the first on top."""
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _remark(axes: Axes, y: float, text: str) -> None:
    """Write a number to the right of a row."""
    axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="0.25")
