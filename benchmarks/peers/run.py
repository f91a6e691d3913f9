"""The driver: every row of every cell in a process of its own, in turns, and then the table and the picture.

    make peers                                              the default cells: 20 to 45 minutes, beside other work
    python -m benchmarks.peers.run --list [--full]          their names
    python -m benchmarks.peers.run --cell evidence-constraint-N64 --out folder
    python -m benchmarks.peers.run --full --limit 1800      all cells that fit in memory: days

A process that ended is not run again when the command is repeated with the same `--out`; `--fresh` forgets them. Ctrl-C ends
the process that runs, and writes the table of what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import models, report, truth
from benchmarks.peers.map import Cell, Row, cells, needed_gib, rows

__all__ = ["collect", "default_repetitions", "job_of", "main", "run_process"]

ROOT = Path(__file__).parents[2]
DISCO = ROOT / ".venv-peers-disco" / "bin" / "python"
NO_DISCO = "not installed: disco-generation wants Python 3.8 to 3.10, and none was found"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
FIRST_SEED = 1


def default_repetitions(cell: Cell) -> int:
    """Return how often a process runs: 50 times for log Z, once for a training or a large model, else 3 times."""
    if cell.kind != "sampling":
        return 50 if cell.kind == "evidence" else 1
    arithmetic = models.num_parameters(cell.shape, cell.vocab_size) * cell.num * cell.num_prompts * cell.tokens
    return 1 if arithmetic > 1e11 else 3


def job_of(cell: Cell, row: Row, out: Path) -> dict[str, Any]:
    """Return the job of a row as its process reads it, and write the checkpoint that it names unless it is there."""
    job = cell.job() | {"method": row.method, "out": str(out / "policies" / cell.name / _slug(row.name))}
    if cell.kind == "sampling":
        folder = models.write_random(cell.shape, cell.vocab_size, out / "models" / f"{cell.shape}-{cell.vocab_size}")
        prompts = models.prompts(cell.vocab_size, cell.prompt_length, cell.num_prompts)
    else:
        posterior = truth.task(cell.task)
        folder = models.write_task(posterior, out / "models" / cell.task)
        prompts = [list(prompt) for prompt in posterior.prompt_ids]
        job |= {"eos": posterior.pad_token, "tokens": posterior.max_new_tokens}
        job["log_likelihood"] = truth.look_up(cell.task)
        if cell.task == "constraint":
            job["forbidden"] = list(truth.FORBIDDEN)
    return job | {"model": str(folder), "prompts": prompts, "texts": [models.as_text(prompt) for prompt in prompts]}


def run_process(
    row: Row, job: Mapping[str, Any], out: Path, *, repetitions: int, first_seed: int, limit: float
) -> dict[str, Any]:
    """Return what a row's process wrote, or {"note": why not}: its last line of error, or that it took longer than `limit`."""
    python = str(DISCO) if row.environment == "disco" else sys.executable
    if row.environment == "disco" and not DISCO.exists():
        return {"note": NO_DISCO}
    task, found = out / "job.json", out / "found.json"
    task.write_text(json.dumps(job))
    found.unlink(missing_ok=True)
    command = [python, "-m", f"benchmarks.peers.{row.module}", "--task", str(task), "--json", str(found)]
    command += ["--repetitions", str(repetitions), "--first-seed", str(first_seed)]
    environment = {**os.environ, **ONE_THREAD, **OFFLINE}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"note": f"not finished after {limit:.0f} s"}
    if done.returncode or not found.exists():
        return {"note": _last_line(done.stderr) or f"ended with code {done.returncode}"}
    result: dict[str, Any] = json.loads(found.read_text())
    if job["kind"] == "evidence":
        result["log_evidence"] = truth.log_evidence(job["task"])
    if job["kind"] == "tuning":
        result["kl"] = [truth.distances(job["task"], Path(run["policy"])) for run in result["runs"]]
        shutil.rmtree(job["out"], ignore_errors=True)
    return result


def _last_line(text: str) -> str:
    """Return the last line of an error, as a cell of a table can hold it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:200] if lines else ""


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def _file(out: Path, cell: Cell, row: Row, turn: int) -> Path:
    return out / "runs" / cell.name / f"{_slug(row.name)}-{turn}.json"


def _write_whole(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(file)


def _free_gib() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) / 2**20


def run_cells(chosen: Sequence[Cell], out: Path, *, rounds: int, repetitions: int | None, limit: float) -> None:
    """Run what is not in `out` yet: the rows of a cell take turns, `rounds` times."""
    start = time.monotonic()
    for place, cell in enumerate(chosen, 1):
        needed, free = needed_gib(cell), _free_gib()
        failed: set[str] = set()
        for turn in range(rounds):
            for row in rows(cell):
                file = _file(out, cell, row, turn)
                if file.exists() and "note" in json.loads(file.read_text()):
                    failed.add(row.name)
                if file.exists() or row.name in failed:
                    continue
                minutes = (time.monotonic() - start) / 60
                print(
                    f"[{place}/{len(chosen)}, {minutes:.1f} min] {cell.name}, round {turn + 1}: {row.name}", flush=True
                )
                if needed > free:
                    result: dict[str, Any] = {"note": f"needs about {needed:.1f} GiB, {free:.1f} are free"}
                else:
                    each = repetitions or default_repetitions(cell)
                    first_seed = FIRST_SEED + turn * each
                    job = job_of(cell, row, out)
                    result = run_process(row, job, out, repetitions=each, first_seed=first_seed, limit=limit)
                if "note" in result:
                    failed.add(row.name)
                    print(f"    {result['note']}", flush=True)
                _write_whole(file, result)


def collect(chosen: Sequence[Cell], out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the summaries of all rows that were run, by cell and row, and the versions that they found."""
    found: dict[str, dict[str, Any]] = {}
    versions: dict[str, set[str]] = {}
    for cell in chosen:
        for row in rows(cell):
            files = sorted(_file(out, cell, row, 0).parent.glob(f"{_slug(row.name)}-[0-9]*.json"))
            results = [json.loads(file.read_text()) for file in files]
            if results:
                found.setdefault(cell.name, {})[row.name] = report.summary(results)
            for result in results:
                for package, version in result.get("versions", {}).items():
                    versions.setdefault(package, set()).add(version)
    return found, {package: ", ".join(sorted(seen)) for package, seen in sorted(versions.items())}


def write_report(chosen: Sequence[Cell], out: Path) -> str:
    """Write peers.json, peers.md and peers.png into `out`, and return the table."""
    found, versions = collect(chosen, out)
    _write_whole(out / "peers.json", {"versions": versions, "cells": found})
    text = report.table(found)
    shown = ", ".join(f"{package} {version}" for package, version in versions.items())
    (out / "peers.md").write_text(f"{text}\n\nVersions: {shown}.\n")
    report.plot(found, out / "peers.png")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run the cells, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all cells of the map that fit in memory")
    parser.add_argument("--cell", action="append", metavar="NAME", help="this cell; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each row")
    parser.add_argument("--repetitions", type=int, help="runs in a process; by default 50 for log Z, else 3 or 1")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a process may take")
    parser.add_argument("--fresh", action="store_true", help="run again what was run already")
    options = parser.parse_args(arguments)
    chosen = cells(full=options.full)
    if options.cell:
        known = {cell.name: cell for cell in cells(full=True)} | {cell.name: cell for cell in cells()}
        unknown = [name for name in options.cell if name not in known]
        if unknown:
            parser.error(f"there is no cell {unknown[0]!r}; --list --full prints them all")
        chosen = tuple(known[name] for name in options.cell)
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    if options.fresh:
        shutil.rmtree(options.out / "runs", ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        run_cells(chosen, options.out, rounds=options.rounds, repetitions=options.repetitions, limit=options.limit)
    except KeyboardInterrupt:
        print("stopped; what is done is kept, and the same command goes on", flush=True)
    print(write_report(chosen, options.out))


if __name__ == "__main__":
    main()
