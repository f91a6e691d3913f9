"""`bayes-klrl amortise`: one guide for many prompts, judged on prompts that it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bayes_klrl.cli.application import (
    Chat,
    PosteriorFile,
    Quiet,
    Seed,
    app,
    errors_as_messages,
    load,
    out_console,
    out_option,
)
from bayes_klrl.errors import BayesKLRLError

__all__ = ["amortise"]


@app.command()
@errors_as_messages
def amortise(
    file: PosteriorFile = None,
    policy: Annotated[
        Path | None, typer.Option(help="Folder of a policy that is already trained: judge it, and train nothing.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps.", min=1)] = 60,
    particles: Annotated[int, typer.Option(help="Completions per prompt and step.", min=2)] = 8,
    prompts_per_step: Annotated[
        int, typer.Option(help="Prompts per step; all of them if there are no more than this.", min=1)
    ] = 16,
    draws: Annotated[int, typer.Option(help="Completions drawn per prompt and method.", min=32)] = 64,
    out: Annotated[Path, out_option("Folder for table.csv, prompts.csv, PNG plots and the tuned policy.")] = Path(
        "bayes-klrl-amortised"
    ),
    chat: Chat = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train one guide on many prompts and judge it on unseen ones.

    The file defines `posterior` with the training prompts and `held_out`, a second bk.Posterior with the unseen prompts. It
    may also define `svi`, a bk.SVI, which is then the training, whatever --steps, --particles and --prompts-per-step say.
    """
    from bayes_klrl.export.output_folder import check_output

    check_output(out)
    if policy is not None and out.resolve() in (policy.resolve(), *policy.resolve().parents):
        raise BayesKLRLError(f"--policy {str(policy)!r} lies in the output folder and would be overwritten; use --out.")
    import bayes_klrl as bk

    posterior, defined = load(file, quiet, example="many_prompts", chat=chat)
    held_out = _held_out(defined, file, chat)
    subset = prompts_per_step if prompts_per_step < posterior.num_prompts else None
    guide = policy or defined.get("svi") or bk.SVI(steps, particles, prompts_per_step=subset)
    result = bk.amortise(posterior, held_out, guide, seed=seed, num_draws=draws, progress=not quiet)
    out_console().print(f"\n{result}", markup=False, highlight=False, soft_wrap=True)
    folder = result.save(out)
    written = ", ".join(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
    out_console().print(f"\nWrote {folder}: {written}", markup=False, highlight=False, soft_wrap=True)


def _held_out(defined: dict[str, Any], file: Path | None, chat: bool) -> Any:
    """Return the posterior of the unseen prompts that the file defines; with `chat`, its texts as messages."""
    if "held_out" not in defined:
        raise BayesKLRLError(
            f"{str(file)!r} must also define `held_out`, a bk.Posterior with the same prior and reward and with prompts that "
            "the guide does not see in training."
        )
    held_out = defined["held_out"]
    return held_out.as_chat() if chat and hasattr(held_out, "as_chat") else held_out
