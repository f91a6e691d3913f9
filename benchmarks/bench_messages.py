"""Exact posteriors by backward messages at length 1,000: CPU seconds and peak memory, one thread.

    dense   a bigram over 2,000 tokens, held as a table
    sparse  a back-off trigram of about 150,000 arcs over 2,000 tokens
    hidden  a hidden Markov model of 32 states over 2,000 tokens

each with a reward for the number of some tokens modulo 8 (8 automaton states). Targets: log Z under 10 s and 2 GiB, draws
under twice that. Each case runs in a process of its own, whose peak of resident memory is printed at the end.

    OMP_NUM_THREADS=1 python benchmarks/bench_messages.py [--case dense|sparse|hidden] [--tokens 1000] [--draws 1000]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.inference.exact.messages import backward_messages

VOCABULARY = 2000
EOS = VOCABULARY - 1
TARGET_SECONDS, TARGET_MB = 10, 2048


def dense() -> bk.LanguageModel:
    """Return a bigram model with random rows."""
    logits = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY))
    logits[:, EOS] -= 4
    return bk.NgramLM(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), eos_token_id=EOS)


def sparse() -> bk.LanguageModel:
    """Return a trigram model fitted to texts of 100 tokens each, frequencies by Zipf's law."""
    frequency = 1 / np.arange(1, VOCABULARY)
    stream = np.random.default_rng(0).choice(VOCABULARY - 1, size=105_000, p=frequency / frequency.sum())
    texts = [[*part.tolist(), EOS] for part in np.split(stream, 1050)]
    return bk.NgramLM.fit(texts, order=3, vocab_size=VOCABULARY, eos_token_id=EOS)


def hidden() -> bk.LanguageModel:
    """Return a hidden Markov model with random rows."""
    rng = np.random.default_rng(0)
    transitions, emissions = rng.dirichlet(np.ones(32), size=32), rng.dirichlet(np.ones(VOCABULARY), size=32)
    return bk.HmmLM(np.full(32, 1 / 32), transitions, emissions, eos_token_id=EOS)


CASES: dict[str, Callable[[], bk.LanguageModel]] = {"dense": dense, "sparse": sparse, "hidden": hidden}


def timed(what: str, run: Callable[[], Any]) -> Any:
    """Run, print the CPU seconds, return the outcome."""
    start = time.process_time()
    outcome = run()
    print(f"  {what:12} {time.process_time() - start:7.2f} s", flush=True)
    return outcome


def one_case(case: str, num_tokens: int, num_draws: int) -> None:
    """Solve one posterior and print seconds and memory."""
    prior = CASES[case]()
    counter = bk.Automaton.counts(range(100), modulo=8, vocab_size=VOCABULARY, eos_token_ids=EOS)
    reward = bk.AutomatonReward(counter, final_rewards=counter.state_values, alpha=0.5)
    posterior = bk.Posterior(prior, reward, max_new_tokens=num_tokens)
    size = ""
    if isinstance(prior, bk.NgramLM) and case == "sparse":
        arrays = prior.table.arrays()
        size = f", {sum(arrays[name].size for name in arrays if name.startswith('arc_keys')):,} arcs"
    print(f"{case}: {num_tokens} tokens{size}")
    messages = timed("log Z", lambda: backward_messages(posterior))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  log Z = {messages.log_evidence[0]:.6f}; peak {peak:.0f} MB (targets {TARGET_SECONDS} s, {TARGET_MB} MB)")
    draws = timed(f"{num_draws} draws", lambda: messages.draw(num_draws, 0))
    print(f"  mean length {draws.lengths.mean():.0f}")
    timed("moments", messages.moments)
    timed("marginals", messages.marginals)
    print(f"  peak in all {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", flush=True)


def main() -> None:
    """Print a block for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    if options.case:
        one_case(options.case, options.tokens, options.draws)
        return
    for case in CASES:
        arguments = ["--case", case, "--tokens", str(options.tokens), "--draws", str(options.draws)]
        subprocess.run([sys.executable, __file__, *arguments], check=True)


if __name__ == "__main__":
    main()
