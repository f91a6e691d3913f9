"""An example at a glance: the job, what people do today, what inference adds, whether it helped, and on what it was measured.

Each example declares its row in a constant, `GLANCE = Glance(...)`, which is read without importing the example. The words are
the author's, and the numbers those of a run: `measured` has places such as {SMC, right:.0%}, which are filled from the numbers
of the finding, and `claims` says what must hold of these numbers for the verdict to stand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bayes_klrl.errors import BayesKLRLError

__all__ = ["Claim", "Glance", "glance_of"]

Claim = tuple[str | float, str | float] | tuple[str | float, str | float, str]
"""(a, b): a > b; (a, b, se): a - b > 2 se. Each is the name of a number, or a number."""

_PLACE = re.compile(r"\{([^{}]+):([^:{}]*)\}")


@dataclass(frozen=True)
class Glance:
    """A row of the table "At a glance".

    Parameters
    ----------
    job
        What is to be done.
    today
        What people do today.
    adds
        What inference adds.
    verdict
        Whether it helped.
    measured
        A sentence with the numbers behind the verdict, as places {name:format} of the finding's `numbers`.
    claims
        What the verdict rests on: pairs (a, b) for a > b, or triples (a, b, se) for a - b > 2 se. See `Claim`.
    picture
        What the example's picture shows: its caption.
    setting
        The model and the data with their sizes, and the words that only this example uses.

    Examples
    --------
    >>> measured, claims = "{count, right:.0%} are right.", (("count, right", 0.5),)
    >>> glance = Glance("add", "guess", "count", "yes", measured, claims, "Right sums.", "Two fingers, four sums.")
    >>> glance.helped({"count, right": 0.75})
    'Yes. 75% are right.'
    >>> glance.helped({"count, right": 0.25})
    'Not in this run. 25% are right.'
    >>> glance.helped(None)
    'not run'
    """

    job: str
    today: str
    adds: str
    verdict: Literal["yes", "partly", "no"]
    measured: str
    claims: tuple[Claim, ...]
    picture: str
    setting: str

    def stands(self, numbers: Mapping[str, float]) -> bool:
        """Return whether all claims hold of the numbers of a run."""

        def value(of: str | float) -> float:
            return numbers[of] if isinstance(of, str) else of

        return all(value(a) - value(b) > 2 * sum(map(value, se)) for a, b, *se in self.claims)

    def helped(self, numbers: Mapping[str, float] | None) -> str:
        """Return the verdict with its numbers, or why there is none; `numbers` is None for an example that was not run."""
        if numbers is None:
            return "not run"
        if not self.names <= numbers.keys():
            return "run again: the numbers are those of an older version"
        said = self.verdict.capitalize() if self.stands(numbers) else "Not in this run"
        return f"{said}. {_PLACE.sub(lambda place: format(numbers[place[1]], place[2]), self.measured)}"

    @property
    def names(self) -> set[str]:
        """Names of the numbers that the row is made of."""
        places = {name for name, _ in _PLACE.findall(self.measured)}
        return places | {part for claim in self.claims for part in claim if isinstance(part, str)}


def glance_of(file: Path) -> Glance:
    """Return the row that an example declares.

    Raises
    ------
    BayesKLRLError
        If its file has no constant `GLANCE = Glance(...)` of literals.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.targets[0]) == "GLANCE"
        ):
            return Glance(**{str(part.arg): ast.literal_eval(part.value) for part in node.value.keywords})
    raise BayesKLRLError(
        f"{file.name} has no row for the gallery's table. Declare GLANCE = Glance(job=..., ...) in it."
    )
