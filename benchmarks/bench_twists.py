"""What a twist is worth: mean and spread of log Z-hat by SMC, without one and with each kind.

E log Z-hat bounds log Z from below (theory.md 3.4). "counter": P5 of theory.md 8.5, whose reward depends on
the number of tokens 0 modulo m and shows at the end only, log Z by backward messages. "austen": the shipped model, VADER
sentiment at alpha = 0.1, of unknown log Z. "word": the shipped model, which must write a word ("happy" by default, likelihood
exp(6) if it does), an automaton's reward. Each twist with the prior as proposal, and with the prior steered by it.

    OMP_NUM_THREADS=1 python benchmarks/bench_twists.py counter [--modulo 5] [--tokens 20] [--particles 8]
    OMP_NUM_THREADS=1 python benchmarks/bench_twists.py austen [--particles 32] [--runs 20] [--steps 200]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.cli.demo.one_prompt import posterior as austen_posterior
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.problems import gold_table


def counter(modulo: int, num_tokens: int) -> bk.Posterior:
    """Return P5: the GOLD bigram that never ends, and 1 if the count of token 0 is m - 1 modulo m at the end; b = 8."""
    machine = bk.Automaton.counts(0, modulo=modulo, vocab_size=4, eos_token_ids=3)
    reward = bk.AutomatonReward(
        machine, final_rewards=1.0 * (np.arange(modulo) == modulo - 1), alpha=1 / 8, bounds=(0, 1)
    )
    return bk.Posterior(bk.NgramLM(gold_table(-1e3), eos_token_id=3), reward, prompts=[[]], max_new_tokens=num_tokens)


def word(text: str, num_tokens: int) -> bk.Posterior:
    """Return the shipped model with a reward for the tokens of a word."""
    prior = bk.TorchLM.from_pretrained("austen")
    ids = prior.encode([" " + text])[0]
    ids = [i for i in ids if i != prior.bos_token_id]
    machine = bk.Automaton.contains(ids, vocab_size=prior.vocab_size, eos_token_ids=prior.eos_token_ids)
    reward = bk.AutomatonReward(
        machine, final_rewards=1.0 * (np.arange(machine.num_states) == len(ids)), alpha=1 / 6, bounds=(0, 1)
    )
    return bk.Posterior(prior, reward, prompts="It was a fine morning", max_new_tokens=num_tokens)


def repeated(posterior: bk.Posterior, num_runs: int) -> bk.Posterior:
    """Return the posterior with its prompt as often as there are runs: independent runs in one pass."""
    return bk.Posterior(
        posterior.prior,
        posterior.likelihood,
        prompts=[list(posterior.prompt_ids[0])] * num_runs,
        max_new_tokens=posterior.max_new_tokens,
    )


def recipes(posterior: bk.Posterior, steps: int, draws: int, learning_rate: float) -> dict[str, Any]:
    """Return the twists by name: recipes, the constant 0, and None, a constant from the population."""
    found: dict[str, Any] = {
        "constant 0": 0.0,
        "own constant": None,
        "partial reward": bk.PartialRewardTwist(),
        "CTL": bk.LearnedTwist(steps, num_draws=draws, learning_rate=learning_rate),
    }
    if "Automaton" in type(posterior.likelihood).__name__:
        found["distilled, n=2"] = bk.DistilledTwist(2, 4096)
    return found


def row(name: str, smc: Any, posterior: bk.Posterior, num_runs: int, log_evidence: float, training: Any) -> None:
    """Print one line: bound, spread, and what it cost."""
    start = time.process_time()
    draws = smc.run(repeated(posterior, num_runs), seed=1)
    seconds = time.process_time() - start
    values = draws.log_evidence
    se, gap = values.std(ddof=1) / np.sqrt(num_runs), values.mean() - log_evidence
    best = np.log(np.exp(values - values.max()).mean()) + values.max()
    fit = "" if training is None else f"{training.training_tokens:>9,} {training.training_seconds:7.1f} s"
    print(
        f"{name:34} {values.mean():8.3f} +- {se:5.3f}  sd {values.std(ddof=1):6.3f}  gap {gap:7.3f}  log mean "
        f"{best:7.3f}  {seconds / num_runs * 1000:6.1f} ms/run  {fit}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["counter", "austen", "word"])
    parser.add_argument("--modulo", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--word", default="happy")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    log_evidence = np.nan
    if options.problem == "counter":
        posterior = counter(options.modulo, options.tokens)
        messages = backward_messages(posterior)
        log_evidence = float(messages.log_evidence[0])
        print(f"log Z = {log_evidence:.6f}")
    else:
        posterior = austen_posterior if options.problem == "austen" else word(options.word, options.tokens)
    num_particles, num_runs = options.particles, options.runs
    row("prior IS", bk.ImportanceSampling(num_particles), posterior, num_runs, log_evidence, None)
    for name, twist in recipes(posterior, options.steps, options.draws, options.learning_rate).items():
        if options.only and not any(name.startswith(wanted) for wanted in options.only):
            continue
        is_recipe = hasattr(twist, "fit")
        fitted = twist.fit(posterior, seed=0) if is_recipe else twist
        training = fitted.training if is_recipe else None
        row(name, bk.SMC(num_particles, twist=fitted), posterior, num_runs, log_evidence, training)
        if is_recipe and hasattr(fitted, "next_log_psi"):
            steered = bk.SMC(num_particles, twist=fitted, proposal="twisted")
            row(f"{name}, steered", steered, posterior, num_runs, log_evidence, None)
    if options.problem == "counter":
        for steered, name in ((None, "exact"), ("twisted", "exact, steered")):
            smc = bk.SMC(num_particles, twist=messages.twist(), proposal=steered)
            row(name, smc, posterior, num_runs, log_evidence, None)


if __name__ == "__main__":
    main()
