"""What an example of the gallery found: its page, and where the inference beat what people do today."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.whole_files import write_whole

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """What an example found.

    Parameters
    ----------
    report
        The page, an HTML file.
    picture
        The PNG file that stands for the example on the index page.
    better
        Where the inference beat what people do today, and by how much: one or two sentences with measured numbers.
    worse
        Where it did not, or what it costs: one or two sentences, as measured.
    numbers
        Every number of these sentences, and those that the documentation quotes, by a name with its unit.
    """

    report: Path
    picture: Path
    better: str
    worse: str
    numbers: Mapping[str, float]

    def save(self, *, seconds: float) -> Path:
        """Write `finding.json` beside the report, with the seconds that the example took, and return the file."""
        content = {
            "better": self.better,
            "worse": self.worse,
            "numbers": {name: float(value) for name, value in self.numbers.items()},
            "picture": self.picture.name,
            "report": self.report.name,
            "seconds": round(seconds, 1),
        }
        return write_whole(
            self.report.parent / "finding.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )

    @staticmethod
    def load(folder: Path) -> dict[str, object]:
        """Return the content of the `finding.json` in a folder.

        Raises
        ------
        BayesKLRLError
            If there is none, or it cannot be read.
        """
        file = folder / "finding.json"
        try:
            content: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BayesKLRLError(f"{str(file)!r} cannot be read ({error}). Run the example again.") from error
        return content
