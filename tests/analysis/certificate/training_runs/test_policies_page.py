"""docs/policies.md does what it says, on the folders that TRL wrote."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bayes_klrl.cli.application import app
from tests.policies.make import HERE

PAGE = Path(__file__).parents[4] / "docs" / "policies.md"
POSTERIOR_FILE = "from tests.policies.make import HERE, posterior_of\n\nposterior = posterior_of(HERE / 'base')\n"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "rloo"):
        shutil.copytree(HERE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_code_of_the_page_prints_what_it_says(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```(python|text output)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (source, said) = (body for _, body in blocks)
    names: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == said
    assert (runs / "certificates" / "table.csv").is_file()


@pytest.mark.slow
def test_the_command_of_the_page_writes_what_it_says(runs: Path) -> None:
    """And a second run is refused: two curves would be written into one folder."""
    (runs / "posterior.py").write_text(POSTERIOR_FILE)
    (command,) = re.findall(r"^bayes-klrl (certify .*)$", PAGE.read_text(encoding="utf-8"), re.M)
    words = [*command.split(), "--draws", "64", "--quiet"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "checkpoint-6 is nearest to the posterior, at 0.67" in found.output
    assert "logged reward" in found.output
    inside = sorted(path.name for path in (runs / "certificates").iterdir() if not path.name.startswith("."))
    assert inside == ["certificates.png", "certificates.txt", "table.csv"]
    refused = CliRunner().invoke(app, [*words, "--policy", "base"])
    assert refused.exit_code == 1
    assert "--all-checkpoints takes one run" in refused.output
