"""The default twist of SMC, a constant from the population itself, against a constant from a pilot and against no resampling.

Every problem has an exact log Z. Printed is the standard deviation of Z-hat / Z over independent runs, with N particles each:
without resampling (importance sampling), with the default twist, and with log Z-hat of 64 prior draws as the constant, which
costs 64 more completions. The pilot is drawn anew for each of eight groups of runs.

    OMP_NUM_THREADS=1 python benchmarks/bench_default_twist.py [--particles 32 128] [--runs 150]
"""

from __future__ import annotations

import argparse

import numpy as np

import bayes_klrl as bk
from bayes_klrl.models.twists.simple import pilot_twist
from bayes_klrl.problems.gold import gold_posterior

NUM_GROUPS = 8


def length_posterior(per_token: float, num_tokens: int, eos: float) -> bk.Posterior:
    """Return a posterior whose reward is the number of tokens; EOS has the same probability everywhere."""
    prior = bk.NgramLM(np.log([(1 - eos) / 2, (1 - eos) / 2, eos]), eos_token_id=2)
    reward = bk.TokenReward(lambda tokens, lengths: per_token * lengths, alpha=1.0)
    return bk.Posterior(prior, reward, max_new_tokens=num_tokens)


def log_evidence_of_lengths(per_token: float, num_tokens: int, eos: float) -> float:
    """Return log Z of `length_posterior`, a sum over lengths."""
    lengths = np.arange(1, num_tokens + 1)
    chance = (1 - eos) ** (lengths - 1) * np.where(lengths < num_tokens, eos, 1.0)
    return float(np.log((chance * np.exp(per_token * lengths)).sum()))


def problems() -> dict[str, tuple[bk.Posterior, float]]:
    """Return posteriors with their log Z by name."""
    found = {}
    for alpha, num_tokens in ((1 / 1.5, 6), (1 / 4, 6), (1 / 4, 20), (1 / 4, 50)):
        gold = gold_posterior(alpha, num_tokens)
        log_evidence = float(bk.Exact().run(gold, seed=0).log_evidence[0])
        found[f"P1, alpha {alpha:.2f}, {num_tokens} tokens"] = gold, log_evidence
    for per_token, num_tokens, eos in (
        (0.5, 12, 0.25),
        (1.0, 12, 0.25),
        (-1.0, 12, 0.25),
        (0.3, 30, 0.1),
        (-0.3, 30, 0.1),
    ):
        options = per_token, num_tokens, eos
        found[f"{per_token:g} per token, {num_tokens} tokens"] = (
            length_posterior(*options),
            log_evidence_of_lengths(*options),
        )
    return found


def spread(smc: bk.SMC, posterior: bk.Posterior, log_evidence: float, num_runs: int, pilot: bool) -> str:
    """Return the standard deviation of Z-hat / Z, and the z-score of its mean against 1."""
    groups = []
    for seed in range(NUM_GROUPS):
        ready = bk.SMC(smc.num_particles, twist=pilot_twist(posterior, seed)[0]) if pilot else smc
        groups.append(ready.log_evidences(posterior, num_runs, seed=seed).log_evidence[0])
    ratio = np.exp(np.concatenate(groups) - log_evidence)
    return f"{ratio.std(ddof=1):.2f} ({(ratio.mean() - 1) / ratio.std(ddof=1) * np.sqrt(ratio.size):+.1f})"


def main() -> None:
    """Print one line per problem and number of particles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--runs", type=int, default=150)
    options = parser.parse_args()
    print("sd of Z-hat / Z (z-score of its mean)\n")
    print("| problem | N | no resampling | default twist | constant of a pilot of 64 |\n|---|---|---|---|---|")
    for name, (posterior, log_evidence) in problems().items():
        for num in options.particles:
            columns = [
                spread(smc, posterior, log_evidence, options.runs, pilot)
                for smc, pilot in ((bk.SMC(num, ess_threshold=0.0), False), (bk.SMC(num), False), (bk.SMC(num), True))
            ]
            print(f"| {name} | {num} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
