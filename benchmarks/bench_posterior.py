"""How near to its posterior SVI brings the shipped language model: KL(q || p*) against completions and CPU seconds.

    python benchmarks/bench_posterior.py [NAME ...] [--seeds 3]
    python benchmarks/bench_posterior.py default trl-rloo      TRL's RLOOTrainer beside it; pip install 'trl==1.16.*'
    python benchmarks/bench_posterior.py "kl 5" "reward 0.8"   AdaptiveAlpha: KL to the prior and reward that it ends at

The posterior is that of the command line, Jane Austen in a good mood at alpha 0.1, log Z = 5.53 +- 0.03 (other alphas: by
importance sampling from 20,000 prior draws). KL = log Z - mean log w of 2,000 fresh draws of the guide, standard error 0.05.
Completions are those of the training, with the prior's draws for the critic (256) and for the frequencies of tokens
(128). One thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.cli.demo.one_prompt import posterior as demo
from bayes_klrl.inference.policies import as_policy
from bayes_klrl.models.rewards import sentiment

RECIPES: dict[str, dict[str, Any]] = {
    "adam": {"num_steps": 120, "optimizer": "adam"},
    "kl_sgd, no critic": {"num_steps": 120, "optimizer": "kl_sgd", "twist": "none"},
    "default": {"num_steps": 114},
    "default, half": {"num_steps": 58},
    "default, quarter": {"num_steps": 28},
    "default, twice": {"num_steps": 234},
    "default, four times": {"num_steps": 474},
    "hidden states": {"num_steps": 114, "twist": "hidden_states", "discount": 1.0},
    "lora, adam": {"num_steps": 120, "optimizer": "adam", "adapter": "lora"},
    "lora": {"num_steps": 114, "adapter": "lora"},
    "log_variance with replay": {"num_steps": 120, "objective": bk.LogVariance(replay=256), "optimizer": "kl_sgd"},
    "forward_kl": {"num_steps": 120, "objective": "forward_kl", "optimizer": "kl_sgd"},
    "forward_kl on SMC": {"num_steps": 120, "objective": bk.ForwardKL(bk.SMC(64)), "optimizer": "kl_sgd"},
    "js": {"num_steps": 120, "objective": "js", "optimizer": "kl_sgd"},
    "tv": {"num_steps": 120, "objective": "tv", "optimizer": "kl_sgd"},
    "alpha 0.2": {"num_steps": 114, "alpha": 0.2},
    "alpha 0.05": {"num_steps": 114, "alpha": 0.05},
}


def measured(posterior: bk.Posterior, log_evidence: float, seed: int, **options: Any) -> tuple[float, float, int]:
    """Return KL(q || p*), CPU seconds, and completions."""
    start = time.process_time()
    fit = bk.SVI(**{"num_particles": 64, **options}).fit(posterior, seed=seed)
    seconds = time.process_time() - start
    draws = bk.ImportanceSampling(2000, proposal=fit.guide).run(posterior, seed=9)
    has_critic = options.get("optimizer") != "adam" and options.get("twist") != "none" and "objective" not in options
    of_prior = 256 * has_critic + 128 * (options.get("optimizer") != "adam")
    return log_evidence - float(draws.log_weights.mean()), seconds, options["num_steps"] * 64 + of_prior


def adaptive(target: dict[str, float], seed: int, num_steps: int) -> str:
    """Return what a training with an adaptive alpha ends at, of 2,000 fresh draws."""
    fit = bk.SVI(num_steps).fit(demo, seed=seed, callbacks=[bk.AdaptiveAlpha(**target)])
    draws = bk.ImportanceSampling(2000, proposal=fit.guide).run(fit.posterior, seed=9)
    kl = draws.log_proposal - draws.log_prior
    return (
        f"KL to prior {kl.mean():.2f} +- {kl.std() / 2000**0.5:.2f}, reward {draws.reward.mean():.3f}, "
        f"alpha {fit.posterior.alpha:.4f}"
    )


def by_trl(seed: int, rate: float) -> tuple[float, float, int]:
    """Return what `measured` returns, for TRL's RLOOTrainer at 120 steps of 64 completions and a learning rate."""
    from bench_trainers import trl_train

    def cheer(completions: list[str], **kwargs: Any) -> list[float]:  # noqa: ARG001  (TRL gives all that it has)
        return sentiment(completions)

    reward = bk.Reward(cheer, alpha=demo.alpha, bounds=(-1, 1))
    posterior = bk.Posterior(demo.prior, reward, prompts=demo.prompts[0], max_new_tokens=demo.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        seconds = trl_train("RLOO", posterior, run, seed=seed, num_steps=120, lora=False, batch=64, learning_rate=rate)
        tuned = as_policy(run, demo)
        draws = bk.ImportanceSampling(2000, proposal=tuned).run(demo, seed=9)
    return 5.53 - float(draws.log_weights.mean()), seconds, 120 * 64


def main() -> None:
    """Print a row per recipe."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    for name in given.names:
        quantity, _, value = name.partition(" ")
        if quantity in ("kl", "reward"):
            for seed in range(given.seeds):
                print(f"{name:28} seed {seed}: {adaptive({quantity: float(value)}, seed, 228)}", flush=True)
            continue
        if name == "trl-rloo":
            for rate in (1e-4, 3e-4, 1e-3):
                show(f"{name} at {rate:g}", [by_trl(seed, rate) for seed in range(given.seeds)])
            continue
        options = dict(RECIPES[name])
        alpha = options.pop("alpha", None)
        posterior, log_evidence = demo, 5.53
        if alpha is not None:
            cheerful = bk.Reward(sentiment, alpha=alpha, bounds=(-1, 1))
            posterior = bk.Posterior(demo.prior, cheerful, prompts=demo.prompts[0], max_new_tokens=24)
            log_evidence = float(bk.ImportanceSampling(20_000).run(posterior, seed=5).log_evidence[0])
        show(name, [measured(posterior, log_evidence, seed, **options) for seed in range(given.seeds)])


def show(name: str, rows: list[tuple[float, float, int]]) -> None:
    """Print one recipe's KLs, completions and CPU seconds."""
    kls, seconds = [row[0] for row in rows], np.median([row[1] for row in rows])
    shown = ", ".join(f"{kl:.2f}" for kl in kls)
    print(
        f"{name:28} median {np.median(kls):.2f}  ({shown})  {rows[0][2]:,} completions  {seconds:.0f} CPU s", flush=True
    )


if __name__ == "__main__":
    main()
