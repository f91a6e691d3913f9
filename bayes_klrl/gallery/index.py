"""Finds the examples of the gallery, runs them, and writes the page that links their reports."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterable
from html import escape
from importlib import import_module
from pathlib import Path

from bayes_klrl.analysis.report.page import Section, document, picture_of_file
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.whole_files import write_whole

__all__ = ["examples", "run_example", "title_of", "write_index"]

_ROOMS = ("language", "decisions")


def examples() -> dict[str, Path]:
    """Return the files of the examples by name, in the order of their names."""
    folder = Path(__file__).parent
    files = [file for room in _ROOMS for file in (folder / room).glob("*.py") if file.stem != "__init__"]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def title_of(file: Path) -> str:
    """Return the first line of an example's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or file.stem).splitlines()[0]


def run_example(name: str, out: Path, *, seed: int) -> Finding:
    """Run an example into a folder of its own name below `out`, and return what it found."""
    start = time.perf_counter()
    module = import_module(f"bayes_klrl.gallery.{examples()[name].parent.name}.{name}")
    finding: Finding = module.main(out / name, seed=seed)
    finding.save(seconds=time.perf_counter() - start)
    return finding


def write_index(names: Iterable[str], out: Path) -> Path:
    """Write the page with what each example found and a link to its report, from the folders below `out`."""
    sections = [_section(name, out) for name in names]
    return write_whole(out / "index.html", document("Gallery of bayes_klrl", [], sections))


def _section(name: str, out: Path) -> Section:
    """Return the part of the index page for an example that has been run."""
    found = Finding.load(out / name)
    title = title_of(examples()[name])
    body = (
        f"<p>{escape(title)}</p>{picture_of_file(out / name / str(found['picture']), title)}"
        f"<p><strong>Where inference is better.</strong> {escape(str(found['better']))}</p>"
        f"<p><strong>Where it is not.</strong> {escape(str(found['worse']))}</p>"
        f'<p><a href="{name}/{found["report"]}">The report of {name}</a>, made in {found["seconds"]:.0f} s</p>'
    )
    return Section(name, body)
