"""The numbers of a frontier as a table, and how they print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.frontier.curves import HEADINGS, LEVEL, QUANTITIES, cells, legend, row_text
from bayes_klrl.analysis.frontier.path import MIN_ESS, UNSEEN_DRAWS
from bayes_klrl.analysis.frontier.record import FrontierRecord
from bayes_klrl.export.html import HtmlTable, html_page

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frontier_html", "frontier_table", "frontier_text"]

_ROWS_SHOWN = 12
_OWN = "*: the posterior's own alpha"


def frontier_table(frontier: FrontierRecord) -> pd.DataFrame:
    """Return one row per alpha, with the columns that `Frontier.table` describes."""
    import pandas as pd

    curves, columns = frontier.mean, dict[str, Any]()
    lower, upper = curves.lower, curves.upper
    for name in QUANTITIES:
        columns |= {
            name: getattr(curves, name),
            f"{name}_lower": np.where(curves.within, lower[name], np.nan),
            f"{name}_upper": np.where(curves.within, upper[name], np.nan),
            f"{name}_valid": curves.valid[name],
        }
    return pd.DataFrame({**columns, "within": curves.within}, index=pd.Index(curves.alphas, name="alpha"))


def frontier_text(frontier: FrontierRecord) -> str:
    """Return about a dozen rows, how far they reach, and best-of-n beside them."""
    shown = _shown(frontier)
    lines = [
        _source(frontier),
        HEADINGS,
        *(row_text(frontier.mean, a, _mark(frontier, a)) for a in shown),
        f"{_OWN}   {legend(frontier.mean, shown)}",
        _reach(frontier),
        *frontier.notes,
    ]
    return "\n".join([*lines, *_best_of_n(frontier)])


def frontier_html(frontier: FrontierRecord) -> str:
    """Return how far the numbers reach, about a dozen rows, and best-of-n, for a notebook."""
    own = frontier.at(frontier.alpha)
    extrapolated = "" if own.within[0] else ", extrapolated"
    verdict = (
        f"At alpha {frontier.alpha:.4g}: E[r] {own.reward[0]:.3f} at {own.kl[0]:.2f} nats from the prior{extrapolated}."
    )
    headings = ("", "alpha", "log evidence", "reward", "KL to prior", "ESS")
    curves, shown = frontier.mean, _shown(frontier)
    marks = [f"{_mark(frontier, a)}{'' if curves.within[a] else '~'}".strip() for a in shown]
    rows = [[mark, f"{curves.alphas[a]:.4g}", *cells(curves, a)] for mark, a in zip(marks, shown, strict=True)]
    table, marked = HtmlTable(headings, rows), f"{_OWN}   {legend(curves, shown)}"
    summary = " ".join((verdict, _reach(frontier), *frontier.notes))
    return html_page(summary, table, marked, _source(frontier), *_best_of_n(frontier))


def _source(frontier: FrontierRecord) -> str:
    """Return how many draws the numbers come from."""
    num_prompts, num_draws = frontier.pool.reward.shape
    prompts = "" if num_prompts == 1 else f" for each of {num_prompts} prompts, means over them"
    return f"Frontier from {num_draws:,} draws{prompts}; ± is a {LEVEL:.0%} interval, 1.96 standard errors"


def _shown(frontier: FrontierRecord) -> list[int]:
    """Return the indices of the alphas that are shown: evenly spread, and the posterior's own."""
    size = frontier.alphas.size
    evenly = np.linspace(0, size - 1, min(_ROWS_SHOWN, size)).round().astype(int)
    return [int(a) for a in np.union1d(evenly, np.flatnonzero(_is_own(frontier)))]


def _is_own(frontier: FrontierRecord) -> np.ndarray:
    """Return which alphas are the posterior's own, (A,)."""
    return np.isclose(frontier.alphas, frontier.alpha, rtol=1e-9)


def _mark(frontier: FrontierRecord, a: int) -> str:
    """Return the mark of the posterior's own alpha, or a space."""
    return "*" if _is_own(frontier)[a] else " "


def _best_of_n(frontier: FrontierRecord) -> list[str]:
    """Return best-of-n in one line, if there is any."""
    each = zip(frontier.best_of_n.n, frontier.best_of_n.reward, frontier.best_of_n.kl, strict=True)
    best = [f"{n}: {reward:.3f} at {kl:.2f}" for n, reward, kl in each if n > 1]
    return [f"Best of n, reward at KL: {', '.join(best)}"] if best else []


def _reach(frontier: FrontierRecord) -> str:
    """Return how far the numbers reach, in words, and what the draws cannot exclude."""
    if np.isinf(frontier.cut):
        return "The draws reach no alpha: draw more."
    return " ".join(filter(None, (_reach_of_draws(frontier), _unseen(frontier))))


def _reach_of_draws(frontier: FrontierRecord) -> str:
    """Return how far the rewards that were drawn tell the curves."""
    low, high = frontier.pool.extremes
    if (low == high).all():
        level = f"the reward {high[0, 0]:.4g}" if len(high) == 1 else "one reward for each prompt"
        return f"All draws have {level}: they show no curve."
    if frontier.cut == 0 and frontier.unseen_cut == 0:
        return "The draws reach every alpha."
    if frontier.cut == 0:
        return "For the rewards that were drawn, the ESS is at least 100 at every alpha."
    each = "" if len(high) == 1 else " for every prompt"
    reach = f"The draws reach down to alpha = {frontier.cut:.4g} (ESS of at least {MIN_ESS}{each})"
    if frontier.extension is None:
        return f"{reach}; below is extrapolation."
    return f"{reach}, the extension down to {1 / frontier.extension.last:.4g}; below is extrapolation."


def _unseen(frontier: FrontierRecord) -> str:
    """Return where rewards that no draw has could decide; nothing where they cannot, or where it is extrapolation anyhow."""
    if np.isnan(frontier.unseen_cut):
        return "Rarer completions of a higher reward cannot be excluded without declared bounds."
    if frontier.unseen_cut <= frontier.cut or frontier.pool.bounds is None:
        return ""
    where = "at every alpha" if np.isinf(frontier.unseen_cut) else f"below alpha = {frontier.unseen_cut:.4g}"
    return (
        f"A completion with a reward up to {frontier.pool.bounds[1]:.4g}, which the declared bounds allow and no draw has "
        f"shown, could move log Z out of its interval {where}; probabilities below "
        f"{UNSEEN_DRAWS / frontier.pool.num_draws:.2g} may stay unseen."
    )
