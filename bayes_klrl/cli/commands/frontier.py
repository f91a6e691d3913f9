"""`bayes-klrl frontier`: reward against KL over all alphas, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_klrl.cli.application import (
    Chat,
    PosteriorFile,
    Quiet,
    RunnerOption,
    Seed,
    app,
    errors_as_messages,
    load,
    out_console,
    out_option,
)

__all__ = ["frontier"]

_OUT = Path("bayes-klrl-out")


@app.command()
@errors_as_messages
def frontier(
    file: PosteriorFile = None,
    num_draws: Annotated[int, typer.Option(help="Prior draws per prompt.", min=2)] = 4096,
    kl: Annotated[
        float | None, typer.Option(help="Also print the alpha whose posterior has this KL to the prior, in nats.")
    ] = None,
    reward: Annotated[
        float | None, typer.Option(help="Also print the alpha whose posterior has this mean reward.")
    ] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(help="Folder of a policy to draw into the picture. May be given several times.")
    ] = None,
    out: Annotated[Path, out_option("Folder for frontier.csv and frontier.png.")] = _OUT,
    chat: Chat = False,
    seed: Seed = 0,
    runner: RunnerOption = None,
    quiet: Quiet = False,
) -> None:
    """Show reward against KL over all alphas, before any training.

    Everything is computed from draws of the prior.
    """
    from bayes_klrl.checks import check_finite
    from bayes_klrl.export.output_folder import check_output, naming_what_is_safe, prepare_output

    for name, target in (("kl", kl), ("reward", reward)):
        if target is not None:
            check_finite(f"--{name}", target)

    check_output(out)
    import bayes_klrl as bk
    from bayes_klrl.inference.policies import as_policy, policy_draws
    from bayes_klrl.randomness import Streams
    from bayes_klrl.whole_files import whole_file

    posterior, _ = load(file, quiet, chat=chat)
    policies = {str(folder): as_policy(folder, posterior) for folder in policy or []}
    curve = bk.frontier(posterior, num_draws=num_draws, seed=seed, progress=not quiet, runner=runner)
    out_console().print(str(curve), markup=False, highlight=False, soft_wrap=True)
    points = {
        name: policy_draws(posterior, lm, 512, Streams.of(seed, 1 + number), progress=not quiet)
        for number, (name, lm) in enumerate(policies.items())
    }
    try:
        folder = prepare_output(out)
        with naming_what_is_safe(folder):
            with whole_file(folder / "frontier.csv") as unfinished:
                curve.table().to_csv(unfinished)
            curve.plot(folder / "frontier.png", policies=points)
        out_console().print(f"\nWrote {folder}", markup=False, highlight=False)
    finally:  # a full disk does not keep them back
        for name, target in (("kl", kl), ("reward", reward)):
            if target is not None:
                out_console().print(f"alpha = {curve.alpha_for(**{name: target}):.4g} for {name} = {target:g}")
