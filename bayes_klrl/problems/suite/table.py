"""The suite's numbers as a table: means over repeats with their intervals, and how they print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.export.printed import printed
from bayes_klrl.problems.suite.cell import SuiteCell

__all__ = ["SuiteTable", "suite_table"]

_NUMBERS = ("log_evidence_error", "abs_log_evidence_error", "kl_posterior", "reward_error")
_MEANS = ("ess", "model_tokens", "training_tokens", "seconds")
_COLUMNS = (
    "log_evidence_error",
    "log_evidence_error_ci",
    "abs_log_evidence_error",
    "kl_sign",
    "kl_posterior",
    "kl_posterior_ci",
    "reward_error",
    "reward_error_ci",
    *_MEANS,
    "answers",
    "purpose",
    "note",
)
_HEADERS = ("log Z error", "KL to posterior", "E\\[r] error", "ESS", "model tokens", "training tokens", "seconds")
_SIGNS = {"<=": "≤ ", "~": "~ "}


class SuiteTable(pd.DataFrame):
    """A DataFrame with one row per problem and method, which prints as a table for people."""

    _constructor: type[pd.DataFrame] = pd.DataFrame  # what slices of it are

    def __rich__(self) -> Any:
        """Return the table as rich draws it."""
        from rich.table import Table

        view = Table(box=None, pad_edge=False, header_style="bold")
        view.add_column("method", no_wrap=True)
        for header in _HEADERS:
            view.add_column(header, justify="right", no_wrap=True)
        for problem in self.index.unique("problem"):
            rows = self.loc[problem]
            view.add_row(f"[bold]{problem}[/]  {rows['purpose'].iloc[0]}", end_section=False)
            for method, row in rows.iterrows():
                view.add_row(f"  {method}", *_cells(row))
        return view

    def __str__(self) -> str:
        notes = (f"{problem}, {method}: {row['note']}" for (problem, method), row in self.iterrows() if row["note"])
        return printed(self, notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_page("Methods against problems of known truth", *self.html_parts())

    def html_parts(self) -> list[HtmlTable | str]:
        """Return the table and the notes, as parts of a page for a notebook."""
        headings = ("problem", "method", *(header.replace("\\[", "[") for header in _HEADERS))
        rows = [[problem, method, *_cells(row)] for (problem, method), row in self.iterrows()]
        notes = [f"{problem}, {method}: {row['note']}" for (problem, method), row in self.iterrows() if row["note"]]
        return [HtmlTable(headings, rows, words=(0, 1)), *notes]


def suite_table(cells: Iterable[SuiteCell], purposes: Mapping[str, str]) -> SuiteTable:
    """Return a table with one row per problem and method, from the cells of all repeats."""
    groups: dict[tuple[str, str], list[SuiteCell]] = {}
    for cell in cells:
        groups.setdefault((cell.problem, cell.method), []).append(cell)
    rows = {key: {**_row(group), "purpose": purposes[key[0]]} for key, group in groups.items()}
    index = pd.MultiIndex.from_tuples(list(rows), names=["problem", "method"])
    return SuiteTable(pd.DataFrame(list(rows.values()), index=index)[list(_COLUMNS)])


def _row(group: list[SuiteCell]) -> dict[str, Any]:
    """Return means over repeats, and 1.96 sd / sqrt(repeats)."""
    answered = [cell for cell in group if not np.isnan(cell.model_tokens)]
    row: dict[str, Any] = {}
    for name in _NUMBERS:
        if name == "abs_log_evidence_error":
            values = np.abs([cell.log_evidence_error for cell in answered])
        else:
            values = np.array([getattr(cell, name) for cell in answered])
        row[name], row[f"{name}_ci"] = _mean_and_interval(values)
    signs = sorted({cell.kl_sign for cell in answered} - {""})
    row["kl_sign"] = signs[-1] if signs else ""
    if row["kl_sign"] == "<=":
        row["kl_posterior"] = max(row["kl_posterior"], 0.0)  # a mean of few repeats can come out below
    for name in _MEANS:
        row[name] = float(np.mean([getattr(cell, name) for cell in answered])) if answered else np.nan
    row["answers"] = len(answered)
    notes = list(dict.fromkeys(cell.note for cell in group if cell.note))
    row["note"] = "; ".join(notes[:1] + ([f"and {len(notes) - 1} more"] if len(notes) > 1 else []))
    return row


def _mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and 1.96 sd / sqrt(R); NaN without values, no interval for one or for infinite ones."""
    if not values.size:
        return np.nan, np.nan
    if values.size < 2 or not np.isfinite(values).all():
        return float(values.mean()), np.nan
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(values.size))


def _cells(row: Any) -> list[str]:
    """Return one row's numbers as people read them."""
    sign = _SIGNS.get(row["kl_sign"], "")
    kl = _with_interval(row["kl_posterior"], row["kl_posterior_ci"])
    return [
        _with_interval(row["log_evidence_error"], row["log_evidence_error_ci"]),
        sign + kl if kl != "-" else kl,
        _with_interval(row["reward_error"], row["reward_error_ci"]),
        *(_number(row[name], 0) for name in ("ess", "model_tokens", "training_tokens")),
        _number(row["seconds"], 2),
    ]


def _with_interval(value: float, half_width: float) -> str:
    """Return "value ± half width", without the second where there is none."""
    text = _number(value)
    return text if np.isnan(half_width) or np.isnan(value) else f"{text} ± {half_width:.3f}"


def _number(value: float, digits: int = 3) -> str:
    """Return a number, a dash where there is none."""
    rounded = round(value, digits) + 0.0 if np.isfinite(value) else value  # no "-0.000"
    return "-" if np.isnan(value) else f"{rounded:,.{digits}f}"
