"""The numbers of a frontier as a table, and how they print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.frontier.path import LEVEL, QUANTITIES
from bayes_klrl.analysis.frontier.record import FrontierRecord

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frontier_table", "frontier_text"]

_ROWS_SHOWN = 12


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
    num_prompts, num_draws = frontier.pool.reward.shape
    prompts = "" if num_prompts == 1 else f" for each of {num_prompts} prompts, means over them"
    own = np.isclose(frontier.alphas, frontier.alpha, rtol=1e-9)
    evenly = np.linspace(0, own.size - 1, min(_ROWS_SHOWN, own.size)).round().astype(int)
    lines = [
        f"Frontier from {num_draws:,} draws{prompts}; {LEVEL:.0%} intervals",
        f"{'alpha':>12}{'log evidence':>20}{'reward':>20}{'KL to prior':>20}{'ESS':>10}",
        *(_row(frontier, int(a), "*" if own[a] else " ") for a in np.union1d(evenly, np.flatnonzero(own))),
        "* the posterior's own alpha   (..) interval not reliable   ~ extrapolation",
        _reach(frontier),
    ]
    each = zip(frontier.best_of_n.n, frontier.best_of_n.reward, frontier.best_of_n.kl, strict=True)
    best = [f"{n}: {reward:.3f} at {kl:.2f}" for n, reward, kl in each if n > 1]
    return "\n".join([*lines, *([f"Best of n, reward at KL: {', '.join(best)}"] if best else [])])


def _row(frontier: FrontierRecord, a: int, mark: str) -> str:
    """Return the line of one alpha."""
    curves, cells = frontier.mean, ""
    for name in ("log_evidence", "reward", "kl"):
        half = (curves.upper[name][a] - curves.lower[name][a]) / 2
        shown = "" if np.isnan(half) else f"± {half:.3f}" if curves.valid[name][a] else f"(± {half:.3f})"
        cells += f"{getattr(curves, name)[a]:.3f} {shown}".rstrip().rjust(20)
    ess = "" if np.isnan(curves.ess[a]) else f"{curves.ess[a]:,.0f}"
    return f"{mark}{' ' if curves.within[a] else '~'}{curves.alphas[a]:>10.4g}{cells}{ess:>10}"


def _reach(frontier: FrontierRecord) -> str:
    """Return how far the numbers reach, in words."""
    if frontier.cut == 0:
        return "The draws reach every alpha."
    if np.isinf(frontier.cut):
        return "The draws reach no alpha: draw more."
    reach = f"The draws reach down to alpha = {frontier.cut:.4g}"
    if frontier.extension is None:
        return f"{reach}; below is extrapolation."
    return f"{reach}, the extension down to {1 / frontier.extension.last:.4g}; below is extrapolation."
