"""The command line where files cannot be written: refused before the work, and results are printed all the same."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import SMALL, run

HELD_OUT = SMALL + "held_out = bk.Posterior(letters, vowels, prompts=['the r'], max_new_tokens=3)\n"
COMMANDS = {
    "compare": ["compare", "small.py", "--method", "prior-is"],
    "amortise": ["amortise", "small.py", "--draws", "32", "--steps", "2"],
    "sample": ["sample", "small.py", "--method", "ImportanceSampling(50)"],
    "tune": ["tune", "small.py", "--steps", "2", "--particles", "8"],
    "certify": ["certify", "small.py", "--draws", "32", "--runs", "2", "--particles", "4"],
    "frontier": ["frontier", "small.py", "--num-draws", "512", "--kl", "0.1"],
    "suite": ["suite", "P1", "--method", "prior-is", "--budget", "400", "--repeats", "2"],
}
PRINTED = {
    "compare": "log evidence",
    "amortise": "unseen prompt",
    "sample": "the c",
    "tune": "ELBO",
    "certify": "nats from the posterior",
    "frontier": "for kl = 0.1",
    "suite": "prior-is",
}


@pytest.fixture(autouse=True)
def small(tmp_cwd: Path) -> Path:
    file = tmp_cwd / "small.py"
    file.write_text(HELD_OUT)
    return file


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "out, code, message",
    [
        ("small.py/results", 1, "Not a directory"),
        ("small.py", 1, "is a file"),
        ("", 2, "the name of the folder is empty"),
    ],
    ids=["under a file", "a file", "empty"],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    command: str, out: str, code: int, message: str, tmp_cwd: Path
) -> None:
    (tmp_cwd / "small.py").write_text("raise RuntimeError('the work has begun')\n")
    result = run(*COMMANDS[command], "--out", out, "--quiet")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "the work has begun" not in result.output
    assert [path.name for path in tmp_cwd.iterdir()] == ["small.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_may_not_be_made_is_refused_before_the_work(
    command: str, tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_cwd / "small.py").write_text("raise RuntimeError('the work has begun')\n")
    monkeypatch.setattr(Path, "mkdir", forbidden)
    result = run(*COMMANDS[command], "--out", "results", "--quiet")
    assert result.exit_code == 1
    assert "'results' cannot be written: Permission denied" in " ".join(result.output.split())
    assert "the work has begun" not in result.output


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow if name == "amortise" else ()) for name in COMMANDS]
)
def test_results_are_printed_when_the_disk_is_full(
    command: str, tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("bayes_klrl.export.output_folder.write_whole", lambda file, content: file)  # the mark
    monkeypatch.setattr("bayes_klrl.inference.svi.loop.write_checkpoint", lambda *_: None)
    result = run(*COMMANDS[command], "--out", tmp_cwd / "results", "--quiet")
    assert result.exit_code == 1, result.output
    words = " ".join(result.output.split())
    assert PRINTED[command] in words
    assert "cannot be written: No space left on device. No half file was left. Free some space" in words
    assert "No result was written before it" in words
    assert "Traceback" not in result.output
    assert not [path for path in (tmp_cwd / "results").rglob("*") if path.is_file()]
