"""Sampling speed and memory: TorchLM's decode loop against Hugging Face's `generate`, random weights, one thread.

Both draw from the full distribution (no top-k, no top-p) and no row ever ends: EOS is switched off. CPU seconds, the
two interleaved, each the best of several repetitions, since the ratio of two runs minutes apart measures the machine.
Memory is the peak above the loaded model, in separate processes (Linux only).

    OMP_NUM_THREADS=1 python benchmarks/bench_sampling.py [--size small|gpt2|llama] [--new 32] [--repetitions 7]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode

PROMPT_LENGTH = 8
TARGETS = {"small": 2.0, "gpt2": 1.1, "llama": 2.0}
NUM_ROWS = {"small": 64, "gpt2": 16, "llama": 64}


def random_model(size: str) -> Any:
    """Return a GPT-2 of 4 layers of 128 ("small"), one of GPT-2 small's size ("gpt2"), or a Llama like the first."""
    torch.manual_seed(0)
    if size == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(eos_token_id=None, bos_token_id=None)).eval()
    if size == "llama":
        config = hf.LlamaConfig(
            vocab_size=2000,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            eos_token_id=None,
        )
        return hf.LlamaForCausalLM(config).eval()
    config = hf.GPT2Config(vocab_size=2000, n_embd=128, n_layer=4, n_head=4, eos_token_id=None, bos_token_id=None)
    return hf.GPT2LMHeadModel(config).eval()


def even_tokens(_posterior: bk.Posterior, _prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """Return a twist that makes weights degenerate every few tokens, so that SMC has something to do."""
    return 0.5 * (prefixes % 2 == 0).sum(axis=1).astype(np.float64)


def sample_generate(model: Any, prompts: list[list[int]], num_rows: int, num_new: int, seed: int) -> np.ndarray:
    """Return num_rows completions of each prompt of one length, shape (P R, T), from Hugging Face's own sampler."""
    torch.manual_seed(seed)
    tokens = torch.tensor(prompts).repeat_interleave(num_rows, dim=0)
    settings = hf.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=num_new, min_new_tokens=num_new, pad_token_id=0
    )
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return np.asarray(output[:, tokens.shape[1] :])


def samplers(size: str, num_new: int) -> dict[str, Callable[[int], np.ndarray]]:
    """Return the samplers as functions of a seed."""
    model = random_model(size)
    lm = bk.TorchLM(model, eos_token_id=())
    prompt, num_rows = list(range(1, PROMPT_LENGTH + 1)), NUM_ROWS[size]
    reward = bk.TokenReward(lambda tokens, lengths: (tokens % 2 == 0).sum(axis=1), alpha=2.0)
    posterior = bk.Posterior(lm, reward, prompts=prompt, max_new_tokens=num_new)
    smc = bk.SMC(num_rows, twist=even_tokens)
    return {
        "generate": lambda seed: sample_generate(model, [prompt], num_rows, num_new, seed),
        "sampling": lambda seed: decode((lm,), [prompt], num_rows, num_new, np.random.default_rng(seed)).tokens,
        "SMC": lambda seed: smc.run(posterior, seed=seed).tokens[0],
    }


def cpu_seconds(size: str, num_new: int, repetitions: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each sampler's repetitions, interleaved."""
    runs = samplers(size, num_new)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        assert run(0).shape == (NUM_ROWS[size], num_new)  # also the warm-up
    for repetition in range(repetitions):
        for name, run in runs.items():
            start = time.process_time()
            run(repetition)
            seconds[name].append(time.process_time() - start)
    return seconds


def peak_memory(size: str, num_new: int, name: str) -> dict[str, float]:
    """Return a process's peak resident MB, and its rise while it samples for the second time."""
    command = [sys.executable, __file__, "--size", size, "--new", str(num_new), "--memory-of", name]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(printed))


def resident_mb(field: str) -> float:
    """Return a field of this process's memory status."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TARGETS)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        run = samplers(options.size, options.new)[options.memory_of]
        run(0)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_mb("VmRSS")
        run(1)
        print(json.dumps({"rise": resident_mb("VmHWM") - before, "peak": resident_mb("VmHWM")}))
        return
    for size in [options.size] if options.size else TARGETS:
        seconds = cpu_seconds(size, options.new, options.repetitions)
        best = {name: min(values) for name, values in seconds.items()}
        middle = {name: float(np.median(values)) for name, values in seconds.items()}
        print(f"{size}: {NUM_ROWS[size]} rows x {options.new} tokens, CPU seconds best (median)")
        for name in seconds:
            print(f"  {name:9} {best[name]:.3f} ({middle[name]:.3f})")
        print(
            f"  generate / sampling {best['generate'] / best['sampling']:.2f} "
            f"({middle['generate'] / middle['sampling']:.2f}), target {TARGETS[size]};  SMC / sampling "
            f"{best['SMC'] / best['sampling']:.2f} ({middle['SMC'] / middle['sampling']:.2f}), target 1.15"
        )
        memory = {name: peak_memory(size, options.new, name) for name in seconds}
        shown = ", ".join(f"{name} {mb['peak']:.0f} (rise {mb['rise']:.0f})" for name, mb in memory.items())
        print(f"  peak MB of the process: {shown}", flush=True)


if __name__ == "__main__":
    main()
