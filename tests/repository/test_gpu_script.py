"""`benchmarks/gpu.sh` on the CPU: every section runs, and the JSON file has what its table shows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf

ROOT = Path(__file__).parents[2]
# As a package of its own: the root, with its links, must not come onto sys.path.
if "benchmarks" not in sys.modules:
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
gpu = importlib.import_module("benchmarks.gpu.main")
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with this Python."""
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(tmp_path: Path) -> None:
    done = run("--tiny", "--device", "cpu", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["finished"]
    assert found["environment"]["card"] == "CPU"
    assert {"torch", "numpy"} <= found["environment"]["versions"].keys()
    assert set(found["checks"]) == {
        "TorchLM, float32",
        "TorchLM, bfloat16",
        "static step",
        "SMC",
        "SVI",
        "certify",
        "JaxLM",
    }
    for name, each in found["checks"].items():
        assert each.get("passed") or "skipped" in each, (name, each)
    # 0 where decoding and scoring round alike, as they do on this tiny model
    assert 0 <= found["checks"]["TorchLM, bfloat16"]["reported_gap"] < 1
    measured = found["measurements"]
    assert len(measured) == 2 * 2 * 5
    for name, each in measured.items():
        assert each["tokens_per_second"] > 0, (name, each)
        assert "of_generate" in each
    assert (tmp_path / "gpu.txt").read_text().strip() == done.stdout.strip()
    assert "environment" not in {path.name for path in tmp_path.iterdir()}  # nothing was installed


@pytest.fixture
def verbosity() -> Iterator[None]:
    """The script quietens transformers, for which this process has other uses."""
    before = hf.logging.get_verbosity()
    yield
    hf.logging.set_verbosity(before)


@pytest.mark.usefixtures("verbosity")
def test_what_there_is_no_time_for_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: the shell script does nothing else for it."""
    monkeypatch.setattr(sys, "argv", ["main", "--tiny", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    with torch.random.fork_rng(devices=[]):
        assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    for each in (*found["checks"].values(), *found["measurements"].values()):
        assert "are left" in each["skipped"]
    assert "skipped" in capsys.readouterr().out


def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert "--no-index" in shown.stdout
    nothing = tmp_path / "python"
    nothing.write_text("#!/bin/sh\nexit 1\n")
    nothing.chmod(0o755)
    for name in ("python3", "python"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    copy = tmp_path / "benchmarks" / "gpu.sh"  # beside no .venv
    copy.parent.mkdir()
    copy.write_text(SCRIPT.read_text())
    done = subprocess.run(
        ["bash", str(copy), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHON": str(nothing), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 2
    assert (tmp_path / "out").is_dir()  # the option in two words
    assert "No Python here can import torch" in done.stderr
