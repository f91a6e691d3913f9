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
    import runpy

    found = examples()
    if name is None:
        for each, file in found.items():
            out_console().print(f"{each}: {title_of(file)}", markup=False, highlight=False)
        return
    if name != "all" and name not in found:
        raise BayesKLRLError(f"There is no example {name!r} in the gallery. Choose from {', '.join(found)}, or all.")
    chosen = found if name == "all" else {name: found[name]}
    for each, file in chosen.items():
        report = runpy.run_path(str(file), run_name=f"bayes_klrl_gallery_{each}")["main"](out / each, seed=seed)
        out_console().print(f"Wrote {report}", markup=False, highlight=False)
    if name == "all":
        out_console().print(f"Wrote {write_index(chosen, out)}", markup=False, highlight=False)


def examples() -> dict[str, Path]:
    """Return the files of the examples by name: those of the installed package, or those of the repository.

    Raises
    ------
    BayesKLRLError
        If there are none.
    """
    here = Path(__file__).parents[1]
    for folder in (here / "gallery_examples", here.parents[1] / "examples" / "gallery"):
        found = {file.stem: file for file in sorted(folder.glob("*.py"))}
        if found:
            return found
    raise BayesKLRLError("The gallery's examples are not installed. They are in examples/gallery of the repository.")


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
