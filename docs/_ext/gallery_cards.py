"""The directive `gallery`: a card for every example, made of `gallery/findings.json` and of the pictures beside it.

`collect_gallery.py` writes these files from what the examples found when they were run; no number of a card stands elsewhere.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from gallery_text import ROOMS, markdown
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Gallery(SphinxDirective):
    """`{gallery} ROOM` in a Markdown page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the cards of a room."""
        room = self.arguments[0]
        if room not in ROOMS:
            raise self.error(f"There is no room {room!r} in the gallery. Choose from {', '.join(ROOMS)}.")
        file = Path(self.env.srcdir) / "gallery" / "findings.json"
        self.env.note_dependency(str(file))
        findings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return self.parse_text_to_nodes(markdown(findings, room))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_directive("gallery", Gallery)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
