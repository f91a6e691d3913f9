"""The document of a report: one file that needs no network, for light and dark screens, phones and paper."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from bayes_klrl.export.html import HtmlTable

__all__ = ["Section", "document", "interactive", "paragraph", "picture", "picture_of_file", "versions"]

_PNG = b"\x89PNG\r\n\x1a\n"
_PACKAGES = ("bayes_klrl", "torch", "transformers", "pyro-ppl", "numpyro", "jax", "arviz", "numpy")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Parameters
    ----------
    heading
        Its heading, as text.
    body
        Its content, as HTML.
    """

    heading: str
    body: str


def document(title: str, verdicts: Sequence[str], sections: Sequence[Section], *, style: str = "") -> str:
    """Return the whole page: the verdicts first, links to the sections, then the sections; `style` is CSS of its own."""
    assets = files(__package__).joinpath("assets")
    common, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    links = "".join(
        f'<li><a href="#part-{number}">{escape(section.heading)}</a></li>' for number, section in enumerate(sections)
    )
    parts = "".join(
        f'<section id="part-{number}"><h2>{escape(section.heading)}</h2>{section.body}</section>'
        for number, section in enumerate(sections)
    )
    said = "".join(f'<p class="verdict">{escape(verdict)}</p>' for verdict in verdicts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{common}{style}</style></head>'
        f'<body><header><h1>{escape(title)}</h1>{said}</header><nav aria-label="Sections"><ul>{links}</ul></nav>'
        f"<main>{parts}</main><script>{script}</script></body></html>\n"
    )


def paragraph(text: str) -> str:
    """Return a text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def interactive(table: HtmlTable | str, label: str) -> str:
    """Return a table that can be sorted by its headings and filtered by a word; without scripts it is the table alone."""
    return f'<div class="interactive" data-label="{escape(label)}">{table}</div>'


def picture(draw: Callable[[Path], Any], words: str) -> str:
    """Return a picture inside of the page.

    Parameters
    ----------
    draw
        Function that writes the picture into a PNG file.
    words
        What it shows, for its caption and for people who cannot see it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        draw(file)
        return picture_of_file(file, words)


def picture_of_file(file: Path, words: str) -> str:
    """Return the picture of a PNG file inside of the page.

    Raises
    ------
    ValueError
        If it is no PNG file.
    """
    picture = file.read_bytes()
    if not picture.startswith(_PNG):
        raise ValueError("it is no PNG picture")
    content = base64.b64encode(picture).decode("ascii")
    return (
        f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def versions() -> HtmlTable:
    """Return the versions of Python, of this package and of what it computes with, as far as they are installed."""
    rows = [["Python", platform.python_version()], ["system", f"{platform.system()} {platform.machine()}"]]
    for name in _PACKAGES:
        try:
            rows.append([name, importlib.metadata.version(name)])
        except importlib.metadata.PackageNotFoundError:
            continue
    return HtmlTable((), rows, words=(0, 1))
