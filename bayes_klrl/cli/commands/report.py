"""`bayes-klrl report`: what another command wrote, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_klrl.cli.application import app, errors_as_messages, out_console

__all__ = ["report"]


@app.command()
@errors_as_messages
def report(
    folder: Annotated[Path, typer.Argument(help="The folder that another command wrote (its --out).")] = Path(
        "bayes-klrl-out"
    ),
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write. Default: report.html in the folder.", show_default=False),
    ] = None,
    title: Annotated[str, typer.Option(help="The title of the page.")] = "Report of bayes_klrl",
) -> None:
    """Show what another command wrote as one HTML page, which needs no network and no model."""
    import bayes_klrl as bk

    written = bk.report(folder, folder / "report.html" if out is None else out, title=title)
    out_console().print(f"Wrote {written}", markup=False, highlight=False)
