"""The command line `bayes-klrl`: compare, sample, tune, suite."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bayes_klrl.errors import BayesKLRLError

if TYPE_CHECKING:
    from rich.console import Console

    from bayes_klrl.comparison import Comparison
    from bayes_klrl.posterior import Posterior
    from bayes_klrl.typing import Algorithm, LanguageModel

__all__ = ["app", "main"]

app = typer.Typer(
    name="bayes-klrl",
    help="KL-regularised RL of language models as Bayesian inference: prior x exp(reward / alpha) / evidence.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_FILE_HELP = (
    "A Python file that defines `posterior` (and, for compare, may define `algorithms`). It is run as code: only use files "
    "you trust. Without it, the shipped example: Jane Austen in a good mood."
)
PosteriorFile = Annotated[Path | None, typer.Argument(help=_FILE_HELP, show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of everything; the same seed gives the same draws.", min=0)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No live progress.")]

F = TypeVar("F", bound=Callable[..., Any])


def _errors_as_messages(command: F) -> F:
    """Turn our errors into one line on standard error and exit code 1, Ctrl-C into exit code 130."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except BayesKLRLError as error:
            _err().print(f"[bold red]Error:[/] {_escaped(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _err().print("Interrupted.")
            raise typer.Exit(130) from None

    return guarded  # type: ignore[return-value]


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
@_errors_as_messages
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

    posterior, defined = _load(file, quiet)
    algorithms = _algorithms(method, defined, posterior, policy or [], steps)
    comparison = bk.compare(posterior, algorithms, seed=seed, progress=not quiet)
    folder = comparison.save(out)
    _show(comparison, folder)


@app.command()
@_errors_as_messages
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

    posterior, _ = _load(file, quiet)
    if policy is not None:
        algorithm: Algorithm = bk.ImportanceSampling(1000, proposal=_policy(policy, posterior))
    else:
        algorithm = _algorithm(method, steps)
    draws = algorithm.run(posterior, seed=seed, progress=not quiet)
    chosen = draws.resample(num, seed)
    for prompt, texts in zip(posterior.prompts, _texts(chosen), strict=True):
        if posterior.num_prompts > 1:
            _out().print(f"[bold]{_escaped(str(prompt))}[/]")
        for text in texts:
            _out().print(text, markup=False, highlight=False, soft_wrap=True)
    ess = draws.ess.min()
    if ess < 100:
        _err().print(f"Note: the effective sample size is {ess:.0f}; take these completions with a grain of salt.")
    if out is not None:
        _err().print(f"Wrote {draws.save(prepare_output(out) / 'draws.nc')}")


@app.command()
@_errors_as_messages
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
    posterior, _ = _load(file, quiet)
    if not hasattr(posterior.prior, "save_pretrained"):
        raise BayesKLRLError(
            f"A {type(posterior.prior).__name__} has no save_pretrained, so its policy could not be saved."
        )
    try:
        fit = svi.fit(posterior, seed=seed, progress=not quiet)
    except BayesKLRLError as error:
        if error.fit is not None:
            _err().print(f"What was learned so far is in {error.fit.save(prepare_output(out) / 'policy')}.")
        raise
    folder = prepare_output(out)
    fit.save(folder / "policy")
    plot_history(fit.history, folder / "training.png")
    if fit.interrupted:
        _out().print(
            f"Interrupted after {len(fit.history['elbo'])} steps; the policy so far is in {folder / 'policy'}."
        )
    corrected = bk.ImportanceSampling(1000, proposal=fit.guide).run(posterior, seed=seed, progress=not quiet)
    corrected.save(folder / "draws.nc")
    gap = float((corrected.log_evidence - corrected.elbo).mean())
    _out().print(
        f"ELBO {corrected.elbo.mean():.3f} nats, log evidence {corrected.log_evidence.mean():.3f} ± "
        f"{corrected.log_evidence_se.max():.3f} (ESS {corrected.ess.min():.0f} of 1000): the policy is about {gap:.3f} "
        f"nats from the posterior.\nWrote {folder / 'policy'}"
    )


@app.command()
@_errors_as_messages
def suite(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Problems, such as P1 or P3-long, or all; default: eight that take a minute or two."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Such as prior-is, smc or svi-is; may be given several times. Default: all."),
    ] = None,
    budget: Annotated[int, typer.Option(help="Model tokens of one answer, training included.", min=1)] = 100_000,
    repeats: Annotated[int, typer.Option(help="Answers of each method to each problem.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder for table.csv and suite.png.")] = Path("bayes-klrl-suite"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Run methods on problems with known truth, at the same number of model tokens."""
    from bayes_klrl.output_folder import check_output

    check_output(out)
    from bayes_klrl.suite import run_suite

    chosen = "all" if names == ["all"] else names
    result = run_suite(chosen, method, budget=budget, seed=seed, repeats=repeats, progress=not quiet)
    _out().print(str(result), markup=False, highlight=False, soft_wrap=True)
    folder = result.save(out)
    _out().print(f"\nWrote {folder}: suite.png, table.csv")


def main() -> None:
    """Run the command line."""
    app()


def _load(file: Path | None, quiet: bool) -> tuple[Posterior, dict[str, Algorithm] | None]:
    """Return the posterior that a file defines, and its algorithms if it has any."""
    import runpy

    from bayes_klrl.posterior import Posterior

    if file is None:
        if not quiet:
            _err().print("No file given: running the shipped example, Jane Austen in a good mood.")
        file = Path(__file__).with_name("demo_posterior.py")
    if not file.is_file():
        raise BayesKLRLError(f"There is no file {str(file)!r}. Give a Python file that defines `posterior`.")
    try:
        sys.path.insert(0, str(file.resolve().parent))  # as for a script: it may import its neighbours
        namespace = runpy.run_path(str(file), run_name="bayes_klrl_posterior_file")
    except BayesKLRLError:
        raise
    except Exception as error:  # whatever a user's file raises is theirs to read
        raise BayesKLRLError(f"{str(file)!r} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    posterior = namespace.get("posterior")
    if not isinstance(posterior, Posterior):
        raise BayesKLRLError(
            f"{str(file)!r} must define `posterior`, a bk.Posterior; it defines "
            f"{'nothing of that name' if posterior is None else type(posterior).__name__}."
        )
    return posterior, namespace.get("algorithms")


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

    if methods is None and defined is not None:
        chosen = dict(defined)
    else:
        chosen = {METHODS[name]: _algorithm(name, num_steps) for name in methods or _DEFAULT_METHODS}
    for folder in policies:
        label = f"{str(folder).replace('/', ' ').strip()}, then IS"  # '/' separates groups in draws.nc
        chosen[label] = bk.ImportanceSampling(1000, proposal=_policy(folder, posterior))
    return chosen


def _policy(folder: Path, posterior: Posterior) -> LanguageModel:
    """Return a tuned policy from a folder, checked against the prior."""
    import bayes_klrl as bk
    from bayes_klrl.models.decoding import check_proposal

    policy = bk.TorchLM.from_pretrained(folder)
    check_proposal(policy, posterior.prior)
    return policy


def _show(comparison: Comparison, folder: Path) -> None:
    """Print the table, three completions of every method, and where everything is."""
    console = _out()
    console.print()
    console.print(str(comparison.table()), markup=False, highlight=False, soft_wrap=True)
    if comparison.posterior.prior.tokenizer is not None:
        console.print(f"\n[bold]{_escaped(str(comparison.posterior.prompts[0]))}[/] ...")
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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning without its place in the code."""
    _err().print(f"[yellow]Note:[/] {_escaped(str(message))}", soft_wrap=True)


def _out() -> Console:
    from rich.console import Console

    return Console()


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
