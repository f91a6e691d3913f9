"""What a training on several ranks costs, and how often rounding changes a draw; docs/ranks.md.

python benchmarks/bench_ranks.py steps
accelerate launch --multi_gpu --num_processes 2 benchmarks/bench_ranks.py steps
python benchmarks/bench_ranks.py draws
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode_by

RECIPES: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "kl_sgd, critic": {"optimizer": "kl_sgd", "twist": bk.PartialRewardTwist()},
}


def posterior() -> bk.Posterior:
    cheerful = bk.Reward(lambda completions: [min(text.count("!"), 3) for text in completions], alpha=0.5)
    prior = bk.TorchLM.from_pretrained("austen")
    return bk.Posterior(prior, cheerful, prompts="It was a fine morning", max_new_tokens=24)


def steps(num_steps: int) -> None:
    """Print the median CPU seconds of a step on rank 0, after the first two."""
    for name, recipe in RECIPES.items():
        times: list[float] = []

        def note(_record: Any, _guide: Any, times: list[float] = times) -> None:
            times.append(time.process_time())

        bk.SVI(num_steps, 64, **recipe).fit(posterior(), seed=0, callbacks=[note])
        if times:
            print(f"{name}: {np.median(np.diff(times)[1:]):.2f} CPU seconds per step")


def draws(num_batches: int) -> None:
    """Print how many of 64 completions per batch are others if they are decoded in two halves."""
    target, changed = posterior(), 0
    for seed in range(num_batches):
        uniforms = np.random.default_rng(seed).random((target.max_new_tokens, 64))
        parts = (slice(64), slice(32), slice(32, 64))
        whole, *halves = (decode_by((target.prior,), target.prompt_ids, uniforms[:, part]).tokens for part in parts)
        changed += int((whole != np.concatenate(halves)).any(axis=1).sum())
    print(f"{changed} of {64 * num_batches} completions are others")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "draws"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batches", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.what == "steps":
        steps(args.steps)
    else:
        draws(args.batches)


if __name__ == "__main__":
    main()
