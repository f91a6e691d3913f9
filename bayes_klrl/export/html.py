"""HTML of results for notebooks: a verdict, then tables. What `_repr_html_` of every result is made of.

Text alone: no script, no picture and no colour of our own, so that it is readable in light and in dark themes and without a
network. Whatever a model or a user wrote is escaped: a completion with `<script>` is shown and does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["HtmlTable", "html_page"]

_WORDS = "text-align: left; vertical-align: top; white-space: pre-wrap"
_NUMBER = "text-align: right; vertical-align: top"


@dataclass(frozen=True)
class HtmlTable:
    """A table of texts.

    Parameters
    ----------
    headings
        The heading of each column, C texts; none for a table without headings.
    rows
        The rows, of C texts each.
    words
        The indices of the columns that hold words and stand on the left; the others hold numbers and stand on the right.
    caption
        A text above the table; "" for none.
    """

    headings: Sequence[str]
    rows: Iterable[Sequence[str]]
    words: Collection[int] = (0,)
    caption: str = ""

    def __str__(self) -> str:
        head = f"<thead><tr>{self._cells('th', self.headings)}</tr></thead>" if self.headings else ""
        body = "".join(f"<tr>{self._cells('td', row)}</tr>" for row in self.rows)
        above = f"<p>{_escaped(self.caption)}</p>" if self.caption else ""
        return f"{above}<table>{head}<tbody>{body}</tbody></table>"

    def _cells(self, tag: str, texts: Sequence[str]) -> str:
        """Return the cells of a row."""
        scope = ' scope="col"' if tag == "th" else ""
        styles = (_WORDS if column in self.words else _NUMBER for column in range(len(texts)))
        return "".join(
            f'<{tag}{scope} style="{style}">{_escaped(text)}</{tag}>' for text, style in zip(texts, styles, strict=True)
        )


def html_page(verdict: str, *parts: HtmlTable | str) -> str:
    """Return a piece of HTML: the verdict in bold, then each part, a table or a text that becomes a paragraph.

    Examples
    --------
    >>> html_page("near", "a < b")
    '<div><p><strong>near</strong></p><p>a &lt; b</p></div>'
    """
    shown = (str(part) if isinstance(part, HtmlTable) else f"<p>{_escaped(part)}</p>" for part in parts)
    return f"<div><p><strong>{_escaped(verdict)}</strong></p>{''.join(shown)}</div>"


def _escaped(text: str) -> str:
    """Return text as HTML shows it, line by line."""
    return "<br>".join(escape(line) for line in text.split("\n"))
