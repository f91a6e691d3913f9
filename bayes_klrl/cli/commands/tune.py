"""`bayes-klrl tune`: a policy trained by SVI, written as a Hugging Face folder."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayes_klrl.cli.application import (
    Chat,
    PosteriorFile,
    Quiet,
    Seed,
    app,
    err,
    errors_as_messages,
    load,
    out_console,
    out_option,
)
from bayes_klrl.cli.methods import DEFAULT_STEPS
from bayes_klrl.errors import BayesKLRLError, OutputError

if TYPE_CHECKING:
    from bayes_klrl.inference.svi.ranks.group import Ranks
    from bayes_klrl.inference.svi.svi import SVI

__all__ = ["tune"]


@app.command()
@errors_as_messages
def tune(
    file: PosteriorFile = None,
    steps: Annotated[int, typer.Option(help="Gradient steps.", min=1)] = DEFAULT_STEPS,
    particles: Annotated[int, typer.Option(help="Completions per prompt and step.", min=2)] = 64,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Adam's peak rate, after a short warm-up; it then falls to 0. Default: steps measured in nats, without a "
            "rate, for models of 200,000 parameters and more; otherwise 2e-3, for LoRA 5e-3."
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help='"lora": train LoRA adapters over the frozen prior. Default: train a full copy.')
    ] = None,
    out: Annotated[Path, out_option("Folder for the policy, its draws and its training curve.")] = Path(
        "bayes-klrl-out"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training that was stopped in this --out folder.")
    ] = False,
    chat: Chat = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Tune a policy by SVI and write it as a Hugging Face folder.

    Ctrl-C ends the training early and keeps what was learned. The state of the training is written every ten steps, so
    that --resume goes on after any end, to the policy that it would have been. Under `accelerate launch` the processes
    train one policy together, and the first one writes.
    """
    from bayes_klrl.export.output_folder import check_output
    from bayes_klrl.inference.svi.ranks.group import launched_ranks

    ranks = launched_ranks()  # before the file is run: the device "cuda" is then this rank's own
    with ranks.together():
        if ranks.is_first:
            check_output(out)
    if adapter not in (None, "lora"):
        raise typer.BadParameter(f'must be "lora" or left out; got {adapter!r}', param_hint="--adapter")
    import bayes_klrl as bk

    svi = bk.SVI(steps, particles, learning_rate=learning_rate, adapter=adapter)
    try:
        if not ranks.is_first:
            warnings.simplefilter("ignore")
        _tune(svi, file, out, ranks, resume=resume, chat=chat, seed=seed, quiet=quiet or not ranks.is_first)
    except BayesKLRLError as error:
        if not ranks.is_first and getattr(error, "known_to_first", False):
            raise typer.Exit(1) from None  # rank 0 says it
        raise


def _tune(
    svi: SVI, file: Path | None, out: Path, ranks: Ranks, *, resume: bool, chat: bool, seed: int, quiet: bool
) -> None:
    """Train, and on rank 0 write the policy and say how good it is."""
    import bayes_klrl as bk
    from bayes_klrl.export.output_folder import check_output, naming_what_is_safe, prepare_output
    from bayes_klrl.export.pictures import plot_history

    state = out / "training"
    with ranks.together():
        posterior, _ = load(file, quiet, chat=chat)
        if not hasattr(posterior.prior, "save_pretrained"):
            raise BayesKLRLError(
                f"A {type(posterior.prior).__name__} has no save_pretrained, so its policy could not be saved."
            )
    folder = out
    with ranks.together():
        if ranks.is_first:
            folder = check_output(out) if resume else prepare_output(out)
    try:
        fit = svi.fit(posterior, seed=seed, progress=not quiet, checkpoint=state, resume=state if resume else None)
    except BayesKLRLError as error:
        if error.fit is not None and ranks.is_first:
            err().print(f"The policy, as far as it was trained, is in {error.fit.save(folder / 'policy')}.")
        raise
    if not ranks.is_first:
        return
    trouble: OutputError | None = None
    try:
        with naming_what_is_safe(folder):
            fit.save(folder / "policy")
            plot_history(fit.history, folder / "training.png")
    except OutputError as error:  # how good the policy is can be said all the same
        trouble = error
        err().print("The policy could not be saved. The same command with --resume saves it when there is room for it.")
    else:
        if not fit.interrupted:
            shutil.rmtree(state, ignore_errors=True)  # nothing is left to go on with
    if fit.interrupted and trouble is None:
        out_console().print(
            f"Interrupted after {len(fit.history['elbo'])} steps; the policy so far is in {folder / 'policy'}. The same "
            "command with --resume goes on."
        )
    corrected = bk.ImportanceSampling(1000, proposal=fit.guide).run(posterior, seed=seed, progress=not quiet)
    gap = float((corrected.log_evidence - corrected.elbo).mean())
    out_console().print(
        f"ELBO {corrected.elbo.mean():.3f} nats, log evidence {corrected.log_evidence.mean():.3f} ± "
        f"{corrected.log_evidence_se.max():.3f} (ESS {corrected.ess.min():.0f} of 1000): the policy is about {gap:.3f} "
        "nats from the posterior."
    )
    if trouble is not None:
        raise trouble
    with naming_what_is_safe(folder):
        corrected.save(folder / "draws.nc")
    out_console().print(f"Wrote {folder / 'policy'}")
