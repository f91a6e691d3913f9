"""`bayes-klrl certify`: bounds on the distance of a policy to the posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_klrl.cli.application import PosteriorFile, Quiet, Seed, app, errors_as_messages, load, out_console

__all__ = ["certify"]

_OUT = Path("bayes-klrl-out")


@app.command()
@errors_as_messages
def certify(
    file: PosteriorFile = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a policy: a Hugging Face model, a PEFT adapter, or the output of a TRL trainer. May be given "
            "several times. Default: the prior itself, which shows how far there is to go."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Completions drawn from the policy per prompt.", min=32)] = 1024,
    particles: Annotated[int, typer.Option(help="Particles of each SMC run that bounds the evidence.", min=2)] = 64,
    runs: Annotated[int, typer.Option(help="Independent SMC runs; more of them make narrower bounds.", min=2)] = 24,
    out: Annotated[Path, typer.Option(help="Folder for certificate.txt, certificate.csv and certificate.png.")] = _OUT,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Bound a policy's distance to the posterior, in both directions.

    The file may also define `feature`, a function that takes a list of completions and returns one label per completion: the
    certificate then says which labels the policy dropped.
    """
    from bayes_klrl.export.output_folder import check_output, prepare_output

    check_output(out)
    import bayes_klrl as bk
    from bayes_klrl.inference.policies import as_policy

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
