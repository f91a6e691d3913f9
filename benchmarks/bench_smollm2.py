"""A prior of 135 million parameters through the main job: sample, compare, SVI with LoRA, certify, frontier.

    make smollm2                                          once: the file, and a reader of it
    python benchmarks/bench_smollm2.py                    8 prompts x 16 draws x 16 tokens, 4 steps of SVI
    python benchmarks/bench_smollm2.py --prompts 32 --draws 64 --tokens 24 --steps 10 --only certify
    python benchmarks/bench_smollm2.py --plan             what each of these would take by bk.plan; nothing is run

Printed for each step: CPU seconds of all threads, wall time, the peak of memory while it ran and its growth (Linux), the
tokens through a model, and what was found. The reward is the number of exclamation marks, at most three, at alpha = 0.5.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bayes_klrl as bk

STEPS = ("sample", "compare", "SVI", "certify", "frontier")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOPICS = ("a dog", "the sea", "a train", "my school", "winter", "a garden", "the moon", "breakfast")
OPENINGS = ("Today I saw {} and", "She wrote a letter about {}.", "Tell me something about {}:", "Once upon a time, {}")


def resident(field: str) -> float:
    """Return a line of the process's status in GiB, NaN where there is none."""
    if not STATUS.exists():
        return float("nan")
    found = re.search(rf"{field}:\s+(\d+)", STATUS.read_text())
    return int(found[1]) / 2**20 if found else float("nan")


def measured(name: str, work: Callable[[], Any], say: Callable[[Any], str]) -> Any:
    """Run one step, print what it took, and return what it found."""
    if CLEAR.exists():
        CLEAR.write_text("5")  # the peak begins anew
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    found = work()
    wall, cpu, peak = time.perf_counter() - wall, time.process_time() - cpu, resident("VmHWM")
    print(f"| {name} | {cpu:.1f} | {wall:.1f} | {peak:.2f} | {peak - before:.2f} | {say(found)} |", flush=True)
    return found


def posterior_of(prior: Any, num_prompts: int, num_tokens: int) -> bk.Posterior:
    """Return the posterior of the benchmark."""
    reward = bk.Reward(lambda completions: [min(c.count("!"), 3) for c in completions], alpha=0.5, bounds=(0, 3))
    prompts = [opening.format(topic) for opening in OPENINGS for topic in TOPICS][:num_prompts]
    return bk.Posterior(prior, reward, prompts=prompts, max_new_tokens=num_tokens)


def algorithms(args: argparse.Namespace) -> dict[str, Any]:
    """Return the algorithms by the step that runs them."""
    from peft import LoraConfig

    lora = LoraConfig(r=8, target_modules="all-linear")
    return {
        "sample": bk.ImportanceSampling(args.draws),
        "compare": bk.SMC(args.draws),
        "SVI": bk.SVI(
            args.steps,
            args.draws,
            adapter=lora,
            num_draws=args.draws,
            prompts_per_step=min(8, args.prompts),
            twist=args.twist,
            optimizer=args.optimizer,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 8), ("draws", 16), ("tokens", 16), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--twist", choices=["none"], help="no critic, whose pilot is 384 completions of the prior")
    parser.add_argument("--optimizer", choices=["adam"], help="not the default, whose pilot is the same")
    parser.add_argument("--only", nargs="*", choices=STEPS, default=STEPS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plan", action="store_true")
    args = parser.parse_args()
    if args.plan:
        planned = posterior_of(bk.TorchLM.from_pretrained("smollm2", device="meta"), args.prompts, args.tokens)
        for name, algorithm in algorithms(args).items():
            print(f"{name}: {bk.plan(planned, algorithm)}\n")
        return
    print(f"{args.prompts} prompts x {args.draws} draws x {args.tokens} tokens, {args.dtype}, on {sys.platform}\n")
    print("| step | CPU s | wall s | peak GiB | growth GiB | found |\n|---|---|---|---|---|---|")
    load = lambda: bk.TorchLM.from_pretrained("smollm2", dtype=args.dtype)  # noqa: E731
    prior = measured("load", load, repr)
    posterior, chosen = posterior_of(prior, args.prompts, args.tokens), algorithms(args)
    if "sample" in args.only:
        measured("sample", lambda: chosen["sample"].run(posterior, seed=0), told)
    if "compare" in args.only:
        both = {"IS": chosen["sample"], "SMC": chosen["compare"]}
        measured(
            "compare", lambda: bk.compare(posterior, both, seed=0), lambda result: f"{len(result.table())} methods"
        )
    guide: Any = prior
    if "SVI" in args.only or "certify" in args.only:
        fit = measured("SVI, LoRA of rank 8", lambda: chosen["SVI"].fit(posterior, seed=0), trained)
        guide = fit.guide
    if "certify" in args.only:
        options = {"num_draws": max(32, args.draws), "num_particles": args.draws, "num_runs": 4}
        measured("certify", lambda: bk.certify(posterior, guide, seed=0, **options), certified)
    if "frontier" in args.only:
        measured(
            "frontier",
            lambda: bk.frontier(posterior, num_draws=args.draws, seed=0),
            lambda found: repr(found).splitlines()[0],
        )


def told(draws: bk.Draws) -> str:
    gap = (
        f", decoded and scored log-probs {draws.info['scoring_gap'].max():.2g} nats apart"
        if "scoring_gap" in draws.info
        else ""
    )
    return f"{draws.cost.model_tokens:,} tokens, log Z {draws.log_evidence.mean():.3f}{gap}"


def trained(fit: bk.Fit) -> str:
    return f"{fit.training_tokens:,} tokens, ELBO {fit.history['elbo'][0]:.3f} to {fit.history['elbo'][-1]:.3f}"


def certified(found: bk.Certificate) -> str:
    (low, high), grade = found.pooled.reverse_kl, found.grade
    return f"grade {grade}, KL(q\\|\\|p*) in [{low:.3f}, {high:.3f}] nats"


if __name__ == "__main__":
    main()
