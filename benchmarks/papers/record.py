"""A paper's claims, our numbers and the verdicts: what is printed, and what is written as JSON.

A cell of a table is a text, a number, or an `Interval`: the mean over seeds and 1.96 standard deviations over the
square root of their number, as Zhao et al. (2024) print it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["VERDICTS", "Cell", "Claim", "Interval", "Paper", "Table", "interval"]

VERDICTS = ("reproduced", "partly", "not reproduced")
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the half-width of its interval.

    Examples
    --------
    >>> str(Interval(0.12345, 0.01, 5))
    '0.123 ± 0.010'
    """

    mean: float
    half_width: float
    num_seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


Cell: TypeAlias = "str | int | float | Interval"


def interval(values: ArrayLike) -> Interval:
    """Return the mean of one value per seed, and 1.96 sd / sqrt(number of seeds); the latter is NaN for one seed.

    Examples
    --------
    >>> interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    each = np.asarray(values, dtype=np.float64).ravel()
    half = _NORMAL_95 * float(each.std(ddof=1)) / np.sqrt(each.size) if each.size > 1 else float("nan")
    return Interval(float(each.mean()), float(half), each.size)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, whether our numbers say the same, and why not where they do not."""

    published: str
    verdict: str
    why: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"A verdict is one of {VERDICTS}; got {self.verdict!r}.")


@dataclass(frozen=True)
class Table:
    """Numbers with names: `rows` has one cell for each of `columns`."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"Each row of {self.caption!r} must have {len(self.columns)} cells.")

    def markdown(self) -> str:
        """Return the table as Markdown.

        Examples
        --------
        >>> print(Table("two numbers", ("name", "value"), (("a", 0.5), ("b", 2))).markdown())
        two numbers
        <BLANKLINE>
        | name | value |
        |---|---|
        | a | 0.5 |
        | b | 2 |
        """
        lines = [_row(self.columns), "|" + "---|" * len(self.columns), *map(_row, self.rows)]
        return f"{self.caption}\n\n" + "\n".join(lines)


@dataclass(frozen=True)
class Paper:
    """A paper: its claims with verdicts, the setting they were tried in, and the tables.

    Parameters
    ----------
    name, title
        The name of its file, and author, year and title.
    setting
        What was computed, in one or two sentences.
    claims, tables
        The claims with their verdicts, and the numbers they rest on.
    num_seeds, cpu_seconds
        The number of seeds of whatever is random, and what the study took.
    """

    name: str
    title: str
    setting: str
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    num_seeds: int
    cpu_seconds: float = field(default=float("nan"))

    @property
    def command(self) -> str:
        """The command that computes the tables."""
        return f"python -m benchmarks.papers {self.name}"

    @property
    def verdict(self) -> str:
        """The verdict of all claims together: "partly" where they differ."""
        verdicts = {claim.verdict for claim in self.claims}
        return verdicts.pop() if len(verdicts) == 1 else "partly"

    def taking(self, cpu_seconds: float) -> Paper:
        """Return the same study with its CPU seconds."""
        return replace(self, cpu_seconds=cpu_seconds)

    def markdown(self) -> str:
        """Return everything as Markdown, the tables last."""
        claims = [_row(("claim", "verdict", "why")), "|---|---|---|"]
        claims += [_row((claim.published, claim.verdict, claim.why)) for claim in self.claims]
        head = f"{self.title}: {self.verdict}\n\n{self.setting}\n\n`{self.command}`, {self.cpu_seconds:.0f} CPU seconds"
        return "\n\n".join([head, "\n".join(claims), *(table.markdown() for table in self.tables)])

    def write(self, folder: str | Path) -> Path:
        """Write `NAME.json` into a folder, which is made if it is not there, and return the file."""
        content = asdict(self) | {"command": self.command, "verdict": self.verdict}
        file = Path(folder) / f"{self.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return file


def _row(cells: Sequence[Cell]) -> str:
    """Return one line of a Markdown table; bars within cells are escaped."""
    texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
