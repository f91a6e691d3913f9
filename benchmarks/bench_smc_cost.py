"""SMC with its default twist against plain sampling of as many completions: CPU seconds and peak memory on `austen`.

Every run is a process of its own, so that the peak of its memory is its own; the two take turns, and the ratio is that of the
medians. The reward is VADER's sentiment at alpha = 0.1. "memory" is the growth of the peak after the model was loaded and has
drawn once.

    OMP_NUM_THREADS=1 python benchmarks/bench_smc_cost.py [--repetitions 3] [--cases 1x64x24 1x256x24 1x1024x24 32x256x24]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any

import numpy as np

OPENINGS = (
    "It was a",
    "She said that",
    "The morning",
    "My dear",
    "He looked at",
    "There is",
    "In the garden",
    "I never",
)
SUBJECTS = ("walk", "letter", "visit", "winter")
TARGETS = {64: 1.15}


def measured(name: str, num_prompts: int, num: int, num_tokens: int, seed: int, queue: Any) -> None:
    """Put CPU seconds, the growth of peak memory in GiB and the mean log Z-hat of one run into the queue."""
    import torch

    import bayes_klrl as bk
    from bayes_klrl.models.rewards import sentiment

    torch.set_num_threads(1)
    prior = bk.TorchLM.from_pretrained("austen")
    prompts = [f"{opening} {subject}" for subject in SUBJECTS for opening in OPENINGS][:num_prompts]
    likelihood = bk.Reward(sentiment, alpha=0.1, bounds=(-1, 1))
    posterior = bk.Posterior(prior, likelihood, prompts=prompts, max_new_tokens=num_tokens)
    algorithm = {"sampling": bk.ImportanceSampling, "SMC": bk.SMC}[name]
    algorithm(2).run(posterior.select([0]), seed=0)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    draws = algorithm(num).run(posterior, seed=seed)
    seconds = time.process_time() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    queue.put((seconds, growth, float(draws.log_evidence.mean())))


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=["1x64x24", "1x256x24", "1x1024x24", "32x256x24"])
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| prompts x N x T | sampling, CPU s | SMC | ratio | target | memory, GiB | SMC | ratio | target |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in options.cases:
        sizes = tuple(int(size) for size in case.split("x"))
        found: dict[str, list[tuple[float, float, float]]] = {"sampling": [], "SMC": []}
        for seed in range(options.repetitions):
            for name, results in found.items():
                queue = context.Queue()
                process = context.Process(target=measured, args=(name, *sizes, seed, queue))
                process.start()
                results.append(queue.get())
                process.join()
        (plain, plain_memory, _), (smc, smc_memory, _) = (np.median(results, axis=0) for results in found.values())
        print(
            f"| {case} | {plain:.2f} | {smc:.2f} | {smc / plain:.2f} | {TARGETS.get(sizes[1], 1.08)} "
            f"| {plain_memory:.2f} | {smc_memory:.2f} | {smc_memory / plain_memory:.2f} | 1.2 |",
            flush=True,
        )


if __name__ == "__main__":
    main()
