"""The parts that the commands of `bayes-klrl` share: the application, common options, loading of files, errors as messages."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import typer.core

from bayes_klrl.errors import BayesKLRLError

if TYPE_CHECKING:
    from rich.console import Console

    from bayes_klrl.posterior import Posterior

__all__ = [
    "Chat",
    "PosteriorFile",
    "Quiet",
    "RunnerOption",
    "Seed",
    "app",
    "err",
    "errors_as_messages",
    "escaped",
    "load",
    "out_console",
    "out_option",
]

_ORDER = ("compare", "amortise", "sample", "tune", "certify", "frontier", "suite", "report", "gallery")


class _Commands(typer.core.TyperGroup):
    """The commands in the order in which one needs them, not by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


app = typer.Typer(
    name="bayes-klrl",
    cls=_Commands,
    help=(
        "KL-regularised RL of language models as Bayesian inference: posterior = prior x exp(reward / alpha) / evidence. "
        "Every command but suite, report and gallery takes a Python file that defines the posterior; without one, it runs "
        "a shipped example."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_FILE_HELP = (
    "A Python file that defines `posterior`, a bk.Posterior. The file is run as code, so use only files that you trust. "
    "Without a file, the command runs the shipped example: Jane Austen in a good mood."
)
PosteriorFile = Annotated[Path | None, typer.Argument(help=_FILE_HELP, show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed for all random numbers; the same seed gives the same draws.", min=0)]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Give every text prompt to the model as a message of the user, by the tokenizer's chat template. Reward "
        "functions then get completions as lists of messages. Prompts that are messages in the file need no --chat.",
    ),
]


def _runner(text: str) -> Any:
    """Return the runner that a value of `--runner` stands for."""
    from bayes_klrl.runners.cluster import RayRunner
    from bayes_klrl.runners.processes import ProcessRunner
    from bayes_klrl.runners.serial import SerialRunner

    kind, colon, rest = text.strip().partition(":")
    if kind == "serial" and not colon:
        return SerialRunner()
    if kind == "processes" and ((rest.isascii() and rest.isdigit() and int(rest) > 0) or not colon):
        return ProcessRunner(int(rest) if rest else None)
    if kind == "ray" and (rest or not colon):
        try:
            return RayRunner(rest or None)
        except (BayesKLRLError, ImportError) as error:
            raise typer.BadParameter(str(error)) from None
    raise typer.BadParameter(f"cannot use {text!r}. Write serial, processes, processes:2, ray or ray:host:6379")


RunnerOption = Annotated[
    Any,
    typer.Option(
        "--runner",
        parser=_runner,
        metavar="RUNNER",
        help="Where the work is done, with the same results: serial, here; processes:2, in two processes (processes: one for "
        "each core); ray, on this machine, or ray:host:6379, on a cluster.",
    ),
]


def out_option(what: str) -> Any:
    """Return the option `--out` of a command, with the words for what is written into the folder."""
    return typer.Option(help=what, parser=_folder, metavar="PATH")


def _folder(name: str | Path) -> Path:
    """Return the folder of a name; refuse the empty one, which `Path` would take for the current folder."""
    if not str(name).strip():
        raise typer.BadParameter("the name of the folder is empty; give it a name")
    return Path(name)


Quiet = Annotated[bool, typer.Option("--quiet", help="Do not show live progress.")]

F = TypeVar("F", bound=Callable[..., Any])


def errors_as_messages(command: F) -> F:
    """Turn our errors into one line on standard error and exit code 1, Ctrl-C into exit code 130."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except BayesKLRLError as error:
            err().print(f"[bold red]Error:[/] {escaped(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err().print("Interrupted.")
            raise typer.Exit(130) from None

    return guarded  # type: ignore[return-value]


def load(
    file: Path | None, quiet: bool, example: str = "one_prompt", *, chat: bool = False
) -> tuple[Posterior, dict[str, Any]]:
    """Return the posterior that a file defines, and all that it defines, by name; without a file, that of an example.

    With `chat`, the texts that are its prompts are messages of the user.
    """
    import runpy

    from bayes_klrl.posterior import Posterior

    if file is None:
        if not quiet:
            err().print("No file given: running the shipped example, Jane Austen in a good mood.")
        file = Path(__file__).with_name("demo") / f"{example}.py"
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
    return posterior.as_chat() if chat else posterior, namespace


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning without its place in the code."""
    err().print(f"[yellow]Note:[/] {escaped(str(message))}", soft_wrap=True)


def out_console() -> Console:
    """Return the console of results, on standard output."""
    from rich.console import Console

    return Console()


def err() -> Console:
    """Return the console of progress, notes and errors, on standard error."""
    from rich.console import Console

    return Console(stderr=True)


def escaped(text: str) -> str:
    """Return text that the console does not read as markup."""
    from rich.markup import escape

    return escape(text)
