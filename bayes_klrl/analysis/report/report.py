"""A report: results of this package as one HTML page, to be read by people who did not run them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bayes_klrl.analysis.report.folder import check_is_folder, folder_sections
from bayes_klrl.analysis.report.page import Section, document, interactive, paragraph, picture_of_file, versions
from bayes_klrl.analysis.report.reported import Reported, reported
from bayes_klrl.analysis.report.samples import samples_of, side_by_side, table_of
from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.html import HtmlTable
from bayes_klrl.export.notebook import posterior_html
from bayes_klrl.export.output_folder import command_line, command_of
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import check_seed
from bayes_klrl.whole_files import check_folder, write_whole

__all__ = ["report"]

_LEGEND = (
    "Blue tokens are more probable under the guide than under the prior, orange ones less, in full colour from 3 nats on. "
    "Point at a token to read its log-probs. Weights are the completion's share of all draws of its method."
)
_MOST_PROMPTS = 4


def report(
    results: Any,
    file: str | Path,
    *,
    posterior: Posterior | None = None,
    title: str = "Report of bayes_klrl",
    num_samples: int = 6,
    seed: int = 0,
    pictures: Mapping[str, str | Path] | None = None,
    command: str | None = None,
) -> Path:
    """Write results as one HTML page that needs no network, and return the file.

    The page has the verdicts first, then the posterior in words, the tables and pictures of each result, completions before
    and after with their rewards and weights, the cost, and the versions. It is readable in light and dark, on a phone and on
    paper. Tables can be sorted and filtered.

    Parameters
    ----------
    results
        What `compare`, `certify`, `frontier`, `amortise`, `run_suite`, `SVI.fit` or the `run` of an algorithm returns, or
        several of them in a list; or a folder that `bayes-klrl` wrote, which is shown without loading any model.
    file
        The HTML file to write.
    posterior
        The posterior that the results are of. None: that of a comparison among them. Without it the page has neither the
        posterior in words nor completions before and after.
    title
        The title of the page.
    num_samples
        Completions per method and prompt that are shown, for at most 4 prompts; 0 for none.
    seed
        Seed for the completions of the prior, and for which of a method's completions are shown.
    pictures
        PNG files of your own, by the words that say what they show; they come first.
    command
        The command that repeats the results. None: the one that wrote the folder, else the command line of this process.

    Raises
    ------
    BayesKLRLError
        If something in the list is no result, the folder holds nothing to show, or the posterior has other prompts than the
        draws.
    OutputError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> comparison = bk.compare(posterior, {"exact": bk.Exact(), "SMC": bk.SMC(64)}, seed=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = bk.report(comparison, folder + "/report.html").read_text()
    >>> "log evidence 2.108 nats, exactly (exact)" in page
    True
    """
    check_count("num_samples", num_samples, least=0)
    check_seed(seed)
    if isinstance(results, str | os.PathLike):
        check_is_folder(Path(results))  # before the place of the page, which may lie in it
    check_folder(Path(file).parent)
    own = [_picture(Path(place), words) for words, place in (pictures or {}).items()]
    if isinstance(results, str | os.PathLike):
        verdicts, sections = folder_sections(Path(results))
        command = command_of(Path(results)) if command is None else command
    else:
        verdicts, sections = _of_results(results, posterior, num_samples, seed)
    if own:
        sections.insert(0, Section("What is special", "".join(own)))
    sections.append(Section("Versions and command", str(versions()) + _command(command)))
    return write_whole(file, document(title, verdicts, sections))


def _picture(file: Path, words: str) -> str:
    """Return a user's picture inside of the page."""
    try:
        return picture_of_file(file, words)
    except (OSError, ValueError) as error:
        raise BayesKLRLError(
            f"pictures: {str(file)!r} is no PNG file ({error}). Give {{'what it shows': 'picture.png'}}."
        ) from error


def _of_results(
    results: Any, posterior: Posterior | None, num_samples: int, seed: int
) -> tuple[list[str], list[Section]]:
    """Return the verdicts and the sections of results."""
    several = list(results) if isinstance(results, Sequence | set | frozenset) else [results]
    if not several:
        several = [None]  # refused, with what a report shows
    shown = [reported(each) for each in several]
    answers: dict[str, Draws] = {}
    for each in shown:
        answers |= {name: draws for name, draws in each.answers.items() if name not in answers}
    about = posterior or next((each.posterior for each in shown if each.posterior is not None), None)
    if posterior is not None and answers and all(draws.prompts != posterior.prompts for draws in answers.values()):
        raise BayesKLRLError(
            "The results are draws for other prompts than those of posterior=. Give the posterior that they are of, or leave "
            "it out."
        )
    sections = []
    for each in shown:
        sections += [*each.sections, *(each.beside(answers) if each.beside is not None else ())]
    if about is not None:
        sections.insert(0, Section("The posterior", posterior_html(about)))
        if num_samples:
            sections.append(_samples(about, answers, num_samples, seed))
    costs = _costs(shown)
    if costs is not None:
        sections.append(costs)
    return [each.verdict for each in shown if each.verdict], sections


def _samples(posterior: Posterior, answers: dict[str, Draws], num: int, seed: int) -> Section:
    """Return the section of completions before and after."""
    fitting = {name: draws for name, draws in answers.items() if draws.prompts == posterior.prompts}
    found = samples_of(posterior, fitting, num, _MOST_PROMPTS, seed)
    prompts = list(dict.fromkeys(sample.prompt for sample in found))
    parts = [f'<p class="legend">{escape(_LEGEND)}</p>', *(side_by_side(found, prompt) for prompt in prompts)]
    return Section("Samples before and after", "".join(parts) + interactive(table_of(found), "completions"))


def _costs(shown: Sequence[Reported]) -> Section | None:
    """Return the section of costs; None if no result has one."""
    costs: dict[str, Cost] = {}
    for each in shown:
        costs |= each.costs
    rows = [
        [
            name,
            f"{cost.model_tokens:,}",
            f"{cost.training_tokens:,}",
            f"{cost.seconds:,.1f}",
            f"{cost.training_seconds:,.1f}",
        ]
        for name, cost in costs.items()
    ]
    headings = ("work", "model tokens", "training tokens", "seconds", "training seconds")
    return Section("Cost", interactive(HtmlTable(headings, rows), "work")) if rows else None


def _command(command: str | None) -> str:
    """Return the command that repeats the results."""
    line = command_line() if command is None else command
    return paragraph("Repeated by:") + f"<pre>{escape(line)}</pre>" if line.strip() else ""
