"""`bayes-klrl certify`: bounds on the distance of a policy to the posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    all_checkpoints: Annotated[
        bool,
        typer.Option(
            "--all-checkpoints",
            help="Certify each checkpoint-N in the folder of --policy, beside what its trainer logged: one table, one plot.",
        ),
    ] = False,
    out: Annotated[
        Path,
        out_option(
            "Folder for certificate.txt, certificate.csv and certificate.png; with --all-checkpoints for certificates.txt, "
            "table.csv and certificates.png."
        ),
    ] = _OUT,
    chat: Chat = False,
    seed: Seed = 0,
    runner: RunnerOption = None,
    quiet: Quiet = False,
) -> None:
    """Bound a policy's distance to the posterior, in both directions.

    The file may also define `feature`, a function that takes a list of completions and returns one label per completion: the
    certificate then says which labels the policy dropped.
    """
    from bayes_klrl.export.output_folder import check_output, naming_what_is_safe, prepare_output

    check_output(out)
    from bayes_klrl.errors import BayesKLRLError

    if all_checkpoints and len(policy or []) != 1:
        raise BayesKLRLError(
            f"--all-checkpoints takes one run: give --policy once, the folder of its checkpoints; got {len(policy or [])}."
        )
    import bayes_klrl as bk
    from bayes_klrl.inference.policies import as_policy
    from bayes_klrl.whole_files import whole_file, write_whole

    posterior, defined = load(file, quiet, chat=chat)
    options: dict[str, Any] = {
        "seed": seed,
        "num_draws": draws,
        "num_particles": particles,
        "num_runs": runs,
        "feature": defined.get("feature"),
        "progress": not quiet,
        "runner": runner,
    }
    if all_checkpoints and policy:
        curve = bk.certify_checkpoints(posterior, policy[0], **options)
        out_console().print(f"\n{curve}", markup=False, highlight=False, soft_wrap=True)
        out_console().print(f"\nWrote {curve.save(out)}", markup=False, highlight=False)
        return
    for folder in (policy or [])[1:]:  # one that cannot be loaded is refused before the first certificate
        as_policy(folder, posterior)
    policies: dict[str, Any] = {str(folder): folder for folder in policy or []} or {"the prior": posterior.prior}
    certificates = {}
    for name, given in policies.items():
        certificates[name] = bk.certify(posterior, given, **options)
        out_console().print(f"\n{name}\n{certificates[name]}", markup=False, highlight=False, soft_wrap=True)
    folder = prepare_output(out)
    with naming_what_is_safe(folder):
        for number, (name, certificate) in enumerate(certificates.items()):
            stem = "certificate" if number == 0 else f"certificate-{number + 1}"
            write_whole(folder / f"{stem}.txt", f"{name}\n{certificate}\n")
            with whole_file(folder / f"{stem}.csv") as unfinished:
                certificate.table().to_csv(unfinished)
            certificate.plot(folder / f"{stem}.png")
    out_console().print(f"\nWrote {folder}", markup=False, highlight=False)
