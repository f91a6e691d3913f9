"""NUTS on preferences, one thread: wall and CPU seconds, compilation apart.

    OMP_NUM_THREADS=1 python benchmarks/bench_reward_posterior.py [--pairs 2000] [--features 32] [--infer-scale]

The target: 2,000 preferences x 32 features, 4 chains x 1,000 draws (after 1,000 of warm-up) in under a minute, all in. The
first fit compiles; the second, on other data of the same shape, does not, and the difference is the time of compiling.
"""

from __future__ import annotations

import argparse
import os
import time

# one thread for XLA too, before jax is imported
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1".strip()
)

import numpy as np

import bayes_klrl as bk

TARGET_SECONDS = 60
VOCABULARY = 4000


def compared(table: np.ndarray, num: int, seed: int) -> bk.Preferences:
    """Return comparisons of completions of one token each, whose features are rows of a table."""
    rng = np.random.default_rng(seed)
    theta = 0.3 * rng.standard_normal(table.shape[1])
    pairs = np.stack([rng.choice(VOCABULARY, size=2, replace=False) for _ in range(num)])
    first = rng.random(num) < 1 / (1 + np.exp((table[pairs[:, 1]] - table[pairs[:, 0]]) @ theta))
    won, lost = np.where(first, pairs.T, pairs.T[::-1])
    return bk.Preferences([()] * num, won[:, None].tolist(), lost[:, None].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--infer-scale", action="store_true", help="infer the prior's scale too")
    arguments = parser.parse_args()
    table = np.random.default_rng(0).standard_normal((VOCABULARY, arguments.features))
    prior = bk.NgramLM(np.full(VOCABULARY + 1, -np.log(VOCABULARY + 1)), eos_token_id=VOCABULARY)
    features = bk.TokenFeatures(lambda tokens, lengths: table[tokens[:, 0]])
    model = bk.RewardModel(features, prior_scale=None if arguments.infer_scale else 1.0)
    print(
        f"{arguments.pairs} preferences x {arguments.features} features, 4 chains x 1,000 draws; target {TARGET_SECONDS} s"
    )
    taken = []
    for seed, what in ((0, "first fit, compiling"), (1, "second fit")):
        data = compared(table, arguments.pairs, seed)
        wall, cpu = time.perf_counter(), time.process_time()
        fit = model.fit(prior, data, seed=seed)
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
        steps = fit.sample_stats["num_steps"].mean()
        print(f"{what:22} wall {taken[-1][0]:6.1f} s   CPU {taken[-1][1]:6.1f} s   {steps:.1f} leapfrog steps per draw")
        print(f"    {fit.diagnostics}")
    compiling = [first - second for first, second in zip(*taken, strict=True)]
    print(f"{'compiling':22} wall {compiling[0]:6.1f} s   CPU {compiling[1]:6.1f} s")
    print("target met" if taken[0][0] < TARGET_SECONDS else "TARGET MISSED")


if __name__ == "__main__":
    main()
