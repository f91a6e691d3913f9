"""Conversations as prompts on a real checkpoint: SMC on SmolLM2-135M-Instruct against Hugging Face's `generate`, one thread.

Both answer the same 8 conversations, 32 completions of at most 32 tokens each, from the full distribution, with the same EOS
ids, in one process. `generate` gets the conversations as transformers renders and pads them. CPU seconds, interleaved, the
best of the repetitions; a token is one of a completion, up to its EOS. SMC runs with its default twist, and with a twist by
which it resamples every few tokens.

    make smollm2, then
    OMP_NUM_THREADS=1 python benchmarks/bench_chat.py [--prompts 8] [--particles 32] [--new 32] [--repetitions 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as hf

import bayes_klrl as bk

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits.",
    "How do I boil an egg?",
    "Give me a title for a story about a lost dog, and say in a few words why you chose it.",
    "Is the moon a planet?",
    "Say something kind to a friend who has lost a game of chess against a much younger player.",
    "What is 7 times 8?",
)
TARGET = 0.9


def exclamations(completions: list[Any]) -> list[float]:
    """Return the number of exclamation marks of each completion, up to 3: a reward of TRL's conversational format."""
    return [float(min(completion[0]["content"].count("!"), 3)) for completion in completions]


def even_tokens(_posterior: bk.Posterior, _prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """Return a twist that makes weights degenerate every few tokens, so that SMC has something to do."""
    return 0.5 * (prefixes % 2 == 0).sum(axis=1).astype(np.float64)


def generated(lm: bk.TorchLM, conversations: list[Any], num: int, num_new: int, seed: int) -> int:
    """Return the number of tokens that `generate` draws for the conversations."""
    torch.manual_seed(seed)
    tokenizer = lm.tokenizer
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    settings = hf.GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=num_new,
        num_return_sequences=num,
        eos_token_id=sorted(lm.eos_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    output = lm.module.generate(**inputs, generation_config=settings)
    completions = output[:, inputs["input_ids"].shape[1] :].numpy()
    is_eos = np.isin(completions, list(lm.eos_token_ids))
    return int(np.where(is_eos.any(axis=1), is_eos.argmax(axis=1) + 1, completions.shape[1]).sum())


def samplers(num_prompts: int, num: int, num_new: int) -> dict[str, Callable[[int], int]]:
    """Return the samplers, functions of a seed that return the number of tokens."""
    lm = bk.TorchLM.from_pretrained("smollm2")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS[:num_prompts]]
    posterior = bk.Posterior(
        lm, bk.Reward(exclamations, alpha=0.5, bounds=(0, 3)), prompts=conversations, max_new_tokens=num_new
    )
    rendered = posterior.prompts[0].rendering.text
    print(f"prompts of {sorted(map(len, posterior.prompt_ids))} tokens; EOS {sorted(lm.eos_token_ids)}; {rendered!r}")

    def tokens_of(algorithm: bk.Algorithm) -> Callable[[int], int]:
        return lambda seed: int(algorithm.run(posterior, seed=seed).lengths.sum())

    return {
        "generate": lambda seed: generated(lm, conversations, num, num_new, seed),
        "SMC": tokens_of(bk.SMC(num)),
        "SMC that resamples": tokens_of(bk.SMC(num, twist=even_tokens)),
    }


def main() -> None:
    """Print tokens per CPU second of each, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = samplers(options.prompts, options.particles, options.new)
    speed: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(options.repetitions):
        for name, run in runs.items():
            start = time.process_time()
            tokens = run(repetition)
            seconds = time.process_time() - start
            speed[name].append(tokens / seconds)
            print(f"  {name}: {tokens} tokens in {seconds:.1f} CPU s, {tokens / seconds:.1f} a second", flush=True)
    for name in list(runs)[1:]:
        print(f"{name} / generate {max(speed[name]) / max(speed['generate']):.2f}, target {TARGET}")


if __name__ == "__main__":
    main()
