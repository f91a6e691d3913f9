"""Links to the sections of theory.md by their numbers.

`### 3.10 Conditional SMC` gets the label `theory-3.10`, and a link to theory.md whose words end in a number, such as
[theory 3.10](theory.md), leads to that section. Both is done while a page is read: in the files the link leads to the
page, as it does on a code host, and the headings of the theory stay as they are, because the sources cite them and tests
read them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LINK = re.compile(r"\[([^\]\n]*?(\d+(?:\.\d+)?))\]\((?:\.\./)*theory\.md\)")
HEADING = re.compile(r"^(#{2,3}) (\d+(?:\.\d+)?)\.? (?=\S)", re.MULTILINE)


def labelled(text: str) -> str:
    """Return the text with a label before each numbered heading; code blocks have no such headings."""
    return HEADING.sub(lambda found: f"(theory-{found[2]})=\n{found[0]}", text)


def led_to_sections(text: str) -> str:
    """Return the text with its links to numbered sections of the theory leading to these sections."""
    return LINK.sub(r"[\1](#theory-\2)", text)


def _on_source_read(_app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = labelled(source[0]) if docname == "theory" else led_to_sections(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("source-read", _on_source_read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
