"""Table and cards of the gallery as Markdown (sphinx-design), made of what the examples found; knows nothing of Sphinx."""

from html import unescape
from typing import Any

from bayes_klrl.gallery import index
from bayes_klrl.gallery.glance import glance_of
from bayes_klrl.gallery.page import HEADS

ROOMS = index.ROOMS


def at_a_glance(findings: dict[str, dict[str, Any]]) -> str:
    """Return the table "At a glance", whose rows lead to the cards of the examples that have been collected."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---|---|---|"]
    for row in index.at_a_glance({name: found["numbers"] for name, found in findings.items()}):
        name = f"[`{row.name}`](#gallery-{row.name})" if row.name in findings else f"`{row.name}`"
        verdict, _, measured = row.helped.partition(". ")
        helped = f"**{_plain(verdict)}.** {_plain(measured)}" if measured else _plain(verdict)
        lines.append(
            f"| {name}: {_plain(row.glance.job)} | {_plain(row.glance.today)} | {_plain(row.glance.adds)} | {helped} |"
        )
    return "\n".join(lines) + "\n"


def markdown(findings: dict[str, dict[str, Any]], room: str) -> str:
    """Return a grid of cards (sphinx-design) for the examples of a room; without one, a sentence that says so.

    A card has the caption of its picture, and the model and the data, as the example declares them.
    """
    cards = [_card(name, found) for name, found in sorted(findings.items()) if found["room"] == room]
    if not cards:
        return (
            "No example of this room has been collected yet: `make gallery`, then `python docs/collect_gallery.py`.\n"
        )
    return "\n".join(["::::{grid} 1 1 2 2", ":gutter: 3", "", *cards, "::::", ""])


def _card(name: str, found: dict[str, Any]) -> str:
    file = index.examples().get(name)
    glance = None if file is None else glance_of(file)
    declared = () if glance is None else (("In the picture", glance.picture), ("Setting", glance.setting))
    return "\n".join(
        [
            f":::{{grid-item-card}} {found['title'].rstrip('.')}",
            f":img-top: gallery/{name}.png",
            f":img-alt: {found['title']}",
            "",
            f"(gallery-{name})=",
            *(line for head, words in declared for line in (f"**{head}.** {_plain(words)}", "")),
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
