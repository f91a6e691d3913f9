"""Docstrings on the site: formulas stay as they are set, and a citation of the theory becomes a link.

The sources are written to be read as text. A formula stands in an indented block of its own, a length is `|x|`, and a
section of the theory is `theory.md 3.10`. reStructuredText would read the first as a quotation and the second as a
substitution.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

CITATION = re.compile(r"theory\.md (\d+(?:\.\d+)?)")
MORE = re.compile(r"(?<=>`), (\d+\.\d+)")
CODE = re.compile(r"(`[^`]*`)")
FORMULA = re.compile(r"^ {4,}\S")


def linked(line: str) -> str:
    """Return a line of a docstring whose citations of the theory are links."""
    line = CITATION.sub(r":ref:`theory.md \1 <theory-\1>`", line)
    while MORE.search(line):
        line = MORE.sub(r", :ref:`\1 <theory-\1>`", line, count=1)
    return line


def escaped(line: str) -> str:
    """Return a line of prose whose bars outside of code, and stars outside of lists of arguments, are read as they stand."""
    signs = r"\|" if line.startswith(" ") else r"(?<!\*)[|*](?!\*)"
    parts = CODE.split(line)
    return "".join(part if part.startswith("`") else re.sub(f"({signs})", r"\\\1", part) for part in parts)


def with_formulas(lines: list[str]) -> list[str]:
    """Return the lines with every indented block after unindented prose marked as text that is set as it stands."""
    result: list[str] = []
    before, inside, list_item = "", False, False
    for line in lines:
        blank_before = not result or not result[-1].strip()
        if FORMULA.match(line) and blank_before and before and not before.startswith(" ") and not list_item:
            result += ["::", ""]
            inside = True
        elif line.strip() and not line.startswith(" "):
            inside = False
            list_item = line.startswith(("* ", "- ", ">>>"))
        prose = bool(line.strip()) and not inside and not line.lstrip().startswith((">>>", "...", "* "))
        result.append(linked(escaped(line) if prose else line))
        before = line if line.strip() else before
    return result


def _on_docstring(_app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    lines[:] = with_formulas(lines)
    if what in {"attribute", "data", "property"}:
        lines.insert(0, "")  # or napoleon would read what stands before a colon as a type


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension; it reads docstrings before napoleon does."""
    app.connect("autodoc-process-docstring", _on_docstring, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
