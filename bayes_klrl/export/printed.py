"""Tables as plain text, the same in a terminal, a file and a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["k_text", "printed"]


def k_text(k: float) -> str:
    """Return a Pareto k as people read it: a dash where there is none, and words where the largest weights are all equal.

    Examples
    --------
    >>> k_text(0.312), k_text(float("nan")), k_text(float("-inf"))
    ('0.31', '-', 'no tail')
    """
    if math.isnan(k):
        return "-"
    return "no tail" if k == -math.inf else f"{k:,.2f}"


def printed(view: Any, notes: Iterable[str] = ()) -> str:
    """Return a table of rich as text without colours, 200 characters wide at most, and the notes below it.

    In a notebook rich would also show what it prints; this does not.
    """
    from rich.console import Console

    console = Console(width=200, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(view)
        for note in notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
