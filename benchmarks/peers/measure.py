"""How a peer's process measures itself: CPU and wall seconds of each run, peak of memory, versions.

A peer is a module with a function `prepared(job)`, which loads the model and returns `run(seed, clock, small)`. What is in
`with clock:` is measured; `small` asks for a short run, which warms up what is made at first use. The job is a JSON file; its
keys are those of `benchmarks.peers.map.Cell`, the folder of the model, and the method.

This file needs the standard library and torch alone, since not every peer runs beside bayes_klrl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Clock", "Run", "main", "measured"]

Run = Callable[[int, "Clock", bool], dict[str, Any]]
"""`run(seed, clock, small)`, which returns what it found, as JSON can hold it."""


@dataclass
class Clock:
    """A context manager that adds up seconds: CPU seconds of this process and of its children that ended, and wall.

    Examples
    --------
    >>> clock = Clock()
    >>> with clock:
    ...     total = sum(range(1000))
    >>> clock.wall > 0
    True
    """

    cpu: float = 0.0
    wall: float = 0.0

    def __enter__(self) -> Clock:
        self._start = _cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += _cpu_seconds() - self._start[0]
        self.wall += time.perf_counter() - self._start[1]


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(run: Run, *, repetitions: int, first_seed: int) -> dict[str, Any]:
    """Return the seconds and answers of `repetitions` runs after a warm-up, and memory in MiB (Linux only, else 0)."""
    run(0, Clock(), True)
    _forget_peak()
    before, runs = _resident_mib("VmRSS"), []
    for seed in range(first_seed, first_seed + repetitions):
        clock = Clock()
        answer = run(seed, clock, False)
        runs.append({"seed": seed, "cpu": clock.cpu, "wall": clock.wall, **answer})
    return {"runs": runs, "peak_mib": _resident_mib("VmHWM"), "loaded_mib": before}


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def _resident_mib(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) / 1024


def main(prepared: Callable[[dict[str, Any]], Run], packages: Sequence[str]) -> None:
    """Read the command line of a peer's process, run its job with one thread, and write the JSON file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", type=Path, required=True, help="the job, a JSON file")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    result = measured(
        prepared(json.loads(options.task.read_text())),
        repetitions=options.repetitions,
        first_seed=options.first_seed,
    )
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    result["versions"]["python"] = platform.python_version()
    options.json.write_text(json.dumps(result))
