"""The results: one JSON file, written after every section, and a table."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("bayes-klrl", "torch", "transformers", "peft", "pyro-ppl", "jax", "numpyro", "numpy")
COLUMNS = ("seconds", "tokens_per_second", "peak_gib", "waits", "waits_per_token", "of_generate")


class Report:
    """What was found so far, in FOLDER/gpu.json; whatever ends the process, the finished sections are there."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {"environment": about, "checks": {}, "measurements": {}, "finished": False}
        self.write()

    @property
    def failed(self) -> bool:
        """Whether a check found a difference that is too large, or ended with an error."""
        return any("error" in each or each.get("passed") is False for each in self.found["checks"].values())

    def add(self, part: str, name: str, found: dict[str, Any]) -> None:
        """Add what a section found."""
        self.found[part][name] = found
        self.write()

    def finish(self, seconds: float) -> None:
        """Say that all sections are done, and write the table."""
        for name, each in self.found["measurements"].items():
            base = self.found["measurements"].get(f"{name.rpartition(': ')[0]}: generate", {})
            if "tokens_per_second" in each and "tokens_per_second" in base:
                each["of_generate"] = round(each["tokens_per_second"] / base["tokens_per_second"], 2)
        self.found |= {"finished": True, "seconds": round(seconds, 1)}
        self.write()
        (self.folder / "gpu.txt").write_text(self.table() + "\n", encoding="utf-8")

    def write(self) -> None:
        """Replace the file by one that holds everything so far."""
        beside = self.folder / "gpu.json.new"
        beside.write_text(json.dumps(self.found, indent=1, default=str), encoding="utf-8")
        beside.replace(self.folder / "gpu.json")

    def table(self) -> str:
        """Return the results as text."""
        about = self.found["environment"]
        lines = [f"{about['card']}, {', '.join(f'{k} {v}' for k, v in about['versions'].items())}", "", "checks"]
        for name, each in self.found["checks"].items():
            lines.append(f"  {name:34} {verdict(each)}")
        lines += ["", f"{'measurements':42} " + " ".join(f"{column:>17}" for column in COLUMNS)]
        for name, each in self.found["measurements"].items():
            if "seconds" in each:
                lines.append(f"  {name:40} " + " ".join(f"{shown(each.get(column)):>17}" for column in COLUMNS))
            else:
                lines.append(f"  {name:40} {verdict(each)}")
        lines += ["", f"{self.found.get('seconds', '?')} s, {self.folder / 'gpu.json'}"]
        return "\n".join(lines)


def verdict(each: dict[str, Any]) -> str:
    """Return what a section found in one line."""
    if "error" in each:
        return f"ERROR    {each['error'].splitlines()[0][:120]}"
    if "skipped" in each:
        return f"skipped  {each['skipped']}"
    numbers = ", ".join(f"{k} {shown(v)}" for k, v in each.items() if k not in ("passed", "wall_seconds"))
    return f"{'ok      ' if each['passed'] else 'FAILED  '} {numbers}"


def shown(value: Any) -> str:
    """Return a number with few digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def environment(device: str, *, tiny: bool) -> dict[str, Any]:
    """Return the card, its driver, and the versions of everything that takes part."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    about = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": device,
        "tiny": tiny,
        "card": "CPU",
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda,
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {
            "card": card.name,
            "card_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "driver": driver(),
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return about


def driver() -> str | None:
    """Return the version of the card's driver; None if nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
