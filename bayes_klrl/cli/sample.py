"""`bayes-klrl sample`: completions drawn from the posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_klrl.cli.application import (
    PosteriorFile,
    Quiet,
    Seed,
    app,
    err,
    errors_as_messages,
    escaped,
    load,
    out_console,
)
from bayes_klrl.cli.methods import DEFAULT_STEPS, METHOD_HELP, algorithms_of

__all__ = ["sample"]


@app.command()
@errors_as_messages
def sample(
    file: PosteriorFile = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP + ".")] = "smc",
    policy: Annotated[
        Path | None,
        typer.Option(help="Folder of a tuned policy: use importance sampling from it, whatever --method says."),
    ] = None,
    num: Annotated[int, typer.Option(help="Completions to print per prompt.", min=1)] = 10,
    steps: Annotated[
        int, typer.Option(help="Gradient steps of the short names svi and svi-is.", min=1)
    ] = DEFAULT_STEPS,
    out: Annotated[Path | None, typer.Option(help="Folder for draws.nc. Default: print only.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Print completions drawn from the posterior, one per line."""
    from bayes_klrl.export.output_folder import check_output, prepare_output

    (algorithm,) = algorithms_of([method], steps).values()
    if out is not None:
        check_output(out)
    import bayes_klrl as bk
    from bayes_klrl.inference.policies import as_policy

    posterior, _ = load(file, quiet)
    if policy is not None:
        algorithm = bk.ImportanceSampling(1000, proposal=as_policy(policy, posterior))
    draws = algorithm.run(posterior, seed=seed, progress=not quiet)
    chosen = draws.resample(num, seed)
    for prompt, texts in zip(posterior.prompts, _texts(chosen), strict=True):
        if posterior.num_prompts > 1:
            out_console().print(f"[bold]{escaped(str(prompt))}[/]")
        for text in texts:
            out_console().print(text, markup=False, highlight=False, soft_wrap=True)
    ess = draws.ess.min()
    if ess < 100:
        err().print(f"Note: the effective sample size is {ess:.0f}; these completions represent the posterior badly.")
    if out is not None:
        err().print(f"Wrote {draws.save(prepare_output(out) / 'draws.nc')}")


def _texts(draws: Any) -> list[list[str]]:
    """Return the draws as texts, or as token ids if there is no tokenizer."""
    if draws.decoder is not None:
        texts: list[list[str]] = draws.texts()
        return texts
    flat = [" ".join(map(str, ids)) for ids in draws.sequences.lists()]
    num_prompts, num_draws = draws.shape
    return [flat[p * num_draws : (p + 1) * num_draws] for p in range(num_prompts)]
