"""The theory and what cites it: every citation leads to a section, every test that the theory names exists."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THEORY = ROOT / "docs" / "theory.md"

FOLDERS = ("bayes_klrl", "tests", "examples", "benchmarks", "docs")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SUFFIXES = {".py", ".md", ".toml"}

HEADING = re.compile(r"^(#{2,3}) (\d+(?:\.\d+)?)\.? (?=\S)", re.MULTILINE)
CITATION = re.compile(r"theory\.md[\s#]+(\d+(?:\.\d+)?(?:,[\s#]+\d+\.\d+)*)")
OLD_NAMES = re.compile(r"\b(THEORY|TRAPS|DESIGN)\b")
TEST_NAME = re.compile(r"\btest_\w+")
TEST_FUNCTION = re.compile(r"^[ \t]*(?:async )?def (test_\w+)\(", re.MULTILINE)


def headings(text: str) -> list[tuple[int, str]]:
    """The depth and the number of every numbered heading, in order; code blocks are not looked into."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [(len(marks), number) for marks, number in HEADING.findall(prose)]


def citations(text: str) -> list[str]:
    """The numbers of the sections that a text cites, those after a comma and on the next line included."""
    return [number for found in CITATION.findall(text) for number in re.split(r",[\s#]+", found)]


def old_names(text: str) -> list[str]:
    """The documents that a text cites by the names they had outside of the repository."""
    return OLD_NAMES.findall(text)


def named_tests(text: str) -> set[str]:
    """The tests that a text names."""
    return set(TEST_NAME.findall(text))


def defined_tests(texts: Iterable[str]) -> set[str]:
    """The tests that files define, methods of classes included."""
    return {name for text in texts for name in TEST_FUNCTION.findall(text)}


def out_of_order(numbered: Iterable[tuple[int, str]]) -> list[str]:
    """The headings that are not the next in order: 1, 1.1, 1.2, 2, 2.1 and so on, depth 2 before depth 3."""
    wrong, section, subsection = [], 0, 0
    for depth, number in numbered:
        expected = str(section + 1) if depth == 2 else f"{section}.{subsection + 1}"
        if number != expected:
            wrong.append(number)
        major, _, minor = number.partition(".")
        section, subsection = int(major), int(minor or 0)
    return wrong


def texts_that_cite() -> Iterator[tuple[str, str]]:
    """The path and the text of every file that may cite the theory, but this one."""
    paths = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        paths += sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES and path.is_file())
    for path in paths:
        if path != Path(__file__):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_every_citation_leads_to_a_section() -> None:
    known = {number for _, number in headings(THEORY.read_text(encoding="utf-8"))}
    lost = {path: [number for number in citations(text) if number not in known] for path, text in texts_that_cite()}
    assert {path: numbers for path, numbers in lost.items() if numbers} == {}


def test_nothing_cites_what_is_not_in_the_repository() -> None:
    found = {path: old_names(text) for path, text in texts_that_cite()}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_test_that_the_theory_names_exists() -> None:
    tests = defined_tests(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))
    named = named_tests(THEORY.read_text(encoding="utf-8"))
    assert len(named) > 50
    assert named - tests == set()


def test_sections_are_numbered_one_after_the_other() -> None:
    text = THEORY.read_text(encoding="utf-8")
    found = headings(text)
    assert len(found) > 50
    assert out_of_order(found) == []
    assert len(found) == len(re.findall(r"^#{2,} ", text, re.MULTILINE))  # none is without a number


def test_every_trap_names_its_guards() -> None:
    text = THEORY.read_text(encoding="utf-8")
    traps = re.split(r"^### (?=9\.)", text.partition("\n## 10.")[0], flags=re.MULTILINE)[1:]
    assert len(traps) > 20
    assert [trap.splitlines()[0] for trap in traps if not named_tests(trap)] == []


BAD = """
## 1. One

### 1.1 Cited, by theory.md 1.1 and (theory.md 1.2,
1.1)

### 1.3 Not the next

```
## 7. Not a heading
```

## 3. Nor is this; THEORY 1.2 is cited, TRAPS and DESIGN's figures; a theory, `test_that_is_not` and test_that_is
"""


def test_the_finders_find() -> None:
    assert headings(BAD) == [(2, "1"), (3, "1.1"), (3, "1.3"), (2, "3")]
    assert out_of_order(headings(BAD)) == ["1.3", "3"]
    assert citations(BAD) == ["1.1", "1.2", "1.1"]
    assert old_names(BAD) == ["THEORY", "TRAPS", "DESIGN"]
    assert named_tests(BAD) == {"test_that_is_not", "test_that_is"}
    assert defined_tests(["def test_that_is() -> None: ...\n    def test_inner(self): ...\n# test_that_is_not("]) == {
        "test_that_is",
        "test_inner",
    }


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("the bounds (theory.md 3.11); more", ["3.11"]),
        ("of theory.md 3.2, 8.1 and others", ["3.2", "8.1"]),
        ("see theory.md 3.", ["3"]),
        ("(theory.md\n    1.13). So", ["1.13"]),
        ("# as theory.md\n# 7.4 has it", ["7.4"]),
        ("at theory.md 3, 400 runs", ["3"]),
        ("docs/theory.md is the paper", []),
    ],
)
def test_citations_as_they_are_written(text: str, numbers: list[str]) -> None:
    assert citations(text) == numbers


@pytest.mark.parametrize("numbers", [["2"], ["1", "1.2"], ["1", "1.1", "1.1"], ["1", "2.1"], ["1", "3"]])
def test_numbers_that_are_no_numbering(numbers: list[str]) -> None:
    assert out_of_order((2 + number.count("."), number) for number in numbers) != []
