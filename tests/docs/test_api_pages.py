"""The reference has every public name exactly once, under a heading of its own."""

import re
from collections import Counter

from tests.docs import DOCS
from tests.docs.test_pages import NAMES

DIRECTIVE = re.compile(r"^\.\. auto(class|function|exception):: bayes_klrl\.(\w+)$", re.MULTILINE)


def text_of_all_pages() -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted((DOCS / "reference" / "api").glob("*.md")))


def test_every_public_name_is_documented_exactly_once() -> None:
    counted = Counter(name for _, name in DIRECTIVE.findall(text_of_all_pages()))
    assert len(NAMES) > 80
    assert counted == Counter(dict.fromkeys(NAMES, 1))


def test_every_name_has_its_heading() -> None:
    text = text_of_all_pages()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == [name for _, name in DIRECTIVE.findall(text)]
