"""docs/rewards.md does what it says."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


def test_the_block_runs() -> None:
    names: dict[str, Any] = {"__name__": "rewards"}
    (body,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(body, str(PAGE), "exec"), names)
    assert names["reward"].label == "loud + asked_a_server + right"
