"""`bayes-klrl gallery`: what KL-regularised RL as inference is good for, as examples that end in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_klrl.cli.application import Seed, app, errors_as_messages, out_console, out_option
from bayes_klrl.errors import BayesKLRLError

__all__ = ["gallery"]


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

    An example takes a few minutes at most. `all` runs all of them and writes index.html: what people do today, what inference
    adds, and whether it helped, by the numbers of the run. One that cannot be run is named, there as well, and the others go
    on. They need the extra `gallery`, two of them SmolLM2 as well (`make smollm2`).
    """
    from bayes_klrl.gallery.index import examples, run_example, title_of
    from bayes_klrl.gallery.page import write_index

    found = examples()
    if name is None:
        for each, file in found.items():
            out_console().print(f"{each}: {title_of(file)}", markup=False, highlight=False)
        return
    if name != "all" and name not in found:
        raise BayesKLRLError(f"There is no example {name!r} in the gallery. Choose from {', '.join(found)}, or all.")
    shown, failed = [], []
    for each in found if name == "all" else [name]:
        try:
            finding = run_example(each, out, seed=seed)
        except BayesKLRLError as error:
            if name != "all":
                raise
            failed.append(each)
            out_console().print(f"{each} was left out: {error}", markup=False, highlight=False)
            continue
        shown.append(each)
        for line in (f"Wrote {finding.report}", f"  better: {finding.better}", f"  not:    {finding.worse}"):
            out_console().print(line, markup=False, highlight=False)
    if name == "all":
        out_console().print(f"Wrote {write_index(shown, out)}", markup=False, highlight=False)
    if failed:
        raise BayesKLRLError(f"These examples could not be run, for the reasons above: {', '.join(failed)}.")
