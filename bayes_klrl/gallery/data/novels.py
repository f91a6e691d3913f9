"""Passages of Jane Austen's six novels without their names, to be told apart; see `gallery/shipped/passages`.

They are of chapters that neither the language model `austen` nor the classifier `passages_lm` learned from: 40 of each novel
in the part "labelled", and 40, of other chapters, in the part "unseen".
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import IntArray

__all__ = ["MASK", "NOVELS", "SHIPPED", "Passages", "passages"]

NOVELS = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)
MASK = "——"
"""What stands for every name of a person or a place."""
SHIPPED = Path(__file__).parents[1] / "shipped" / "passages"


@dataclass(frozen=True, eq=False)
class Passages:
    """Some passages, in the order of the novels.

    Parameters
    ----------
    prompts
        The P texts, one sentence a line.
    labels
        The number of the novel in `NOVELS` that each is from, shape (P,).
    chapters
        The chapter that each is from, numbered through the volumes, (P,).
    """

    prompts: tuple[str, ...]
    labels: IntArray
    chapters: IntArray

    def select(self, rows: Sequence[int] | IntArray) -> Passages:
        """Return some of the passages."""
        chosen = np.asarray(rows, dtype=np.int64)
        return Passages(tuple(self.prompts[row] for row in chosen), self.labels[chosen], self.chapters[chosen])


def passages(part: str) -> Passages:
    """Return the passages of a part, "labelled" or "unseen".

    Examples
    --------
    >>> some = passages("unseen")
    >>> len(some.prompts), NOVELS[some.labels[0]]
    (240, 'Emma')
    """
    with gzip.open(SHIPPED / "passages.json.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in json.load(file) if row["part"] == part]
    if not rows:
        raise BayesKLRLError(f"There is no part {part!r} of the passages; take 'labelled' or 'unseen'.")
    labels = np.array([NOVELS.index(row["novel"]) for row in rows])
    return Passages(tuple(row["text"] for row in rows), labels, np.array([row["chapter"] for row in rows]))
