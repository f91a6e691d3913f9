"""Sampling speed and memory: TorchLM's decode loop against Hugging Face's `generate`, random weights, one thread.

Both draw from the full distribution (no top-k, no top-p) and no row ever ends: EOS is switched off. CPU seconds, the
two interleaved, each the best of several repetitions, since the ratio of two runs minutes apart measures the machine.
Memory is the peak above the loaded model, in separate processes (Linux only).

    OMP_NUM_THREADS=1 python benchmarks/bench_sampling.py [--size small|gpt2|llama] [--repetitions 7]
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

from bayes_klrl.arrays import draw_tokens
from bayes_klrl.models.torch_lm import TorchLM

PROMPT_LENGTH, NUM_NEW = 8, 32
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


def sample_ours(lm: TorchLM, prompt: list[int], num_rows: int, seed: int) -> np.ndarray:
    """Return num_rows completions, shape (R, T): inverse CDF on uniforms from the host."""
    uniforms = np.random.default_rng(seed).random((NUM_NEW, num_rows))
    rows = np.arange(num_rows)
    state = lm.select(lm.prefill([prompt]), np.zeros(num_rows, dtype=np.int64))
    columns = []
    for step in range(NUM_NEW):
        columns.append(draw_tokens(lm.next_log_probs(state), rows, uniforms[step]))
        if step + 1 < NUM_NEW:
            state = lm.append(state, columns[-1])
    return np.stack(columns, axis=1)


def sample_generate(model: Any, prompt: list[int], num_rows: int, seed: int) -> np.ndarray:
    """Return num_rows completions, shape (R, T), from Hugging Face's own sampler."""
    torch.manual_seed(seed)
    tokens = torch.tensor([prompt]).repeat(num_rows, 1)
    settings = hf.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, pad_token_id=0
    )
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return np.asarray(output[:, len(prompt) :])


def samplers(size: str) -> dict[str, Callable[[int], np.ndarray]]:
    """Return both samplers as functions of a seed."""
    model = random_model(size)
    lm = TorchLM(model, eos_token_id=())
    prompt, num_rows = list(range(1, PROMPT_LENGTH + 1)), NUM_ROWS[size]
    return {
        "generate": lambda seed: sample_generate(model, prompt, num_rows, seed),
        "bayes_klrl": lambda seed: sample_ours(lm, prompt, num_rows, seed),
    }


def cpu_seconds(size: str, repetitions: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each sampler's repetitions, interleaved."""
    seconds: dict[str, list[float]] = {"generate": [], "bayes_klrl": []}
    runs = samplers(size)
    for run in runs.values():
        assert run(0).shape == (NUM_ROWS[size], NUM_NEW)  # also the warm-up
    for repetition in range(repetitions):
        for name, run in runs.items():
            start = time.process_time()
            run(repetition)
            seconds[name].append(time.process_time() - start)
    return seconds


def peak_memory(size: str, name: str) -> float:
    """Return by how many MB the resident memory of a process rises while it samples for the second time."""
    command = [sys.executable, __file__, "--size", size, "--memory-of", name]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def resident_mb(field: str) -> float:
    """Return a field of this process's memory status."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=TARGETS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        runs = samplers(options.size)
        runs[options.memory_of](0)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_mb("VmRSS")
        runs[options.memory_of](1)
        print(json.dumps(resident_mb("VmHWM") - before))
        return
    for size in [options.size] if options.size else TARGETS:
        seconds = cpu_seconds(size, options.repetitions)
        theirs, ours = min(seconds["generate"]), min(seconds["bayes_klrl"])
        memory = {name: peak_memory(size, name) for name in seconds}
        print(
            f"{size:6} {NUM_ROWS[size]:3} rows x {NUM_NEW} tokens, CPU s: generate {theirs:.3f}, ours {ours:.3f}, "
            f"ratio {theirs / ours:.2f} (target {TARGETS[size]}; medians "
            f"{np.median(seconds['generate']) / np.median(seconds['bayes_klrl']):.2f}); "
            f"peak MB above the model: generate {memory['generate']:.0f}, ours {memory['bayes_klrl']:.0f}"
        )


if __name__ == "__main__":
    main()
