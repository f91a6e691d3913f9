"""`bayes-klrl suite`: methods on problems with known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_klrl.cli.application import Quiet, RunnerOption, Seed, app, errors_as_messages, out_console, out_option

__all__ = ["suite"]


@app.command()
@errors_as_messages
def suite(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of problems, such as P1 or P3-long, or all. Default: eight that take a minute or two."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a method, such as prior-is, smc or svi-is. May be given several times. Default: all."
        ),
    ] = None,
    budget: Annotated[int, typer.Option(help="Model tokens per answer, training included.", min=1)] = 100_000,
    repeats: Annotated[int, typer.Option(help="Runs of each method on each problem.", min=1)] = 3,
    out: Annotated[Path, out_option("Folder for table.csv and suite.png.")] = Path("bayes-klrl-suite"),
    seed: Seed = 0,
    runner: RunnerOption = None,
    quiet: Quiet = False,
) -> None:
    """Run methods on problems with known truth.

    Every method gets the same number of model tokens.
    """
    from bayes_klrl.export.output_folder import check_output

    check_output(out)
    from bayes_klrl.problems.suite.run import run_suite

    chosen = "all" if names == ["all"] else names
    result = run_suite(chosen, method, budget=budget, seed=seed, repeats=repeats, progress=not quiet, runner=runner)
    out_console().print(str(result), markup=False, highlight=False, soft_wrap=True)
    folder = result.save(out)
    out_console().print(f"\nWrote {folder}: suite.png, table.csv")
