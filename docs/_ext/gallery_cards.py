"""The directive `gallery`: the table "At a glance", or a card for every example of a room, made of `gallery/findings.json`.

`collect_gallery.py` writes these files from what the examples found when they were run; no number of a card or of the table
stands elsewhere.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from gallery_text import ROOMS, at_a_glance, markdown
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Gallery(SphinxDirective):
    """`{gallery} ROOM` in a Markdown page, or `{gallery} glance`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table, or the cards of a room."""
        shown = self.arguments[0]
        if shown not in {*ROOMS, "glance"}:
            raise self.error(f"There is no room {shown!r} in the gallery. Choose from {', '.join(ROOMS)}, or glance.")
        file = Path(self.env.srcdir) / "gallery" / "findings.json"
        self.env.note_dependency(str(file))
        findings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return self.parse_text_to_nodes(at_a_glance(findings) if shown == "glance" else markdown(findings, shown))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_directive("gallery", Gallery)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
