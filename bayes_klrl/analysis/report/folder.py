"""What an output folder of `bayes-klrl` contributes to a report: its tables, pictures and certificates, without the models."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pandas as pd

from bayes_klrl.analysis.report.page import Section, interactive, picture_of_file
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.datatree import load_comparison
from bayes_klrl.export.html import HtmlTable
from bayes_klrl.prompts.words import visible
from bayes_klrl.weights import normalised

__all__ = ["check_is_folder", "folder_sections"]

_HEADINGS = {
    "table": "Methods",
    "comparison": "Methods, in a picture",
    "prompts": "Prompts",
    "amortisation": "One guide for many prompts",
    "certificate": "Certificate",
    "frontier": "Frontier",
    "suite": "Suite",
    "training": "Training",
}
_NUM_SAMPLES, _MOST_PROMPTS = 8, 4


def folder_sections(folder: str | Path) -> tuple[list[str], list[Section]]:
    """Return the verdicts, and the sections about each of the files in a folder.

    Raises
    ------
    BayesKLRLError
        If there is no such folder, it holds nothing that can be shown, or one of its files cannot be read.
    CheckpointError
        If draws.nc is damaged.
    """
    path = Path(folder)
    check_is_folder(path)
    verdicts: list[str] = []
    sections: list[Section] = []
    for file in sorted((each for each in path.iterdir() if each.is_file()), key=_order):
        try:
            found = _section(file, verdicts)
        except (OSError, ValueError) as error:  # those of pandas and of decoding are ValueErrors
            raise BayesKLRLError(
                f"{str(file)!r} cannot be read: {str(error).strip()}. Write the folder anew by its command, or take the file "
                "out of it."
            ) from error
        sections += [] if found is None else [found]
    if not sections:
        raise BayesKLRLError(
            f"{str(path)!r} holds no table, picture, certificate or draws. Give the folder that `bayes-klrl ... --out FOLDER` "
            "wrote."
        )
    return verdicts, sections


def check_is_folder(path: Path) -> None:
    """Refuse what is no folder."""
    if not path.is_dir():
        raise BayesKLRLError(
            f"There is no folder {str(path)!r}. Give the one that `bayes-klrl ... --out FOLDER` wrote."
        )


def _section(file: Path, verdicts: list[str]) -> Section | None:
    """Return the section about a file, None if it has none; the verdict of a certificate is added to `verdicts`."""
    heading = _heading(file.stem)
    if file.suffix == ".txt" and heading.startswith("Certificate"):
        text = file.read_text(encoding="utf-8")
        verdicts.append(text.splitlines()[1] if len(text.splitlines()) > 1 else text)
        return Section(heading, f"<pre>{escape(text)}</pre>")
    if file.suffix == ".csv":
        return Section(f"{heading}: numbers", interactive(_table(file), f"{heading.lower()}"))
    if file.suffix == ".png":
        return Section(heading, picture_of_file(file, f"{heading}: the picture of {file.name}."))
    return Section("Samples", interactive(_samples(file), "completions")) if file.name == "draws.nc" else None


def _order(file: Path) -> tuple[int, str]:
    """Return the place of a file in the page."""
    names = list(_HEADINGS)
    stem = file.stem.split("-")[0]
    return (names.index(stem) if stem in names else len(names), file.name)


def _heading(stem: str) -> str:
    """Return the heading of a file: that of its kind, with its number if there are several."""
    kind, _, number = stem.partition("-")
    words = _HEADINGS.get(kind, kind)
    return f"{words} {number}".strip()


def _table(file: Path) -> HtmlTable:
    """Return a CSV file as a table; numbers to four digits."""
    table = pd.read_csv(file, keep_default_na=False)
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    words = [column for column, name in enumerate(table.columns) if not pd.api.types.is_numeric_dtype(table[name])]
    return HtmlTable([str(name) for name in table.columns], rows, words=words)


def _cell(value: object) -> str:
    """Return a cell's text."""
    try:
        return f"{float(str(value)):.4g}"
    except ValueError:
        return str(value)


def _samples(file: Path) -> HtmlTable:
    """Return the completions of most weight of each method and prompt."""
    rows = []
    for name, draws in load_comparison(file).items():
        texts, weights = draws.texts() if draws.decoder is not None else None, normalised(draws.log_weights)
        words = draws.prompt_words()
        for p in range(min(draws.shape[0], _MOST_PROMPTS)):
            for n in (-weights[p]).argsort(kind="stable")[:_NUM_SAMPLES]:
                ids = draws.tokens[p, n, : draws.lengths[p, n]].tolist()
                text = " ".join(map(str, ids)) if texts is None else visible(texts[p][n])
                rows.append([name, words[p], text, f"{draws.reward[p, n]:.4g}", f"{weights[p, n]:.3g}"])
    return HtmlTable(("method", "prompt", "completion", "reward", "weight"), rows, words=(0, 1, 2))
