"""What worker processes gain: `compare` over eight prompts of the shipped model, in this process and in two others.

    python benchmarks/bench_runners.py [--processes 2] [--draws 1024] [--rounds 3]

Each round runs both, one after the other, checks that the draws are the same to the bit, and prints the ratio of their wall
times. The first call, which starts the processes (they load torch), is apart. One torch thread everywhere. Two processes gain
little where others use the cores, so the load of the machine is printed too, and the ratio of CPU seconds: those of this
process alone over those of the busiest worker, which is what the wall times would give on idle cores.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.cli.demo.many_prompts import posterior as many
from bayes_klrl.runners.runner import Task, outcomes_of


def state_of_worker(*, progress: bool) -> tuple[int, float, float]:
    """Return the number of a worker, its CPU seconds and its peak memory in MB, after a while, so that all workers answer."""
    assert not progress
    time.sleep(0.5)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return os.getpid(), time.process_time(), float(lines["VmHWM"].split()[0]) / 1024


def states_of(runner: bk.ProcessRunner) -> dict[int, tuple[float, float]]:
    """Return CPU seconds and peak memory of each worker."""
    found = outcomes_of(runner, [Task("state", state_of_worker, ())] * runner.num_workers)
    return {outcome.value[0]: outcome.value[1:] for outcome in found}


def seconds(posterior: bk.Posterior, rows: dict[str, bk.Algorithm], runner: bk.Runner) -> tuple[float, bk.Comparison]:
    """Return the wall time of one comparison, and the comparison."""
    start = time.perf_counter()
    comparison = bk.compare(posterior, rows, seed=0, runner=runner)
    return time.perf_counter() - start, comparison


def main() -> None:
    """Print a line per round, then the median."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--draws", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    posterior = many.select(range(8))
    rows: dict[str, bk.Algorithm] = {"prior IS": bk.ImportanceSampling(given.draws), "SMC": bk.SMC(given.draws)}
    ratios = []
    with bk.ProcessRunner(given.processes) as processes:
        first, _ = seconds(posterior, rows, processes)
        print(
            f"8 prompts, {given.draws} draws of {', '.join(rows)}; the first call, which starts processes: {first:.1f} s"
        )
        for number in range(given.rounds):
            load = os.getloadavg()[0]
            own = time.process_time()
            serial, here = seconds(posterior, rows, bk.SerialRunner())
            own = time.process_time() - own
            before = states_of(processes)
            spread, there = seconds(posterior, rows, processes)
            busiest = max(cpu - before[worker][0] for worker, (cpu, _) in states_of(processes).items())
            for name in rows:
                assert np.array_equal(here[name].log_weights, there[name].log_weights), name
            ratios.append(serial / spread)
            print(
                f"round {number + 1}: one process {serial:.2f} s, {given.processes} processes {spread:.2f} s, "
                f"{ratios[-1]:.2f} times as fast (load before it {load:.1f}); CPU {own:.1f} s, of the busiest worker "
                f"{busiest:.1f} s: {own / busiest:.2f}",
                flush=True,
            )
        print(f"peak memory of the workers: {', '.join(f'{peak:.0f}' for _, peak in states_of(processes).values())} MB")
    print(f"median: {np.median(ratios):.2f} times as fast, the same draws to the bit")


if __name__ == "__main__":
    main()
