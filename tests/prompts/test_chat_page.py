"""docs/chat.md does what it says."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "chat.md"


@pytest.mark.slow
def test_blocks_run_and_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "chat"}
    printed = ""
    for info, body in re.findall(
        r"^```(python|text output)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S
    ):
        if info == "python":
            exec(compile(body, str(PAGE), "exec"), names)
            printed = capsys.readouterr().out
        else:
            assert printed.splitlines() == body.splitlines()
    assert names["posterior"].num_prompts == 2
