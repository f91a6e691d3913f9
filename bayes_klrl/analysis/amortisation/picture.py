"""The picture of an amortisation: distances to the posterior on both sets of prompts, each prompt, and the cost of a draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.amortisation.record import AmortisationRecord
from bayes_klrl.analysis.amortisation.table import POLICIES, amortisation_table
from bayes_klrl.analysis.comparison.table import count_text
from bayes_klrl.export.plot_style import COLOURS, GREY, drawing, legend_above, number_text, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_amortisation"]

_LOOK: Any = {"training": {"color": COLOURS[0], "marker": "o"}, "unseen": {"color": COLOURS[1], "marker": "D"}}


def plot_amortisation(amortisation: AmortisationRecord, file: str | Path) -> Path:
    """Draw an amortisation and return the file.

    Parameters
    ----------
    amortisation
        The amortisation to draw.
    file
        The PNG to write.
    """
    with drawing(file, (12.0, 3.8)) as figure:
        axes = figure.subplots(1, 3, width_ratios=(1.1, 1.0, 1.1))
        _draw_distances(axes[0], amortisation)
        _draw_prompts(axes[1], amortisation)
        _draw_cost(axes[2], amortisation)
    return Path(file)


def _draw_distances(axes: Axes, amortisation: AmortisationRecord) -> None:
    """Panel a: the mean KL to the posterior, with its bounds; an open end is an arrow."""
    table = amortisation_table(amortisation)
    rows = [(prompts, policy) for policy in POLICIES for prompts in ("training", "unseen")]
    values = table.loc[rows, ["kl_posterior", "kl_posterior_low", "kl_posterior_high"]].to_numpy()
    right = 1.1 * float(np.nanmax(np.where(np.isfinite(values), values, np.nan), initial=0.1))
    for y, ((prompts, _), (middle, low, high)) in enumerate(zip(rows, values, strict=True)):
        shown_low, shown_high = np.minimum([low, high], right)
        axes.plot([shown_low, shown_high], [y, y], color=_LOOK[prompts]["color"], linewidth=2.5)
        if high > right:
            axes.plot([right], [y], ">", color=_LOOK[prompts]["color"], markersize=7)
        if np.isfinite(middle):
            axes.plot([middle], [y], **_LOOK[prompts], markersize=5)
            axes.annotate(
                number_text(middle, 2), (middle, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_yticks(range(len(rows)), [f"{policy}, {prompts}" for prompts, policy in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlim(0, right * 1.02)
    axes.set_xlabel("KL(policy || posterior), nats: mean and bounds")
    axes.set_title("(a) Distance from the posterior", loc="left")


def _draw_prompts(axes: Axes, amortisation: AmortisationRecord) -> None:
    """Panel b: the guide's distance against the prior's, a point per prompt; on the diagonal nothing was gained."""
    ends = [0.1]
    for prompts, judged in (("training", amortisation.training), ("unseen", amortisation.unseen)):
        prior, guide = judged.kl["prior"], judged.kl["guide"]
        kept = np.isfinite(prior) & np.isfinite(guide)
        label = f"{len(prior)} {prompts} prompts"
        axes.plot(prior[kept], guide[kept], **_LOOK[prompts], linestyle="none", markersize=4, alpha=0.8, label=label)
        ends += [*prior[kept], *guide[kept]]
    low, high = min(0.0, *ends), 1.08 * max(ends)
    axes.plot([0, high], [0, high], color=GREY, linewidth=0.8, zorder=0)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="KL(prior || posterior), nats", ylabel="KL(guide || posterior), nats")
    axes.set_title("(b) Each prompt, estimates", loc="left", pad=21)
    legend_above(axes)


def _draw_cost(axes: Axes, amortisation: AmortisationRecord) -> None:
    """Panel c: model tokens per effective draw on unseen prompts; a policy's draws are its own, and hollow."""
    table = amortisation_table(amortisation).loc["unseen"]
    cost = table["tokens_per_effective_draw"]
    shown = cost[np.isfinite(cost) & (cost > 0)]
    left = 0.5 * float(shown.min()) if len(shown) else 1.0
    axes.set_xscale("log")
    for y, (name, value) in enumerate(cost.items()):
        if name not in shown.index:
            axes.text(0.02, y, "unknown", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
            continue
        hollow = name in POLICIES
        look: Any = {"facecolor": "white", "edgecolor": COLOURS[0], "hatch": "///"} if hollow else {"color": COLOURS[0]}
        axes.barh(y, value - left, left=left, height=0.6, **look)
        own = f", {number_text(float(table.loc[name, 'kl_posterior']), 2)} nats away" if hollow else ""
        axes.text(value * 1.08, y, f"{count_text(value)}{own}", va="center", fontsize=8)
    axes.set_yticks(range(len(cost)), [plain_text(str(name)) for name in cost.index])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(cost) - 0.5, -0.6)
    axes.set_xlim(left, 4 * float(shown.max()) if len(shown) else 10.0)
    axes.set_xlabel(
        "model tokens per effective draw, training apart\n(hatched: draws of the policy, not of the posterior)"
    )
    axes.set_title("(c) Cost on unseen prompts", loc="left")
