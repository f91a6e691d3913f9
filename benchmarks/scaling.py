"""What priors of 1, 8 and 70 billion parameters would take, from `bk.plan` and two numbers of a card: docs/scaling.md.

    python benchmarks/scaling.py            the tables, from configurations alone; no weights are made
    python benchmarks/scaling.py --check    the same arithmetic for a small model on this machine, against its measured time

A step of decoding reads all weights and the cache of every row once, and multiplies every row by every weight:

    seconds per step >= max((weights + rows * length * cache per token) / bandwidth, 2 * parameters * rows / arithmetic)

with length the mean number of tokens in the cache. Scoring T tokens of R rows takes 2 * parameters * R * T operations, and
a gradient twice as many again. A card is said to reach a share of its published peak; see `CARDS`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

import bayes_klrl as bk
from bayes_klrl.models.torch_lm.sizes import Sizes, sizes_of

NUM_PROMPT, NUM_NEW, NUM_PARTICLES, NUM_PROMPTS = 256, 512, 256, 10_000


@dataclass(frozen=True)
class Card:
    """A card: bytes of memory, bytes per second, operations per second in bfloat16 without sparsity; and a share of both."""

    name: str
    memory: float
    bandwidth: float
    arithmetic: float
    reached: float = 0.5


CARDS = {
    "H100": Card("H100 80 GB", 80e9, 3.35e12, 989e12),
    "H200": Card("H200 141 GB", 141e9, 4.8e12, 989e12),
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def prior_of(name: str) -> bk.TorchLM:
    """Return a Llama of the size of Llama 3 in bfloat16, of which nothing is loaded."""
    config = hf.LlamaConfig(vocab_size=128_256, max_position_embeddings=8192, **CONFIGURATIONS[name])
    with torch.device("meta"):
        return bk.TorchLM(hf.LlamaForCausalLM(config).to(torch.bfloat16))


def posterior_of(prior: bk.TorchLM, num_prompts: int = 1) -> bk.Posterior:
    """Return a posterior of prompts of 256 tokens and completions of at most 512."""
    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    return bk.Posterior(prior, ones, prompts=[[1] * NUM_PROMPT] * num_prompts, max_new_tokens=NUM_NEW)


def decoding_seconds(
    sizes: Sizes,
    parameters: float,
    weight_bytes: float,
    rows: int,
    lengths: tuple[int, int],
    card: Card,
    cards: int = 1,
) -> float:
    """Return the least seconds in which rows grow from the first length to the second, by the module's formula."""
    first, last = lengths
    cache = rows * (first + last) / 2 * sizes.cache_bytes
    reading = (weight_bytes + cache) / (cards * card.bandwidth * card.reached)
    computing = 2 * parameters * rows / (cards * card.arithmetic * card.reached)
    return (last - first) * max(reading, computing)


def scoring_seconds(parameters: float, tokens: int, card: Card, cards: int = 1, *, gradient: bool = False) -> float:
    """Return the least seconds of one forward pass, or of one with its backward pass."""
    return (6 if gradient else 2) * parameters * tokens / (cards * card.arithmetic * card.reached)


def tables() -> None:
    """Print memory and time of each prior."""
    print(
        f"{NUM_PARTICLES} particles x {NUM_NEW} tokens after {NUM_PROMPT} tokens; {NUM_PROMPTS:,} prompts; bfloat16\n"
    )
    print(
        "| prior | parameters | weights | cache, one prompt | SMC, peak | a step of SVI with LoRA, peak | full SVI, peak |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in CONFIGURATIONS:
        prior = prior_of(name)
        posterior = posterior_of(prior)
        smc = bk.plan(posterior, bk.SMC(NUM_PARTICLES), memory=1e15)
        lora = bk.plan(posterior, bk.SVI(100, 64, adapter="lora"), memory=1e15)
        full = bk.plan(posterior, bk.SVI(100, 64), memory=1e15)
        weights = smc.kept["parameters of the prior"]
        cells = [
            name,
            f"{smc.num_parameters / 1e9:.2f} billion",
            *(f"{size / 1e9:,.0f} GB" for size in (weights, smc.phases["decoding"]["key-value cache"])),
            *(f"{planned.peak_bytes / 1e9:,.0f} GB" for planned in (smc, lora, full)),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    print("\n| prior | cards | SMC, one prompt | all prompts | tokens per second | a step of SVI, 64 completions |")
    print("|---|---|---|---|---|---|")
    for name in CONFIGURATIONS:
        prior = prior_of(name)
        sizes, parameters = sizes_of(prior.module), sum(p.numel() for p in prior.module.parameters())
        assert sizes is not None
        weights = 2 * parameters
        for card, count in ((CARDS["H100"], 1), (CARDS["H200"], 1), (CARDS["H100"], 8)):
            needed = weights + NUM_PARTICLES * (NUM_PROMPT + NUM_NEW) * sizes.cache_bytes
            shards = 1 if needed < 0.9 * card.memory else 8
            if shards > count:
                print(f"| {name} | {count} x {card.name} | does not fit: {needed / 1e9:,.0f} GB | | | |")
                continue
            lengths = (NUM_PROMPT, NUM_PROMPT + NUM_NEW)
            one = decoding_seconds(sizes, parameters, weights, NUM_PARTICLES, lengths, card, shards)
            every = one * NUM_PROMPTS * shards / count
            rate = NUM_PARTICLES * NUM_NEW / one * count / shards
            draw = decoding_seconds(sizes, parameters, weights, 64, lengths, card, shards)
            tokens = 64 * (NUM_PROMPT + NUM_NEW)
            step = (
                draw
                + scoring_seconds(parameters, tokens, card, shards)
                + scoring_seconds(parameters, tokens, card, shards, gradient=True)
            )
            cells = [
                name,
                f"{count} x {card.name}",
                f"{one:,.1f} s",
                f"{every / 3600:,.1f} h",
                f"{rate:,.0f}",
                f"{step:,.1f} s",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def check() -> None:
    """Print the formula's seconds for a small float32 model on one thread of this machine, and the measured ones."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        eos_token_id=None,
    )
    prior = bk.TorchLM(hf.LlamaForCausalLM(config).eval(), eos_token_id=())
    here = this_machine()
    sizes, parameters = sizes_of(prior.module), sum(p.numel() for p in prior.module.parameters())
    assert sizes is not None
    multiplied = parameters - prior.module.get_input_embeddings().weight.numel()  # a row of it is read, not multiplied
    print(
        f"{parameters:,} parameters; {here.arithmetic / 1e9:.0f} GFLOP/s, {here.bandwidth / 1e9:.1f} GB/s, one thread"
    )
    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    for num_particles, num_new in ((64, 32), (256, 32), (64, 128)):
        posterior = bk.Posterior(prior, ones, prompts=[[1] * 16], max_new_tokens=num_new)
        seconds = decoding_seconds(sizes, multiplied, 4 * multiplied, num_particles, (16, 16 + num_new), here)
        measured = cpu_seconds(lambda posterior=posterior, n=num_particles: bk.SMC(n).run(posterior, seed=0))
        print(
            f"SMC, {num_particles} x {num_new}: formula {seconds:.2f} s, measured {measured:.2f} ({measured / seconds:.2f})"
        )


def this_machine() -> Card:
    """Return one thread of this machine as a card, its peaks measured by a product and by a sum."""
    square, long = torch.randn(1024, 1024), torch.randn(2**26)
    arithmetic = 2 * 1024**3 / cpu_seconds(lambda: square @ square)
    return Card("this machine", 0, long.numel() * 4 / cpu_seconds(long.sum), arithmetic, reached=1.0)


def cpu_seconds(run: Any, repetitions: int = 5) -> float:
    """Return the median CPU seconds of a function, after one call that warms up."""
    run()
    found = []
    for _ in range(repetitions):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    """Print the tables, or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        check()
    else:
        tables()


if __name__ == "__main__":
    main()
