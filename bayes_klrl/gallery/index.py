"""Finds the examples of the gallery, and runs them."""

from __future__ import annotations

import ast
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance, glance_of

__all__ = ["ROOMS", "Row", "at_a_glance", "examples", "run_example", "title_of"]

ROOMS = {"language": "Language", "decisions": "Decisions"}


@dataclass(frozen=True)
class Row:
    """A row of the table "At a glance", which the gallery's page and the site's page show.

    Parameters
    ----------
    name, room
        The example, and the folder that it is in.
    glance
        What the example declares.
    helped
        Whether inference helped, with the numbers of a run, or that there was none.
    """

    name: str
    room: str
    glance: Glance
    helped: str


def examples() -> dict[str, Path]:
    """Return the files of the examples by name, in the order of their names."""
    folder = Path(__file__).parent
    files = [file for room in ROOMS for file in (folder / room).glob("*.py") if file.stem != "__init__"]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def title_of(file: Path) -> str:
    """Return the first line of an example's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or file.stem).splitlines()[0]


def at_a_glance(numbers: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Return a row for every example, room by room, from the numbers of those that were run."""
    rows = []
    for name, file in sorted(examples().items(), key=lambda item: list(ROOMS).index(item[1].parent.name)):
        glance = glance_of(file)
        rows.append(Row(name, file.parent.name, glance, glance.helped(numbers.get(name))))
    return rows


def run_example(name: str, out: Path, *, seed: int) -> Finding:
    """Run an example into a folder of its own name below `out`, and return what it found."""
    start = time.perf_counter()
    module = import_module(f"bayes_klrl.gallery.{examples()[name].parent.name}.{name}")
    finding: Finding = module.main(out / name, seed=seed)
    finding.save(seconds=time.perf_counter() - start)
    return finding
