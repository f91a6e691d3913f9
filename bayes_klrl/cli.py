"""The command line `bayes-klrl`: compare, sample, tune; the others are in `cli_certify` and `cli_suite`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bayes_klrl.cli_certify  # their commands are added to the application on import
import bayes_klrl.cli_suite  # noqa: F401  (both are imported for that alone)
from bayes_klrl.cli_common import PosteriorFile, Quiet, Seed, app, err, errors_as_messages, escaped, load, out_console
from bayes_klrl.errors import BayesKLRLError

if TYPE_CHECKING:
    from bayes_klrl.comparison import Comparison
    from bayes_klrl.posterior import Posterior
    from bayes_klrl.typing import Algorithm

__all__ = ["app", "main"]

# what --method takes, and what the table calls it
METHODS = {
    "prior-is": "prior IS",
    "best-of-n": "best of 16",
    "smc": "SMC",
    "svi": "SVI",
    "svi-is": "SVI, then IS",
    "exact": "exact",
}
_DEFAULT_METHODS = ("prior-is", "best-of-n", "smc", "svi", "svi-is")
_DEFAULT_STEPS = 120
_METHOD_HELP = f"One of {', '.join(METHODS)}"


def _algorithm(method: str, num_steps: int) -> Algorithm:
    """Return a method at the demo's sizes."""
    import bayes_klrl as bk

    algorithms: dict[str, Algorithm] = {
        "prior-is": bk.ImportanceSampling(2048),
        "best-of-n": bk.BestOfN(16, 64),
        "smc": bk.SMC(512),
        "svi": bk.SVI(num_steps),
        "svi-is": bk.ImportanceSampling(1000, proposal=bk.SVI(num_steps)),
        "exact": bk.Exact(),
    }
    return algorithms[method]


@app.command()
@errors_as_messages
def compare(
    file: PosteriorFile = None,
    method: Annotated[
        list[str] | None, typer.Option(help=_METHOD_HELP + "; may be given several times. Default: all but exact.")
    ] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(help="A Hugging Face folder to add as a proposal; may be given several times.")
    ] = None,
    steps: Annotated[int, typer.Option(help="SVI steps.", min=1)] = _DEFAULT_STEPS,
    out: Annotated[Path, typer.Option(help="Folder for draws.nc, table.csv, PNG plots and the tuned policy.")] = Path(
        "bayes-klrl-out"
    ),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Run several inference methods on one posterior, side by side."""
    from bayes_klrl.output_folder import check_output

    _check_methods(method)
    check_output(out)
    for folder in policy or []:
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise BayesKLRLError(
                f"--policy {str(folder)!r} lies in the output folder and would be overwritten; use --out."
            )
    import bayes_klrl as bk

    posterior, defined = load(file, quiet)
    algorithms = _algorithms(method, defined.get("algorithms"), posterior, policy or [], steps)
    comparison = bk.compare(posterior, algorithms, seed=seed, progress=not quiet)
    folder = comparison.save(out)
    _show(comparison, folder)


@app.command()
@errors_as_messages
def sample(
    file: PosteriorFile = None,
    method: Annotated[str, typer.Option(help=_METHOD_HELP + ".")] = "smc",
    policy: Annotated[Path | None, typer.Option(help="Sample by importance sampling from this tuned policy.")] = None,
    num: Annotated[int, typer.Option(help="Completions a prompt.", min=1)] = 10,
    steps: Annotated[int, typer.Option(help="SVI steps.", min=1)] = _DEFAULT_STEPS,
    out: Annotated[Path | None, typer.Option(help="Folder for draws.nc; none: print only.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Print completions drawn from the posterior, one a line."""
    from bayes_klrl.output_folder import check_output, prepare_output

    _check_methods([method])
    if out is not None:
        check_output(out)
    import bayes_klrl as bk
    from bayes_klrl.policies import as_policy

    posterior, _ = load(file, quiet)
    if policy is not None:
        algorithm: Algorithm = bk.ImportanceSampling(1000, proposal=as_policy(policy, posterior))
    else:
        algorithm = _algorithm(method, steps)
    draws = algorithm.run(posterior, seed=seed, progress=not quiet)
    chosen = draws.resample(num, seed)
    for prompt, texts in zip(posterior.prompts, _texts(chosen), strict=True):
        if posterior.num_prompts > 1:
            out_console().print(f"[bold]{escaped(str(prompt))}[/]")
        for text in texts:
            out_console().print(text, markup=False, highlight=False, soft_wrap=True)
    ess = draws.ess.min()
    if ess < 100:
        err().print(f"Note: the effective sample size is {ess:.0f}; take these completions with a grain of salt.")
    if out is not None:
        err().print(f"Wrote {draws.save(prepare_output(out) / 'draws.nc')}")


@app.command()
@errors_as_messages
def tune(
    file: PosteriorFile = None,
    steps: Annotated[int, typer.Option(help="Gradient steps.", min=1)] = _DEFAULT_STEPS,
    particles: Annotated[int, typer.Option(help="Completions a prompt and step.", min=2)] = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of Adam, at its highest. Default: 2e-3, LoRA 5e-3.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help='"lora": train adapters over the frozen prior; default: a full copy.')
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the policy, its draws and its training curve.")] = Path(
        "bayes-klrl-out"
    ),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Tune a policy by SVI and write it as a Hugging Face folder. Ctrl-C keeps what was learned."""
    from bayes_klrl.output_folder import check_output, prepare_output

    check_output(out)
    if adapter not in (None, "lora"):
        raise typer.BadParameter(f'must be "lora" or left out; got {adapter!r}', param_hint="--adapter")
    import bayes_klrl as bk
    from bayes_klrl.plots import plot_history

    svi = bk.SVI(steps, particles, learning_rate=learning_rate, adapter=adapter)
    posterior, _ = load(file, quiet)
    if not hasattr(posterior.prior, "save_pretrained"):
        raise BayesKLRLError(
            f"A {type(posterior.prior).__name__} has no save_pretrained, so its policy could not be saved."
        )
    try:
        fit = svi.fit(posterior, seed=seed, progress=not quiet)
    except BayesKLRLError as error:
        if error.fit is not None:
            err().print(f"What was learned so far is in {error.fit.save(prepare_output(out) / 'policy')}.")
        raise
    folder = prepare_output(out)
    fit.save(folder / "policy")
    plot_history(fit.history, folder / "training.png")
    if fit.interrupted:
        out_console().print(
            f"Interrupted after {len(fit.history['elbo'])} steps; the policy so far is in {folder / 'policy'}."
        )
    corrected = bk.ImportanceSampling(1000, proposal=fit.guide).run(posterior, seed=seed, progress=not quiet)
    corrected.save(folder / "draws.nc")
    gap = float((corrected.log_evidence - corrected.elbo).mean())
    out_console().print(
        f"ELBO {corrected.elbo.mean():.3f} nats, log evidence {corrected.log_evidence.mean():.3f} ± "
        f"{corrected.log_evidence_se.max():.3f} (ESS {corrected.ess.min():.0f} of 1000): the policy is about {gap:.3f} "
        f"nats from the posterior.\nWrote {folder / 'policy'}"
    )


def main() -> None:
    """Run the command line."""
    app()


def _check_methods(methods: list[str] | None) -> None:
    """Refuse unknown names before anything is loaded."""
    for name in methods or []:
        if name not in METHODS:
            raise typer.BadParameter(
                f"unknown method {name!r}; choose from {', '.join(METHODS)}", param_hint="--method"
            )


def _algorithms(
    methods: list[str] | None,
    defined: dict[str, Algorithm] | None,
    posterior: Posterior,
    policies: list[Path],
    num_steps: int,
) -> dict[str, Algorithm]:
    """Return what to compare: the methods asked for, else the file's own, else the demo's; and the policies."""
    import bayes_klrl as bk
    from bayes_klrl.policies import as_policy

    if methods is None and defined is not None:
        chosen = dict(defined)
    else:
        chosen = {METHODS[name]: _algorithm(name, num_steps) for name in methods or _DEFAULT_METHODS}
    for folder in policies:
        label = f"{str(folder).replace('/', ' ').strip()}, then IS"  # '/' separates groups in draws.nc
        chosen[label] = bk.ImportanceSampling(1000, proposal=as_policy(folder, posterior))
    return chosen


def _show(comparison: Comparison, folder: Path) -> None:
    """Print the table, three completions of every method, and where everything is."""
    console = out_console()
    console.print()
    console.print(str(comparison.table()), markup=False, highlight=False, soft_wrap=True)
    if comparison.posterior.prior.tokenizer is not None:
        console.print(f"\n[bold]{escaped(str(comparison.posterior.prompts[0]))}[/] ...")
        for name, texts in comparison.samples(3).items():
            for text in texts[0]:
                console.print(f"  {name:>14}  {text.strip()}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nWrote {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir() if p.name[0] != ".")))


def _texts(draws: Any) -> list[list[str]]:
    """Return the draws as text, or as ids where there is none."""
    if draws.decoder is not None:
        texts: list[list[str]] = draws.texts()
        return texts
    flat = [" ".join(map(str, ids)) for ids in draws.sequences.lists()]
    num_prompts, num_draws = draws.shape
    return [flat[p * num_draws : (p + 1) * num_draws] for p in range(num_prompts)]


if __name__ == "__main__":
    main()
