"""Natural-gradient SVI against Adam on the enumerated tasks of `bench_svi`, and on the demo posterior.

    python benchmarks/bench_natural.py tasks                   KL(q || p*) after 60 and after 600 steps x 256, three seeds
    python benchmarks/bench_natural.py tasks --method adam     the same by bk.SVI(600, 256)
    python benchmarks/bench_natural.py austen                  KL(q || p*) = 5.53 - mean log w of 2000 fresh draws
    python benchmarks/bench_natural.py cost --draws 64         CPU seconds of one step of `bk.SVI`, beside Adam's

One thread, CPU seconds (`time.process_time`).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.per_sample import PerSample
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.regression import NaturalGradient
from bayes_klrl.models.decoding import decode_by
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.problems import GPT2_TASKS, gpt2_task
from bayes_klrl.sequences import Sequences

LOG_EVIDENCE = 5.53


def drawn(posterior: bk.Posterior, guide: Any, num_draws: int, rng: np.random.Generator) -> tuple[Sequences, Any]:
    """Return N completions per prompt of the guide, and log p0 + r / alpha of each, (N, P)."""
    uniforms = rng.random((posterior.max_new_tokens, posterior.num_prompts * num_draws))
    found = decode_by((guide,), posterior.prompt_ids, uniforms)
    shape = (posterior.num_prompts, num_draws)
    sequences = Sequences(found.tokens.reshape(*shape, -1), found.lengths.reshape(shape))
    sequences = sequences.padded(posterior.max_new_tokens, posterior.pad_token)
    return sequences, torch.as_tensor(posterior.log_joint(sequences)).T


def joined(parts: list[Sequences]) -> Sequences:
    """Return the completions of several steps as those of one."""
    return Sequences(
        np.concatenate([part.tokens for part in parts], axis=1),
        np.concatenate([part.lengths for part in parts], axis=1),
    )


def exact_kl(posterior: bk.Posterior) -> Any:
    """Return a function that computes KL(q || p*) of a guide by enumeration."""
    exact = bk.Exact().run(posterior, seed=0)
    log_posterior = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]

    def kl(guide: Any) -> float:
        log_guide = completion_log_probs(guide, posterior.prompt_ids, exact.sequences)
        return float((np.exp(log_guide) * (log_guide - log_posterior)).sum())

    return kl


def sampled_kl(posterior: bk.Posterior) -> Any:
    """Return a function that estimates KL(q || p*) of a guide on 2000 draws."""

    def kl(guide: Any) -> float:
        log_weights = bk.ImportanceSampling(2000, proposal=guide).run(posterior, seed=12345).log_weights
        return LOG_EVIDENCE - float(np.mean(log_weights))

    return kl


def fit(posterior: bk.Posterior, options: argparse.Namespace, seed: int, kl: Any, report: list[int]) -> None:
    """Train a copy of the prior and print KL(q || p*) at the steps of `report`."""
    rng, guide = np.random.default_rng(seed), posterior.prior.copy()
    per_sample = PerSample(guide)
    damping = options.damping if options.damping == "held_out" else float(options.damping)
    natural = NaturalGradient(
        per_sample.parameters,
        momentum=options.momentum,
        damping=damping,
        max_kl=options.eps,
        warm_up=options.warm,
        gain=options.gain,
        seed=seed,
    )
    seconds, cells, kept = 0.0, [], []
    for step in range(max(report)):
        start = time.process_time()
        sequences, log_joint = drawn(posterior, guide, options.draws, rng)
        kept = [(sequences, log_joint), *kept][: options.replay + 1]
        sequences = joined([each for each, _ in kept])
        log_joint = torch.cat([values for _, values in kept])
        scores = per_sample.scores(posterior.prompt_ids, sequences)
        left = 1 - step / max(report)
        shrink = options.shrink * (min(1.0, left / options.decay) if options.decay else 1.0)
        info = natural.step(scores, log_joint - scores.log_probs, shrink=shrink)
        seconds += time.process_time() - start
        if step + 1 in report:
            cells.append(f"{step + 1}: {kl(guide):.4f} ({seconds:.1f} s, lambda {info.damping:g})")
    print(f"  seed {seed}: " + "   ".join(cells), flush=True)


def cost(posterior: bk.Posterior, num_draws: int) -> None:
    """Print the CPU seconds of one step with each optimizer: those of 12 steps less those of 2, by ten."""

    def seconds(num_steps: int, recipe: dict[str, Any]) -> float:
        start = time.process_time()
        bk.SVI(num_steps, num_draws, **recipe).fit(posterior, seed=0)
        return time.process_time() - start

    recipes: dict[str, dict[str, Any]] = {"adam": {"optimizer": "adam"}, "kl_sgd": {"optimizer": "kl_sgd"}}
    recipes |= {f"natural, replay {n}": {"optimizer": bk.Natural(replay=n)} for n in (0, 1, 3)}
    adam = None
    for name, recipe in recipes.items():
        seconds(2, recipe)
        step = (seconds(12, recipe) - seconds(2, recipe)) / 10
        adam = step if adam is None else adam
        print(f"  {name:20s} {1000 * step:7.1f} ms, {step / adam:.2f} of Adam's", flush=True)


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tasks", "austen", "cost"])
    parser.add_argument("--method", choices=["natural", "adam"], default="natural")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--damping", default="0.03")
    parser.add_argument("--momentum", type=float, default=0.8)
    parser.add_argument("--eps", type=float, default=1.0)
    parser.add_argument("--decay", type=float, default=0.0, help="share of the steps over which they shrink to 0")
    parser.add_argument("--shrink", type=float, default=1.0, help="largest share of d that a step takes")
    parser.add_argument("--warm", type=float, default=4.0)
    parser.add_argument("--gain", type=float, default=1.0)
    parser.add_argument("--replay", type=int, default=3, help="earlier steps whose draws are used again")
    parser.add_argument("--report", default="60,600", help="steps at which KL is printed")
    parser.add_argument("--tasks", default=",".join(GPT2_TASKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = [int(step) for step in options.report.split(",")]
    posteriors = {} if options.what == "austen" else {name: gpt2_task(name) for name in options.tasks.split(",")}
    if options.what != "tasks":
        from bayes_klrl.cli.demo.one_prompt import posterior as demo

        posteriors["austen"] = demo
    for name, posterior in posteriors.items():
        print(f"{name}:", flush=True)
        if options.what == "cost":
            cost(posterior, options.draws)
            continue
        kl = sampled_kl(posterior) if options.what == "austen" else exact_kl(posterior)
        for seed in range(options.seeds):
            if options.method == "adam":
                start = time.process_time()
                guide = bk.SVI(max(report), options.draws).fit(posterior, seed=seed).guide
                print(f"  seed {seed}: {kl(guide):.4f} ({time.process_time() - start:.1f} s)", flush=True)
            else:
                fit(posterior, options, seed, kl, report)


if __name__ == "__main__":
    main()
