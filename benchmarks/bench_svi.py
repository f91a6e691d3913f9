"""SVI against enumerated posteriors, and the cost of one SVI step.

    python benchmarks/bench_svi.py tasks       KL(q || p*) after 600 steps x 256 completions, five seeds, three tasks
    python benchmarks/bench_svi.py tasks --backend jax     the same on JAX: the same checkpoints, compiling included
    python benchmarks/bench_svi.py tasks --steps 60 --optimizer natural     60 steps of the natural gradient
    python benchmarks/bench_svi.py objectives --seeds 3     every objective, 60 steps x 256 completions, by Adam
    python benchmarks/bench_svi.py step        CPU seconds of a step with 64 completions x 16 tokens, GPT-2 4 x 128, V = 2000

One thread, CPU seconds (`time.process_time`). The population value of ESS / N of importance sampling from the guide is
1 / E_p*[p* / q], the limit for large samples.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.losses import GRPO
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.problems import GPT2_TASKS, gpt2_task


def on_jax(posterior: bk.Posterior) -> bk.Posterior:
    """Return the same posterior with its prior on JAX."""
    with tempfile.TemporaryDirectory() as folder:
        posterior.prior.save_pretrained(folder)
        prior = bk.JaxLM.from_pretrained(folder)
    prompts = [list(ids) for ids in posterior.prompt_ids]
    return bk.Posterior(prior, posterior.likelihood, prompts=prompts, max_new_tokens=posterior.max_new_tokens)


def bench_tasks(num_seeds: int, backend: str, num_steps: int, optimizer: str | None) -> None:
    """Print, for each task and seed, both KLs, the effective sample sizes and the CPU seconds of a fit."""
    for name in GPT2_TASKS:
        posterior = gpt2_task(name) if backend == "torch" else on_jax(gpt2_task(name))
        exact = bk.Exact().run(posterior, seed=0)
        log_posterior = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
        kl_prior = float((exact.mean(exact.log_likelihood) - exact.log_evidence)[0])
        print(f"\n{name}: {exact.shape[1]} completions, KL(p* || p0) = {kl_prior:.2f} nats")
        rows = []
        for seed in range(num_seeds):
            start = time.process_time()
            fit = bk.SVI(num_steps, 256, optimizer=optimizer).fit(posterior, seed=seed)
            seconds = time.process_time() - start
            log_guide = completion_log_probs(fit.guide, posterior.prompt_ids, exact.sequences)
            reverse = float((np.exp(log_guide) * (log_guide - log_posterior)).sum())
            forward = float((np.exp(log_posterior) * (log_posterior - log_guide)).sum())
            population_ess = float(1 / np.exp(2 * log_posterior - log_guide).sum())
            sample_ess = float(bk.ImportanceSampling(1000, proposal=fit.guide).run(posterior, seed=seed).ess[0]) / 1000
            rows.append((reverse, forward, population_ess, sample_ess, seconds))
            print(
                f"  seed {seed}: KL(q||p*) {reverse:.4f}  KL(p*||q) {forward:.4f}  ESS/N population {population_ess:.3f} "
                f"sample {sample_ess:.3f}  CPU {seconds:.1f} s",
                flush=True,
            )
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(
            f"  median: KL(q||p*) {medians[0]:.4f}  KL(p*||q) {medians[1]:.4f}  ESS/N population {medians[2]:.3f} "
            f"sample {medians[3]:.3f}  CPU {medians[4]:.1f} s"
        )


OBJECTIVES: dict[str, Any] = {
    "elbo": "elbo",
    "log_variance": "log_variance",
    "log_variance, replay 768": bk.LogVariance(replay=768),
    "forward_kl": "forward_kl",
    "forward_kl on SMC(256)": bk.ForwardKL(bk.SMC(256)),
    "js": "js",
    "tv": "tv",
    "GRPO (a loss of bk.audit)": GRPO(),
}


def bench_objectives(num_seeds: int, num_steps: int) -> None:
    """Print KL(q || p*) and KL(p* || q) of every objective on every task, medians over seeds."""
    for name in GPT2_TASKS:
        posterior = gpt2_task(name)
        exact = bk.Exact().run(posterior, seed=0)
        log_posterior = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
        print(f"\n{name}")
        for label, objective in OBJECTIVES.items():
            rows, start = [], time.process_time()
            for seed in range(num_seeds):
                fit = bk.SVI(num_steps, 256, objective=objective).fit(posterior, seed=seed)
                log_guide = completion_log_probs(fit.guide, posterior.prompt_ids, exact.sequences)
                reverse = float((np.exp(log_guide) * (log_guide - log_posterior)).sum())
                rows.append((reverse, float((np.exp(log_posterior) * (log_posterior - log_guide)).sum())))
            each = (time.process_time() - start) / num_seeds
            reverse, forward = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"  {label:28} KL(q||p*) {reverse:.4f}  KL(p*||q) {forward:.4f}  CPU {each:.1f} s", flush=True)


def bench_step(num_steps: int, backend: str) -> None:
    """Print the CPU seconds of one SVI step, full copy and LoRA; those of compiling apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2000, n_embd=128, n_layer=4, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    prior = bk.TorchLM(GPT2LMHeadModel(config), eos_token_id=[])
    evens = bk.TokenReward(lambda tokens, lengths: (tokens % 2 == 0).mean(axis=1), alpha=0.1)
    posterior = bk.Posterior(prior, evens, prompts=[list(range(1, 9))], max_new_tokens=16)
    options = {
        "full copy": {"learning_rate": 1e-4},
        "LoRA": {"adapter": "lora", "optimizer": "adam"},
        "Rao-Blackwell": {"learning_rate": 1e-4, "estimator": "rao_blackwell"},
    }
    if backend == "jax":
        posterior = on_jax(posterior)
        del options["LoRA"]
    for label, chosen in options.items():
        svi, start = bk.SVI(num_steps + 2, **chosen), time.process_time()
        if backend == "torch":
            svi.fit(posterior, seed=0)
            print(f"{label:>14}: {(time.process_time() - start) / (num_steps + 2):.3f} CPU s per step")
            continue
        from bayes_klrl.inference.svi.numpyro_backend.training import Training, jax_key

        steps = Training(svi, posterior, jax_key(0)).steps()
        next(steps)
        next(steps)  # what is compiled has been compiled
        compiled = time.process_time()
        for _ in steps:
            pass
        each = (time.process_time() - compiled) / num_steps
        print(f"{label:>14}: {each:.3f} CPU s per step, after {compiled - start:.1f} for compiling and two steps")


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tasks", "objectives", "step"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: 600 for tasks, 60 for objectives, 10 for step")
    parser.add_argument("--optimizer", choices=["adam", "kl_sgd", "natural"])
    parser.add_argument("--backend", choices=["torch", "jax"], default="torch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "tasks":
        bench_tasks(arguments.seeds, arguments.backend, arguments.steps or 600, arguments.optimizer)
    elif arguments.what == "objectives":
        bench_objectives(arguments.seeds, arguments.steps or 60)
    else:
        bench_step(arguments.steps or 10, arguments.backend)


if __name__ == "__main__":
    main()
