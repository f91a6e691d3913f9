"""Draw the picture of README.md: `python docs/ten_lines.py` runs its first Python block, and plots the result of it."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main(file: Path = ROOT / "docs" / "ten_lines.png") -> Path:
    """Run the ten lines, draw reward against KL of every method over the frontier of all alphas, and return the file."""
    import bayes_klrl as bk

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (source, *_) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    curve = bk.frontier(names["posterior"], num_draws=4000, seed=0)
    return curve.plot(file, policies={"SVI, 40 steps": names["result"]["SVI"]})


if __name__ == "__main__":
    print(main())
