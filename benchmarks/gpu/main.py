"""Check and measure on one card, section by section, inside a number of seconds; see `benchmarks/gpu.sh`.

Read `checks` (the card's numbers against the CPU's), `measure` (tokens per second, memory, and how often the host waits),
`shapes` (the models) and `report` (the JSON file and the table).
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.measure import measures
from benchmarks.gpu.report import Report, environment

GRACE = 60.0
"""Seconds after the last section may begin, at which the process is ended."""


def main() -> int:
    """Run every section for which there is time, and return 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to test this script")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=235.0, help="sections that would begin later are skipped")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA card. Install a torch built for CUDA, or say --device cpu --tiny.", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    start = time.perf_counter()
    report = Report(options.out, environment(options.device, tiny=options.tiny))

    def give_up() -> None:
        print("A section does not end. What was finished is in", options.out / "gpu.json", file=sys.stderr, flush=True)
        os._exit(3)

    watch = threading.Timer(options.seconds + GRACE, give_up)
    watch.daemon = True
    watch.start()

    def left() -> float:
        return float(options.seconds - (time.perf_counter() - start))

    for name, check in CHECKS.items():
        run(report, "checks", name, 5.0, left, lambda check=check: check(options.device, options.tiny))
    for each in measures(options.device, tiny=options.tiny):
        run(report, "measurements", each.name, each.seconds, left, each.run)
    watch.cancel()
    report.finish(time.perf_counter() - start)
    print(report.table())
    return int(report.failed)


def run(
    report: Report, part: str, name: str, needs: float, left: Callable[[], float], section: Callable[[], dict[str, Any]]
) -> None:
    """Run one section and write what it found: numbers, why it was skipped, or its error."""
    start = time.perf_counter()
    if left() < needs:
        found: dict[str, Any] = {"skipped": f"it needs about {needs:.0f} s, and {max(0.0, left()):.0f} s are left"}
    else:
        print(f"{part}: {name}", file=sys.stderr, flush=True)
        try:
            found = section()
        except Exception as error:  # the other sections are worth having
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    report.add(part, name, {**found, "wall_seconds": round(time.perf_counter() - start, 2)})


if __name__ == "__main__":
    raise SystemExit(main())
