"""The commands that say how far answers are from the posterior, and what alpha to choose: certify, frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_klrl.cli_common import PosteriorFile, Quiet, Seed, app, errors_as_messages, load, out_console

__all__ = ["certify", "frontier"]

_OUT = Path("bayes-klrl-out")


@app.command()
@errors_as_messages
def certify(
    file: PosteriorFile = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a policy: Hugging Face, a PEFT adapter, TRL's output. Several times for several. Default: the "
            "prior itself, which says how far there is to go."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Completions drawn from the policy for each prompt.", min=32)] = 1024,
    particles: Annotated[int, typer.Option(help="Particles of each SMC run that bounds the evidence.", min=2)] = 64,
    runs: Annotated[int, typer.Option(help="Independent SMC runs; more make narrower bounds.", min=2)] = 24,
    out: Annotated[Path, typer.Option(help="Folder for certificate.txt, .csv and .png.")] = _OUT,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Bound a policy's distance to the posterior, in both directions.

    The file may define `feature`, a function of a list of completions that returns a label for each: the certificate then
    says which of them the policy dropped.
    """
    from bayes_klrl.output_folder import check_output, prepare_output

    check_output(out)
    import bayes_klrl as bk
    from bayes_klrl.policies import as_policy

    posterior, defined = load(file, quiet)
    policies = {str(folder): as_policy(folder, posterior) for folder in policy or []} or {"the prior": posterior.prior}
    certificates = {}
    for name, lm in policies.items():
        certificates[name] = bk.certify(
            posterior,
            lm,
            seed=seed,
            num_draws=draws,
            num_particles=particles,
            num_runs=runs,
            feature=defined.get("feature"),
            progress=not quiet,
        )
        out_console().print(f"\n{name}\n{certificates[name]}", markup=False, highlight=False, soft_wrap=True)
    folder = prepare_output(out)
    for number, (name, certificate) in enumerate(certificates.items()):
        stem = "certificate" if number == 0 else f"certificate-{number + 1}"
        (folder / f"{stem}.txt").write_text(f"{name}\n{certificate}\n", encoding="utf-8")
        certificate.table().to_csv(folder / f"{stem}.csv")
        certificate.plot(folder / f"{stem}.png")
    out_console().print(f"\nWrote {folder}", markup=False, highlight=False)


@app.command()
@errors_as_messages
def frontier(
    file: PosteriorFile = None,
    num_draws: Annotated[int, typer.Option(help="Prior draws for each prompt.", min=2)] = 4096,
    kl: Annotated[float | None, typer.Option(help="Print the alpha whose posterior has this KL, in nats.")] = None,
    reward: Annotated[float | None, typer.Option(help="Print the alpha whose posterior has this mean reward.")] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(help="Folder of a policy to draw into the picture; several times for several.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for frontier.csv and frontier.png.")] = _OUT,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Show reward against KL over all alphas, from prior draws alone, before any training."""
    from bayes_klrl.checks import check_finite
    from bayes_klrl.output_folder import check_output, prepare_output

    for name, target in (("kl", kl), ("reward", reward)):
        if target is not None:
            check_finite(f"--{name}", target)

    check_output(out)
    import bayes_klrl as bk
    from bayes_klrl.policies import as_policy, policy_draws
    from bayes_klrl.randomness import generator

    posterior, _ = load(file, quiet)
    policies = {str(folder): as_policy(folder, posterior) for folder in policy or []}
    curve = bk.frontier(posterior, num_draws=num_draws, seed=seed, progress=not quiet)
    out_console().print(str(curve), markup=False, highlight=False, soft_wrap=True)
    points = {
        name: policy_draws(posterior, lm, 512, generator(seed, 1 + number), progress=not quiet)
        for number, (name, lm) in enumerate(policies.items())
    }
    folder = prepare_output(out)
    curve.table().to_csv(folder / "frontier.csv")
    curve.plot(folder / "frontier.png", policies=points)
    out_console().print(f"\nWrote {folder}", markup=False, highlight=False)
    for name, target in (("kl", kl), ("reward", reward)):
        if target is not None:
            out_console().print(f"alpha = {curve.alpha_for(**{name: target}):.4g} for {name} = {target:g}")
