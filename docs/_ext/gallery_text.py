"""The cards of the gallery as Markdown (sphinx-design), made of what the examples found; knows nothing of Sphinx."""

from html import unescape
from typing import Any

ROOMS = {"language": "Language", "decisions": "Decisions"}


def markdown(findings: dict[str, dict[str, Any]], room: str) -> str:
    """Return a grid of cards (sphinx-design) for the examples of a room; without one, a sentence that says so."""
    cards = [_card(name, found) for name, found in sorted(findings.items()) if found["room"] == room]
    if not cards:
        return (
            "No example of this room has been collected yet: `make gallery`, then `python docs/collect_gallery.py`.\n"
        )
    return "\n".join(["::::{grid} 1 1 2 2", ":gutter: 3", "", *cards, "::::", ""])


def _card(name: str, found: dict[str, Any]) -> str:
    return "\n".join(
        [
            f":::{{grid-item-card}} {found['title'].rstrip('.')}",
            f":img-top: gallery/{name}.png",
            f":img-alt: {found['title']}",
            "",
            f"**Where inference is better.** {_plain(found['better'])}",
            "",
            f"**Where it is not.** {_plain(found['worse'])}",
            "",
            f"`bayes-klrl gallery {name}`, {found['seconds']:.0f} s, {{download}}`source <../{found['source']}>`",
            ":::",
            "",
        ]
    )


def _plain(text: str) -> str:
    """Return a sentence in which no sign of Markdown is read as one."""
    text = unescape(text)
    for sign in ("\\", "*", "_", "`", "[", "]", "<", "{", "$", "|", "#"):
        text = text.replace(sign, f"\\{sign}")
    return text
