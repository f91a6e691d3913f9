"""The picture of a frontier: reward against KL to the prior, best-of-n and trained policies beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.frontier.curves import NORMAL_QUANTILE, Curves
from bayes_klrl.analysis.frontier.record import FrontierRecord
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
    plain_text,
    spread_out,
    weighted_mean,
)
from bayes_klrl.typing import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_frontier", "policy_point"]

_FRONTIER, _EXTENSION, _BEST_OF_N = COLOURS[0], COLOURS[2], COLOURS[4]
_POLICIES = (COLOURS[1], COLOURS[3], COLOURS[7], COLOURS[6], COLOURS[5])
_NUM_POINTS = 400
_NUM_TICKS = 5
_ESS_MARKS = (1000, 100)


def plot_frontier(frontier: FrontierRecord, file: str | Path, *, policies: Mapping[str, Any] | None = None) -> Path:
    """Draw reward against KL to the prior, means over prompts, and return the file.

    The band is the interval of the curve at equal KL, alpha times that of log Z: the frontier as a function of the reward m
    is max_b [b m - log Z(b)], so to first order only log Z can be wrong.

    Parameters
    ----------
    frontier
        The frontier to draw.
    file
        The PNG to write.
    policies
        Trained policies by name, each in a form that `policy_point` accepts.
    """
    points = {name: policy_point(name, policy) for name, policy in (policies or {}).items()}
    own = frontier.at(frontier.alpha)
    bend = frontier.at(_fine_alphas(frontier))
    with drawing(file, (8.4, 4.9)) as figure:
        axes = figure.subplots()
        x, y = _limits(frontier, bend, own, list(points.values()))
        axes.set(xlim=x, ylim=y, xlabel="KL to the prior (nats)", ylabel="expected reward")
        _draw_curve(axes, frontier, bend)
        _draw_best_of_n(axes, frontier)
        label = f"the posterior's own α = {frontier.alpha:.3g}"
        axes.plot(own.kl, own.reward, "*", color=BLACK, markersize=12, zorder=5, label=label)
        _mark_alphas(axes, bend, own)
        _mark_ess(axes, frontier, bend)
        _draw_policies(axes, points)
        legend_above(axes)
        num_prompts, num_draws = frontier.pool.reward.shape
        prompts = f" for each of {num_prompts} prompts (means)" if num_prompts > 1 else ""
        what = (
            f"The reward-KL frontier from {num_draws:,} draws{prompts}; band: 95% interval, where it can be relied on"
        )
        axes.set_title(what, loc="left", pad=32)
    return Path(file)


def policy_point(name: str, policy: Any) -> tuple[float, float]:
    """Return (KL to the prior, reward) of a policy, means over prompts.

    Parameters
    ----------
    name
        The policy's name, for error messages.
    policy
        The pair itself; or `Draws` of a method with a density, such as those of `Fit.run`.
    """
    if hasattr(policy, "guide") and hasattr(policy, "run"):
        raise BayesKLRLError(f"Policy {name!r} is a Fit: give its draws, fit.run(1000, seed=0).")
    if isinstance(policy, Draws):
        weights = policy.weights
        pair = (kl_to_prior(policy, weights), weighted_mean(weights, policy.reward))
    else:
        try:
            kl, reward = policy
            pair = (float(kl), float(reward))
        except (TypeError, ValueError):
            raise BayesKLRLError(f"Policy {name!r} must be a pair (kl, reward) or Draws; got {policy!r}.") from None
    if not np.isfinite(pair).all():
        raise BayesKLRLError(
            f"Policy {name!r} has KL {pair[0]} and reward {pair[1]}, which no plot can show. Best-of-n has no density, "
            "and -inf no mean: give a pair (kl, reward)."
        )
    return pair


def _fine_alphas(frontier: FrontierRecord) -> FloatArray:
    """Return alphas between the ends of the frontier's grid, so that the curve looks like one; the cut among them."""
    alphas = np.geomspace(frontier.alphas[0], frontier.alphas[-1], _NUM_POINTS)
    if alphas[-1] < frontier.cut < alphas[0]:
        alphas = np.append(alphas, frontier.cut * (1 + 1e-6))
    return np.sort(alphas)[::-1]


def _limits(
    frontier: FrontierRecord, bend: Curves, own: Curves, points: Sequence[tuple[float, float]]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits of both axes: all that is known, a little of the extrapolation, and every policy."""
    known = bend.within
    best = frontier.best_of_n
    finite = np.isfinite(best.reward)
    shown = [(float(own.kl[0]), float(own.reward[0])), *points, *zip(best.kl[finite], best.reward[finite], strict=True)]
    kls, rewards = np.array(shown).T
    kls, rewards = np.append(kls, bend.kl[known]), np.append(rewards, bend.reward[known])
    if not known.any():
        kls, rewards = np.append(kls, bend.kl), np.append(rewards, bend.reward)
    right = max(float(kls.max()) * 1.12, 1e-3)
    in_sight = bend.reward[bend.kl <= right]
    low, high = float(min(rewards.min(), in_sight.min(initial=np.inf))), float(max(rewards.max(), *in_sight, -np.inf))
    margin = 0.07 * max(high - low, 1e-3)
    return (min(0.0, float(kls.min())) - 0.02 * right, right), (low - margin, high + 1.6 * margin)


def _draw_curve(axes: Axes, frontier: FrontierRecord, bend: Curves) -> None:
    """The frontier with its band; dashed where it is extrapolation, green where it comes from the extension.

    No policy is above what is known. Above an extension that is not reliable there may be one.
    """
    cold = bend.inverse_alpha * frontier.cut > 1
    pool, extended, guess = bend.within & ~cold, bend.within & cold, ~bend.within
    top = axes.get_ylim()[1]
    known = pool | (extended & bend.valid["reward"])
    axes.fill_between(bend.kl[known], np.minimum(bend.reward[known], top), top, color="0.94", linewidth=0, zorder=-2)
    with np.errstate(invalid="ignore"):
        half = NORMAL_QUANTILE * bend.alphas * bend.se["log_evidence"]
    lines = (
        (pool, _FRONTIER, "-", "the posteriors of all α (no policy is above)"),
        (extended & bend.valid["reward"], _EXTENSION, "-", "the same, from the extension"),
        (extended & ~bend.valid["reward"], _EXTENSION, ":", "from the extension, not reliable"),
        (_with_neighbour(guess), _FRONTIER, (0, (4, 3)), "past the cut: extrapolation"),
    )
    for where, colour, style, label in lines:
        if not where.any():
            continue
        reward, kl = np.where(where, bend.reward, np.nan), np.where(where, bend.kl, np.nan)
        axes.plot(kl, reward, color=colour, linestyle=style, linewidth=1.8, label=label)
        band = np.where(bend.valid["log_evidence"], half, np.nan)
        axes.fill_between(kl, reward - band, reward + band, color=colour, alpha=0.18, linewidth=0, zorder=-1)


def _with_neighbour(where: np.ndarray) -> np.ndarray:
    """Return the same and the point before each run, so that lines meet."""
    result: np.ndarray = where | np.append(where[1:], False)
    return result


def _draw_best_of_n(axes: Axes, frontier: FrontierRecord) -> None:
    """Best-of-n for n = 2, 4, 8, ..., each labelled below it."""
    curve = frontier.best_of_n
    shown = (curve.n > 1) & np.isfinite(curve.reward)
    if not shown.any():
        return
    kl, reward = curve.kl[shown], curve.reward[shown]
    axes.plot(kl, reward, "s:", color=_BEST_OF_N, markersize=4, linewidth=1, label="best of n")
    size = np.array([np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())])
    previous = np.full(2, -np.inf)
    for n, place in zip(curve.n[shown], zip(kl, reward, strict=True), strict=True):
        if np.abs((np.array(place) - previous) / size).max() > 0.055:
            axes.annotate(f"n={n}", place, (3, -11), textcoords="offset points", fontsize=8, color="#9A6700", zorder=4)
            previous = np.array(place)


def _mark_alphas(axes: Axes, bend: Curves, own: Curves) -> None:
    """A few alphas along the curve, above it, where no policy can be."""
    right = axes.get_xlim()[1]
    seen = np.flatnonzero(bend.within & (bend.kl > 0.1 * right) & (bend.kl < 0.95 * right))
    if not seen.size:
        return
    taken = [float(own.kl[0])]
    for kl in np.linspace(bend.kl[seen[0]], bend.kl[seen[-1]], _NUM_TICKS):
        a = seen[np.abs(bend.kl[seen] - kl).argmin()]
        if min(abs(float(bend.kl[a]) - other) for other in taken) < 0.1 * right:
            continue
        taken.append(float(bend.kl[a]))
        place: Any = (bend.kl[a], bend.reward[a])
        axes.plot(*place, "o", color=_FRONTIER, markersize=3.5)
        text = f"α = {bend.alphas[a]:.2g}"
        axes.annotate(
            text, place, (-4, 8), textcoords="offset points", ha="right", fontsize=8, color=_FRONTIER, zorder=4
        )


def _mark_ess(axes: Axes, frontier: FrontierRecord, bend: Curves) -> None:
    """Lines from the axis to the curve where the draws are worth 1,000 and 100 of the posterior, means over prompts."""
    from_draws = np.isfinite(bend.ess) & (bend.inverse_alpha * frontier.cut <= 1 + 1e-3)
    kl, ess, reward = bend.kl[from_draws], bend.ess[from_draws], bend.reward[from_draws]
    low, right = axes.get_ylim()[0], axes.get_xlim()[1]
    previous = -np.inf
    for mark in _ESS_MARKS:
        if not ess.size or not ess.min() <= 1.01 * mark < ess.max():
            continue
        at, height = (float(np.interp(-np.log(mark), -np.log(ess), values)) for values in (kl, reward))
        if at > right or at - previous < 0.05 * right:
            continue
        previous = at
        axes.plot([at, at], [low, height], color=GREY, linewidth=0.7, linestyle=(0, (2, 2)), zorder=-1)
        axes.annotate(
            f"ESS {mark:,}",
            (at, low),
            (2, 3),
            textcoords="offset points",
            fontsize=7.5,
            color=GREY,
            rotation=90,
            va="bottom",
        )


def _draw_policies(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Trained policies as points, their names in the right margin, in order of reward."""
    if not points:
        return
    low, high = axes.get_ylim()
    heights = spread_out(
        np.array([(reward - low) / (high - low) for _, reward in points.values()]), gap=min(0.08, 0.96 / len(points))
    )
    for number, ((name, (kl, reward)), height) in enumerate(zip(points.items(), heights, strict=True)):
        colour = _POLICIES[number % len(_POLICIES)]
        axes.plot(kl, reward, MARKERS[(number + 2) % len(MARKERS)], color=colour, markersize=7, zorder=6)
        axes.annotate(
            plain_text(name),
            (kl, reward),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 5, "relpos": (0, 0.5)},
        )
