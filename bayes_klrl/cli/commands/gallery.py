"""`bayes-klrl gallery`: what KL-regularised RL as inference is good for, as examples that end in a report."""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from bayes_klrl.cli.application import Seed, app, errors_as_messages, out_console, out_option
from bayes_klrl.errors import BayesKLRLError

__all__ = ["examples", "gallery"]


@app.command()
@errors_as_messages
def gallery(
    name: Annotated[
        str | None, typer.Argument(help="Name of an example, or all. Default: list them.", show_default=False)
    ] = None,
    out: Annotated[
        Path, out_option("Folder for a folder of each example, with its report, and for the index page.")
    ] = Path("bayes-klrl-gallery"),
    seed: Seed = 0,
) -> None:
    """Run examples of what this is good for; each ends in a report.

    An example takes a few minutes at most. `all` runs all of them and writes index.html.
    """
    from importlib import import_module

    found = examples()
    if name is None:
        for each, file in found.items():
            out_console().print(f"{each}: {title_of(file)}", markup=False, highlight=False)
        return
    if name != "all" and name not in found:
        raise BayesKLRLError(f"There is no example {name!r} in the gallery. Choose from {', '.join(found)}, or all.")
    chosen = found if name == "all" else {name: found[name]}
    for each in chosen:
        report = import_module(f"bayes_klrl.gallery.{each}").main(out / each, seed=seed)
        out_console().print(f"Wrote {report}", markup=False, highlight=False)
    if name == "all":
        out_console().print(f"Wrote {write_index(chosen, out)}", markup=False, highlight=False)


def examples() -> dict[str, Path]:
    """Return the files of the examples by name."""
    folder = Path(__file__).parents[2] / "gallery"
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def title_of(file: Path) -> str:
    """Return the first line of an example's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or file.stem).splitlines()[0]


def write_index(chosen: dict[str, Path], out: Path) -> Path:
    """Write a page with a link to the report of each example, and return it."""
    from bayes_klrl.analysis.report.page import Section, document
    from bayes_klrl.whole_files import write_whole

    sections = [
        Section(name, f'<p>{escape(title_of(file))}</p><p><a href="{name}/report.html">The report of {name}</a></p>')
        for name, file in chosen.items()
    ]
    return write_whole(out / "index.html", document("Gallery of bayes_klrl", [], sections))
