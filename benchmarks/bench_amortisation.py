"""One guide for 32 prompts on 32 others: KL(q || p*) of guide and prior, and model tokens per effective draw.

    python benchmarks/bench_amortisation.py [--seeds 3] [--draws 1000]

The posteriors are those of `bayes-klrl amortise`: the shipped language model in a good mood at alpha 0.1. log Z of each prompt
is estimated from `--draws` draws of the prior (and of each guide, 256), which also says what the prior and SMC pay for an
effective draw. KL = log Z - mean log w of 256 fresh draws per prompt, with a standard error of about 0.03 for the mean over 32
prompts, most of it that of log Z. One thread.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.cli.demo.many_prompts import held_out, posterior
from bayes_klrl.weights import logsumexp

SETS = {"training": posterior, "unseen": held_out}
_GUIDE_DRAWS = 256


def paid(draws: bk.Draws) -> float:
    """Return the model tokens of one effective draw."""
    return draws.model_tokens / float(draws.ess.sum())


def combined(first: bk.Draws, second: bk.Draws) -> np.ndarray:
    """Return log Z-hat of each prompt from two sets of weighted draws, each weighing by its effective sample size, (P,)."""
    shares = np.stack([first.ess, second.ess], axis=1)
    estimates = np.stack([first.log_evidence, second.log_evidence], axis=1)
    total: np.ndarray = logsumexp(estimates + np.log(shares / shares.sum(axis=1, keepdims=True)))
    return total


def main() -> None:
    """Print what the prior pays, then a row per seed."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--prompts-per-step", type=int, default=16)
    given = parser.parse_args()
    prior = {name: bk.ImportanceSampling(given.draws).run(prompts, seed=5) for name, prompts in SETS.items()}
    smc = bk.SMC(given.draws // 4).run(held_out, seed=6)
    print(f"tokens per effective draw, unseen: prior IS {paid(prior['unseen']):.0f}, SMC {paid(smc):.0f}", flush=True)
    for seed in range(given.seeds):
        start = time.process_time()
        svi = bk.SVI(given.steps, given.particles, prompts_per_step=given.prompts_per_step)
        fit = svi.fit(posterior, seed=seed)
        seconds = time.process_time() - start
        guide = {
            name: bk.ImportanceSampling(_GUIDE_DRAWS, proposal=fit.guide).run(prompts, seed=9)
            for name, prompts in SETS.items()
        }
        log_evidence = {name: combined(prior[name], guide[name]) for name in SETS}
        kl = {name: float((log_evidence[name] - guide[name].elbo).mean()) for name in SETS}
        far = {name: float((log_evidence[name] - prior[name].elbo).mean()) for name in SETS}
        print(
            f"seed {seed}: KL(guide || p*) {kl['training']:.2f} training, {kl['unseen']:.2f} unseen, ratio "
            f"{kl['unseen'] / kl['training']:.2f}; KL(prior || p*) {far['training']:.2f}, {far['unseen']:.2f}; unseen E[r] "
            f"{guide['unseen'].reward.mean():.3f}, posterior {guide['unseen'].mean(guide['unseen'].reward).mean():.3f}; "
            f"tokens of a guide's draw {guide['unseen'].model_tokens / guide['unseen'].lengths.size:.0f}, of an effective "
            f"draw with IS {paid(guide['unseen']):.0f}; training {fit.training_tokens:,} tokens, {seconds:.0f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
