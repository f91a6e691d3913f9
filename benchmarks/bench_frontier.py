"""Coverage of the frontier's intervals, and the cost of a frontier.

    python benchmarks/bench_frontier.py coverage     shares of pools called valid, and coverage, by reward, N and b
    python benchmarks/bench_frontier.py cost         CPU seconds of the curves of a pool, by N, without and with drawing

Coverage is shown by quantity: for all pools in reach (ESS >= 100), and for those called valid. Where few pools are called
valid, coverage is below 95 %: a pool passes there because its tail came out short.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import bayes_klrl as bk
from bayes_klrl.analysis.frontier.curves import QUANTITIES
from bayes_klrl.analysis.frontier.draws import default_grid, pool_cut
from bayes_klrl.analysis.frontier.path import RewardPool, curves
from bayes_klrl.problems import gold_posterior

_CHUNK = 1_000_000  # draws at once
_SHOWN = 200  # pools of a kind below which no coverage is printed


def laws() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return probabilities and rewards of each enumerated problem; the Gaussian is a fine grid of quantiles."""
    from statistics import NormalDist

    size = 200_000
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)])
    exact = bk.Exact().run(gold_posterior(), seed=0)
    count = np.arange(4.0)
    return {
        "Gaussian": (np.full(size, 1 / size), normal),
        "gold": (np.exp(exact.log_prior[0]), exact.reward[0]),
        "counts": (0.7 * 0.3**count / (1 - 0.3**4), count),
        "rare success": (np.array([0.98, 0.02]), np.array([0.0, 1.0])),
    }


def truth(p0: np.ndarray, reward: np.ndarray, b: float, num: int) -> dict[str, float]:
    """Return the four quantities by enumeration."""
    log_z = float(np.log(p0 @ np.exp(b * reward)))
    p = p0 * np.exp(b * reward - log_z)
    mean = float(p @ reward)
    ess = num * float(np.exp(2 * log_z - np.log(p0 @ np.exp(2 * b * reward))))
    return {"log_evidence": log_z, "reward": mean, "kl": b * mean - log_z, "ess": ess}


def bench_coverage(num_pools: int) -> None:
    """Print the coverage table."""
    bs = np.array([0.05, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5])
    overall = np.zeros((len(QUANTITIES), 2))
    for name, (p0, reward) in laws().items():
        for num in (1000, 4000):
            rng = np.random.default_rng(0)
            step = _CHUNK // num
            pieces = []
            for _ in range(-(-num_pools // step)):
                drawn = np.searchsorted(p0.cumsum() / p0.sum(), rng.random((step, num)))
                pieces.append(curves(RewardPool(np.zeros(drawn.shape), reward[drawn]), bs)[1])
            total = step * len(pieces)
            print(f"\n{name}, N = {num}, {total} pools       b:  " + "".join(f"{b:>15g}" for b in bs))
            within = np.concatenate([piece.within for piece in pieces])
            for q, quantity in enumerate(QUANTITIES):
                exact = np.array([truth(p0, reward, b, num)[quantity] for b in bs])
                hit = np.concatenate([(p.lower[quantity] <= exact) & (exact <= p.upper[quantity]) for p in pieces])
                valid = np.concatenate([piece.valid[quantity] for piece in pieces])
                overall[q] += (hit & valid).sum(), valid.sum()
                for label, where in (("in reach", within), ("valid", valid)):
                    cells = [
                        f"{hit[w, a].mean():.3f} ({w.mean():4.0%})" if w.sum() >= _SHOWN else f"- ({w.mean():4.0%})"
                        for a, w in enumerate(where.T)
                    ]
                    print(f"  {quantity:>14} {label:>10}        " + "".join(f"{cell:>15}" for cell in cells))
    print("\nof all that is called valid:", end="")
    for quantity, (hits, count) in zip(QUANTITIES, overall, strict=True):
        print(f"  {quantity} {hits / count:.4f}", end="")
    print()


def bench_cost() -> None:
    """Print CPU seconds of curves on the default grid, and of a whole frontier of an n-gram posterior."""
    posterior = gold_posterior()
    for num in (1_000, 10_000, 100_000):
        pool = RewardPool(np.zeros(num), np.random.default_rng(0).standard_normal(num))
        start = time.process_time()
        grid = default_grid(pool, 1.0, pool_cut(pool, 1.0))
        curves(pool, grid)
        middle = time.process_time()
        curve = bk.frontier(posterior, num_draws=num, seed=0)
        end = time.process_time()
        curve.alpha_for(kl=0.2)
        print(
            f"N = {num:>7,}: grid of {grid.size} with its search {middle - start:.3f} s; bk.frontier on gold "
            f"{end - middle:.3f} s; alpha_for {time.process_time() - end:.3f} s"
        )


def main() -> None:
    """Run one of the two benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["coverage", "cost"])
    parser.add_argument("--pools", type=int, default=10_000)
    arguments = parser.parse_args()
    if arguments.what == "coverage":
        bench_coverage(arguments.pools)
    else:
        bench_cost()


if __name__ == "__main__":
    main()
