"""`bayes-klrl sample`: completions drawn from the posterior."""

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
    err,
    errors_as_messages,
    escaped,
    load,
    out_console,
    out_option,
)
from bayes_klrl.cli.methods import DEFAULT_STEPS, METHOD_HELP, algorithms_of
from bayes_klrl.prompts.chat import is_messages
from bayes_klrl.prompts.words import visible

__all__ = ["sample"]

_MOST_CHARACTERS = 200  # of a prompt


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
    out: Annotated[Path | None, out_option("Folder for draws.nc. Default: print only.")] = None,
    chat: Chat = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Print completions drawn from the posterior, one per line; of conversations, the turns with their roles.

    Spaces at the ends of a completion, line breaks and tabs are shown by signs; draws.nc has the texts as they are.
    """
    from bayes_klrl.export.output_folder import check_output, naming_what_is_safe, prepare_output

    (algorithm,) = algorithms_of([method], steps).values()
    if out is not None:
        check_output(out)
    import bayes_klrl as bk
    from bayes_klrl.inference.policies import as_policy

    posterior, _ = load(file, quiet, chat=chat)
    if policy is not None:
        algorithm = bk.ImportanceSampling(1000, proposal=as_policy(policy, posterior))
    draws = algorithm.run(posterior, seed=seed, progress=not quiet)
    chosen = draws.resample(num, seed)
    words = chosen.prompt_words(most=_MOST_CHARACTERS)
    for prompt, name, texts in zip(posterior.prompts, words, _texts(chosen), strict=True):
        if is_messages(prompt):
            _print_turns(prompt, texts)
            continue
        if posterior.num_prompts > 1:
            out_console().print(f"[bold]{escaped(name)}[/]", soft_wrap=True)
        for text in texts:
            shown = text if chosen.decoder is None else visible(text)
            out_console().print(shown, markup=False, highlight=False, soft_wrap=True)
    ess = draws.ess.min()
    if ess < 100:
        err().print(f"Note: the effective sample size is {ess:.0f}; these completions represent the posterior badly.")
    if out is not None:
        folder = prepare_output(out)
        with naming_what_is_safe(folder):
            err().print(f"Wrote {draws.save(folder / 'draws.nc')}")


def _print_turns(prompt: Any, texts: list[str]) -> None:
    """Print the turns of a conversation, and each completion as the assistant's turn, which the prompt may have begun."""
    given, begun = (prompt[:-1], prompt[-1]["content"]) if prompt.is_begun else (prompt, "")
    for message in given:
        out_console().print(f"[bold]{escaped(message['role'])}:[/] {escaped(message['content'])}", soft_wrap=True)
    for text in texts:
        out_console().print(f"assistant: {begun}{text}", markup=False, highlight=False, soft_wrap=True)


def _texts(draws: Any) -> list[list[str]]:
    """Return the draws as texts, or as token ids if there is no tokenizer."""
    if draws.decoder is not None:
        texts: list[list[str]] = draws.texts()
        return texts
    flat = [" ".join(map(str, ids)) for ids in draws.sequences.lists()]
    num_prompts, num_draws = draws.shape
    return [flat[p * num_draws : (p + 1) * num_draws] for p in range(num_prompts)]
