"""`bayes-klrl compare`: several inference methods on one posterior, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_klrl.cli.application import (
    Chat,
    PosteriorFile,
    Quiet,
    RunnerOption,
    Seed,
    app,
    errors_as_messages,
    escaped,
    load,
    out_console,
    out_option,
)
from bayes_klrl.cli.methods import DEFAULT_METHODS, DEFAULT_STEPS, METHOD_HELP, algorithms_of
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.words import visible

if TYPE_CHECKING:
    from bayes_klrl.analysis.comparison.compare import Comparison
    from bayes_klrl.posterior import Posterior
    from bayes_klrl.typing import Algorithm

__all__ = ["compare"]


@app.command()
@errors_as_messages
def compare(
    file: PosteriorFile = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=METHOD_HELP + ". May be given several times. Default: every short name but exact."),
    ] = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a tuned policy: adds a row of importance sampling from it. May be given several times."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Gradient steps of the short names svi and svi-is.", min=1)
    ] = DEFAULT_STEPS,
    out: Annotated[Path, out_option("Folder for draws.nc, table.csv, PNG plots and the tuned policy.")] = Path(
        "bayes-klrl-out"
    ),
    chat: Chat = False,
    seed: Seed = 0,
    runner: RunnerOption = None,
    quiet: Quiet = False,
) -> None:
    """Run several inference methods on one posterior, side by side.

    The file may also define `algorithms`, a dict from names to algorithms, which are run if no --method is given.
    """
    from bayes_klrl.export.output_folder import check_output

    asked = None if method is None else algorithms_of(method, steps)
    check_output(out)
    for folder in policy or []:
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise BayesKLRLError(
                f"--policy {str(folder)!r} lies in the output folder and would be overwritten; use --out."
            )
    import bayes_klrl as bk

    posterior, defined = load(file, quiet, chat=chat)
    rows = _own(defined, file) if asked is None else asked
    if rows is None:
        rows = algorithms_of(DEFAULT_METHODS, steps)
    algorithms = {**rows, **_proposals(policy or [], posterior)}
    comparison = bk.compare(posterior, algorithms, seed=seed, progress=not quiet, runner=runner)
    _show(comparison)
    folder = comparison.save(out)
    written = ", ".join(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
    out_console().print(f"\nWrote {folder}: {written}")


def _own(defined: dict[str, Any], file: Path | None) -> Mapping[str, Algorithm] | None:
    """Return the algorithms that the file defines, None if it defines none."""
    algorithms = defined.get("algorithms")
    if algorithms is not None and not isinstance(algorithms, Mapping):
        raise BayesKLRLError(
            f"`algorithms` of {str(file)!r} must be a dict from names to algorithms, such as "
            f'{{"SMC": bk.SMC(256)}}; it is {algorithms!r}.'
        )
    return algorithms


def _proposals(folders: list[Path], posterior: Posterior) -> dict[str, Algorithm]:
    """Return importance sampling from each policy, by the name of its row."""
    import bayes_klrl as bk
    from bayes_klrl.inference.policies import as_policy

    rows: dict[str, Algorithm] = {}
    for folder in folders:
        row = f"{str(folder).replace('/', ' ').strip()}, then IS"  # "/" separates groups in draws.nc
        rows[row] = bk.ImportanceSampling(1000, proposal=as_policy(folder, posterior))
    return rows


def _show(comparison: Comparison) -> None:
    """Print the table, and three completions of every method."""
    console = out_console()
    console.print()
    console.print(str(comparison.table()), markup=False, highlight=False, soft_wrap=True)
    if comparison.posterior.prior.tokenizer is not None:
        words = next(iter(comparison.draws.values()))[0].prompt_words(most=200)[0]
        console.print(f"\n[bold]{escaped(words)}[/] ...", soft_wrap=True)
        for name, texts in comparison.samples(3).items():
            for text in texts[0]:
                console.print(f"  {name:>14}  {visible(text)}", markup=False, highlight=False, soft_wrap=True)
