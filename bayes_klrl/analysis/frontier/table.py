"""The numbers of a frontier as a table, and how they print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.frontier.path import LEVEL, QUANTITIES, UNSEEN_DRAWS
from bayes_klrl.analysis.frontier.record import FrontierRecord
from bayes_klrl.export.html import HtmlTable, html_page

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frontier_html", "frontier_table", "frontier_text"]

_ROWS_SHOWN = 12
_LEGEND = "* the posterior's own alpha   (..) interval not reliable   ~ extrapolation"


def frontier_table(frontier: FrontierRecord) -> pd.DataFrame:
    """Return one row per alpha, with the columns that `Frontier.table` describes."""
    import pandas as pd

    curves, columns = frontier.mean, dict[str, Any]()
    lower, upper = curves.lower, curves.upper
    for name in QUANTITIES:
        columns |= {
            name: getattr(curves, name),
            f"{name}_lower": lower[name],
            f"{name}_upper": upper[name],
            f"{name}_valid": curves.valid[name],
        }
    return pd.DataFrame({**columns, "within": curves.within}, index=pd.Index(curves.alphas, name="alpha"))


def frontier_text(frontier: FrontierRecord) -> str:
    """Return about a dozen rows, how far they reach, and best-of-n beside them."""
    lines = [
        _source(frontier),
        f"{'alpha':>12}{'log evidence':>20}{'reward':>20}{'KL to prior':>20}{'ESS':>10}",
        *(_line(frontier, a) for a in _shown(frontier)),
        _LEGEND,
        _reach(frontier),
    ]
    return "\n".join([*lines, *_best_of_n(frontier)])


def frontier_html(frontier: FrontierRecord) -> str:
    """Return how far the numbers reach, about a dozen rows, and best-of-n, for a notebook."""
    own = frontier.at(frontier.alpha)
    verdict = f"At alpha {frontier.alpha:.4g}: E[r] {own.reward[0]:.3f} at {own.kl[0]:.2f} nats from the prior."
    headings = ("", "alpha", "log evidence", "reward", "KL to prior", "ESS")
    rows = [[_mark(frontier, a).strip(), f"{frontier.alphas[a]:.4g}", *_cells(frontier, a)] for a in _shown(frontier)]
    table = HtmlTable(headings, rows)
    return html_page(f"{verdict} {_reach(frontier)}", table, _LEGEND, _source(frontier), *_best_of_n(frontier))


def _source(frontier: FrontierRecord) -> str:
    """Return how many draws the numbers come from."""
    num_prompts, num_draws = frontier.pool.reward.shape
    prompts = "" if num_prompts == 1 else f" for each of {num_prompts} prompts, means over them"
    return f"Frontier from {num_draws:,} draws{prompts}; {LEVEL:.0%} intervals"


def _shown(frontier: FrontierRecord) -> list[int]:
    """Return the indices of the alphas that are shown: evenly spread, and the posterior's own."""
    size = frontier.alphas.size
    evenly = np.linspace(0, size - 1, min(_ROWS_SHOWN, size)).round().astype(int)
    return [int(a) for a in np.union1d(evenly, np.flatnonzero(_is_own(frontier)))]


def _is_own(frontier: FrontierRecord) -> np.ndarray:
    """Return which alphas are the posterior's own, (A,)."""
    return np.isclose(frontier.alphas, frontier.alpha, rtol=1e-9)


def _mark(frontier: FrontierRecord, a: int) -> str:
    """Return the two marks in front of an alpha, as the legend explains them."""
    return f"{'*' if _is_own(frontier)[a] else ' '}{' ' if frontier.mean.within[a] else '~'}"


def _cells(frontier: FrontierRecord, a: int) -> list[str]:
    """Return the numbers at one alpha: log evidence, reward and KL with their intervals, and ESS."""
    curves, cells = frontier.mean, []
    for name in ("log_evidence", "reward", "kl"):
        half = (curves.upper[name][a] - curves.lower[name][a]) / 2
        shown = "" if np.isnan(half) else f"± {half:.3f}" if curves.valid[name][a] else f"(± {half:.3f})"
        cells.append(f"{getattr(curves, name)[a]:.3f} {shown}".rstrip())
    return [*cells, "" if np.isnan(curves.ess[a]) else f"{curves.ess[a]:,.0f}"]


def _line(frontier: FrontierRecord, a: int) -> str:
    """Return the line of one alpha."""
    *numbers, ess = _cells(frontier, a)
    return f"{_mark(frontier, a)}{frontier.alphas[a]:>10.4g}{''.join(f'{cell:>20}' for cell in numbers)}{ess:>10}"


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
    reach = f"The draws reach down to alpha = {frontier.cut:.4g}"
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
