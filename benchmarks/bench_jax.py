"""JaxLM against TorchLM and against its own loop of steps: sampling, scoring, gradients and compilations.

GPT-2 of 4 layers of 128, vocabulary 2,000, random weights, EOS switched off, one thread. CPU seconds, all interleaved in
one run, each the best (median) of several repetitions, since the ratio of two runs minutes apart measures the machine.
Compilations are counted by JAX itself, over ten prompts of different lengths after a first one. A fully jitted SMC could
at best take the time of "JAX, on the device": what "SMC" takes beyond it is all there is to gain.

    OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/bench_jax.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import torch
import transformers as hf

import bayes_klrl as bk
from bayes_klrl.models.decoding import Decoding, decode
from bayes_klrl.sequences import Sequences

NUM_ROWS, PROMPT, SAMPLING_TARGET, COMPILE_TARGET = 64, list(range(1, 9)), 1.2, 10.0


def random_models(num_layers: int, width: int = 128) -> tuple[bk.JaxLM, bk.TorchLM]:
    """Return one random GPT-2 on both backends."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None}
    config = hf.GPT2Config(vocab_size=2000, n_embd=width, n_layer=num_layers, n_head=4, **ids)
    model = hf.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return bk.JaxLM.from_pretrained(folder, eos_token_id=()), bk.TorchLM(model, eos_token_id=())


def even_tokens(_posterior: bk.Posterior, _prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """Return a twist that makes weights degenerate every few tokens, so that SMC has something to do."""
    return 0.5 * (prefixes % 2 == 0).sum(axis=1).astype(np.float64)


def by_steps(lm: bk.LanguageModel, num_new: int, seed: int) -> np.ndarray:
    """Return completions drawn by the loop of steps alone."""
    rng, decoding = np.random.default_rng(seed), Decoding((lm,), [PROMPT], NUM_ROWS, num_new)
    while not decoding.done:
        decoding.step(rng.random(NUM_ROWS))
    return decoding.tokens


def samplers(jax_lm: bk.JaxLM, torch_lm: bk.TorchLM, num_new: int) -> dict[str, Callable[[int], Any]]:
    """Return the samplers, as functions of a seed."""
    padded = jax_lm.pad_prompts([PROMPT], num_new)
    reward = bk.TokenReward(lambda tokens, lengths: (tokens % 2 == 0).sum(axis=1), alpha=2.0)
    posterior = bk.Posterior(jax_lm, reward, prompts=PROMPT, max_new_tokens=num_new)
    smc = bk.SMC(NUM_ROWS, twist=even_tokens)

    def in_one_scan(seed: int) -> Any:
        uniforms = np.random.default_rng(seed).random((1, NUM_ROWS, num_new))
        return np.asarray(jax_lm.sample_tokens(padded, uniforms)[0])

    return {
        "torch": lambda seed: decode((torch_lm,), [PROMPT], NUM_ROWS, num_new, np.random.default_rng(seed)).tokens,
        "JAX": lambda seed: decode((jax_lm,), [PROMPT], NUM_ROWS, num_new, np.random.default_rng(seed)).tokens,
        "JAX, by steps": lambda seed: by_steps(jax_lm, num_new, seed),
        "JAX, one scan": in_one_scan,
        "JAX, SMC": lambda seed: smc.run(posterior, seed=seed).tokens,
    }


def scorers(jax_lm: bk.JaxLM, torch_lm: bk.TorchLM, num_new: int) -> dict[str, Callable[[int], Any]]:
    """Return functions that score 64 completions, with and without the gradient."""
    tokens = np.random.default_rng(0).integers(0, 2000, (1, NUM_ROWS, num_new))
    sequences = Sequences(tokens, np.full((1, NUM_ROWS), num_new))
    gradient = jax.jit(jax.grad(lambda p: jax_lm.with_parameters(p).token_log_probs([PROMPT], sequences).sum()))

    def torch_gradient(_seed: int) -> None:
        torch_lm.module.zero_grad()
        torch_lm.token_log_probs([PROMPT], sequences).sum().backward()

    def torch_score(_seed: int) -> None:
        with torch.no_grad():
            torch_lm.token_log_probs([PROMPT], sequences)

    return {
        "torch, score": torch_score,
        "JAX, score": lambda _seed: np.asarray(jax_lm.token_log_probs([PROMPT], sequences)),
        "torch, gradient": torch_gradient,
        "JAX, gradient": lambda _seed: jax.block_until_ready(gradient(jax_lm.parameters)),
    }


def cpu_seconds(runs: dict[str, Callable[[int], Any]], repetitions: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each run's repetitions, interleaved, after a first one that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    for repetition in range(repetitions):
        for name, run in runs.items():
            start = time.process_time()
            run(repetition)
            seconds[name].append(time.process_time() - start)
    return seconds


@contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """Collect the seconds of every compilation inside."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def draw_and_score(lm: bk.JaxLM, prompt: list[int], num_draws: int, num_new: int) -> None:
    """Draw completions and score them."""
    drawn = decode((lm,), [prompt], num_draws, num_new, np.random.default_rng(len(prompt)))
    lm.token_log_probs([prompt], drawn.sequences())


def print_compilations(num_new: int) -> None:
    """Print the seconds that 12 layers take to compile, and the compilations for ten prompts of different lengths."""
    for width in (128, 768):
        lm, _ = random_models(12, width)
        padded = lm.pad_prompts([PROMPT], num_new)
        with counted_compilations() as scan:
            lm.sample_tokens(padded, np.zeros((1, NUM_ROWS, num_new)))
        with counted_compilations() as first:
            draw_and_score(lm, PROMPT * 2, NUM_ROWS, num_new)
        print(
            f"12 layers of {width}: one scan compiles in {sum(scan):.1f} s, drawing and scoring on the host's path in "
            f"{sum(first):.1f} s ({len(first)} programs), target {COMPILE_TARGET:.0f} s each"
        )
        if width == 128:
            with counted_compilations() as later:
                for index, length in enumerate(range(9, 17)):
                    draw_and_score(lm, (PROMPT * 2)[:length], NUM_ROWS - index, num_new)
                for length in (10, 13):
                    draw_and_score(lm, (PROMPT * 2)[:length], NUM_ROWS - 20, num_new)
            print(f"  ten more prompts and numbers of draws: {len(later)} compilations, target 0", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = random_models(4)
    print(f"{NUM_ROWS} rows x {options.new} tokens, CPU seconds best (median)")
    for title, runs in (("sampling", samplers(*models, options.new)), ("scoring", scorers(*models, options.new))):
        seconds = cpu_seconds(runs, options.repetitions)
        for name, values in seconds.items():
            print(f"  {title:9} {name:16} {min(values):.3f} ({np.median(values):.3f})")
        if title == "sampling":
            ratio = min(seconds["JAX"]) / min(seconds["torch"])
            gain = min(seconds["JAX, SMC"]) / min(seconds["JAX, one scan"])
            print(f"  JAX / torch {ratio:.2f}, target {SAMPLING_TARGET}; a fully jitted SMC gains at most {gain:.2f}x")
    print_compilations(options.new)


if __name__ == "__main__":
    main()
