"""How near to their arithmetic are decoding and a step of SVI? Shares of the time, against bare matrix products.

    OMP_NUM_THREADS=1 python benchmarks/bench_floor.py decoding     per shape: floor, ours, `generate`, and their ratios
    OMP_NUM_THREADS=1 python benchmarks/bench_floor.py growth       CPU seconds against N, T, V, prompt length and prompts
    OMP_NUM_THREADS=1 python benchmarks/bench_floor.py step         the parts of a step of SVI, 64 x 16 on 4 x 128, V = 2000
    OMP_NUM_THREADS=1 python benchmarks/bench_floor.py trl          the same step by TRL's RLOOTrainer; needs TRL

The floor of decoding is the time of its matrix products alone (each layer's four and the head's, for R rows, measured one by
one), and of reading all keys and values once per step at the machine's own bandwidth. The floor of a step of SVI is that of
drawing, of one forward pass under the prior, and three times that for forward and backward pass of the guide. Products are
measured twice: by torch's own `addmm`, and by the package's `linear`, which may be faster. CPU seconds of one thread, or with
--threads 2 wall seconds of two; the best of several repetitions, ours and `generate`'s in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from bench_sampling import sample_generate
from bench_trainers import trl_train, word_tokenizer

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend.elbo import SequenceELBO
from bayes_klrl.models.decoding import draw_blocks
from bayes_klrl.models.torch_lm.tight.products import linear
from bayes_klrl.randomness import Streams


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of random weights, or with `inner` a Llama, and what is drawn from it."""

    name: str
    layers: int
    width: int
    heads: int
    vocab: int = 2000
    rows: int = 64
    new: int = 32
    prompt: int = 8
    prompts: int = 1
    inner: int | None = None
    key_heads: int = 0

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """The sizes of the matrices of one layer."""
        width = self.width
        if self.inner is None:
            return ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
        keys = width * self.key_heads // self.heads
        attention = ((width, width), (width, keys), (width, keys), (width, width))
        return (*attention, (width, self.inner), (width, self.inner), (self.inner, width))

    @property
    def cached(self) -> int:
        """Numbers of one token's keys and values in one layer."""
        return 2 * (self.width if self.inner is None else self.width * self.key_heads // self.heads)

    def model(self) -> Any:
        """Return the model."""
        torch.manual_seed(0)
        if self.inner is not None:
            llama = hf.LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=self.width,
                intermediate_size=self.inner,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.key_heads,
                tie_word_embeddings=True,
                eos_token_id=None,
            )
            return hf.LlamaForCausalLM(llama).eval()
        config = hf.GPT2Config(
            vocab_size=self.vocab,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            eos_token_id=None,
            bos_token_id=None,
        )
        return hf.GPT2LMHeadModel(config).eval()


SMALL = Shape("4 x 128", 4, 128, 4)
SHAPES = (
    SMALL,
    replace(SMALL, name="4 x 128, T = 128", new=128),
    replace(SMALL, name="4 x 128, T = 512", new=512),
    Shape("12 x 256", 12, 256, 4),
    Shape("GPT-2 small", 12, 768, 12, vocab=50_257, rows=16),
    Shape("SmolLM2-135M", 30, 576, 9, vocab=49_152, rows=16, new=16, inner=1536, key_heads=3),
)


def best(run: Callable[[], Any], repetitions: int = 3) -> float:
    """Return the least seconds of a function, after one call that warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    found = []
    for _ in range(repetitions):
        start = clock()
        run()
        found.append(clock() - start)
    return min(found)


Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def by_torch(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Multiply as `torch.nn.Linear` and `generate` do."""
    return torch.addmm(bias, left, right)


def by_us(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Multiply as the package does."""
    return linear(left, right.t(), bias)


def product_seconds(rows: int, inner: int, outer: int, multiply: Multiply) -> float:
    """Return the seconds of one product of (rows, inner) and (inner, outer), with a bias, as a layer computes it."""
    left, right, bias = torch.randn(rows, inner), torch.randn(inner, outer), torch.randn(outer)
    number = max(1, int(2e8 / (rows * inner * outer)))
    return best(lambda: [multiply(left, right, bias) for _ in range(number)], 5) / number


def forward_seconds(shape: Shape, rows: int, multiply: Multiply) -> float:
    """Return the seconds of the products of one forward pass over so many tokens, with logits for each of them."""
    of_layer = sum(product_seconds(rows, *each, multiply) for each in shape.products)
    return shape.layers * of_layer + product_seconds(rows, shape.width, shape.vocab, multiply)


def bandwidth() -> float:
    """Return the bytes per second at which numbers are read from main memory."""
    numbers = torch.randn(2**26)
    return 4 * numbers.numel() / best(numbers.sum, 5)


def decoding_floor(shape: Shape, speed: float) -> tuple[float, float, float]:
    """Return the seconds of decoding all tokens but the last: its products by torch and by us, and reading keys and values."""
    rows, steps = shape.rows * shape.prompts, shape.new - 1
    mean_length = shape.prompt + shape.new / 2
    read = 4 * rows * mean_length * shape.cached * shape.layers * steps / speed
    theirs, ours = (steps * forward_seconds(shape, rows, multiply) for multiply in (by_torch, by_us))
    return theirs, ours, read


def bench_decoding(repetitions: int, only: str) -> None:
    """Print a row for each shape with that in its name."""
    speed = bandwidth()
    print(f"{speed / 1e9:.1f} GB/s; seconds\n")
    columns = ["model", "rows x tokens", "products by torch", "by us", "reading the cache", "ours", "ours / floor"]
    columns += ["generate", "generate / ours"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for shape in (each for each in SHAPES if only in each.name):
        ours, theirs = in_turn(shape, repetitions)
        by_addmm, by_linear, reading = decoding_floor(shape, speed)
        floor = by_linear + reading
        cells = [
            shape.name,
            f"{shape.rows} x {shape.new}",
            f"{by_addmm:.3f}",
            f"{by_linear:.3f}",
            f"{reading:.3f}",
            f"{ours:.3f}",
            f"{ours / floor:.2f}",
            f"{theirs:.3f}",
            f"{theirs / ours:.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def in_turn(shape: Shape, repetitions: int) -> tuple[float, float]:
    """Return the seconds of this package and of `generate`, the best of runs in turn."""
    model = shape.model()
    lm, prompt = bk.TorchLM(model, eos_token_id=()), list(range(1, shape.prompt + 1))
    ours, theirs = [], []
    for repetition in range(repetitions):
        ours.append(best(lambda: drawn(lm, shape, prompt), 1))
        theirs.append(best(lambda r=repetition: sample_generate(model, [prompt], shape.rows, shape.new, r), 1))
    return min(ours), min(theirs)


def drawn(lm: bk.TorchLM, shape: Shape, prompt: list[int]) -> Any:
    """Draw the shape's completions, as the algorithms do: in blocks of at most `ROWS_PER_BLOCK` rows."""
    prompts = [[*prompt[:-1], 1 + p] for p in range(shape.prompts)]
    return list(draw_blocks((lm,), prompts, shape.rows, shape.new, Streams.of(0)))


def bench_growth(repetitions: int, only: str) -> None:
    """Print the time against each size, with that of the floor: how much each grows when the size doubles."""
    speed = bandwidth()
    sizes: dict[str, tuple[int, ...]] = {
        "rows": (64, 256, 1024),
        "new": (32, 128, 512),
        "vocab": (2000, 16_000, 50_000),
        "prompt": (8, 64, 256),
        "prompts": (1, 8, 32),
    }
    print("| varied | size | ours | floor | ours / floor |\n|---|---|---|---|---|")
    for name, values in sizes.items():
        for value in values if only in name else ():
            shape = replace(SMALL, **{name: value})
            lm = bk.TorchLM(shape.model(), eos_token_id=())
            prompt = list(range(1, shape.prompt + 1))
            ours = best(lambda s=shape, lm=lm, prompt=prompt: drawn(lm, s, prompt), repetitions)
            floor = sum(decoding_floor(shape, speed)[1:])
            print(f"| {name} | {value:,} | {ours:.3f} | {floor:.3f} | {ours / floor:.2f} |", flush=True)


def bench_step(repetitions: int) -> None:
    """Print the parts of a step of SVI, alone and as shares of a step."""
    shape = replace(SMALL, new=16)
    prior = bk.TorchLM(shape.model(), eos_token_id=())
    evens = bk.TokenReward(lambda tokens, lengths: (tokens % 2 == 0).mean(axis=1), alpha=0.1)
    posterior = bk.Posterior(prior, evens, prompts=[list(range(1, 9))], max_new_tokens=shape.new)
    sequences, guide, number = bk.ImportanceSampling(64).run(posterior, seed=0).sequences, prior.copy(), 10

    def scored(lm: bk.TorchLM) -> torch.Tensor:
        return lm.token_log_probs(posterior.prompt_ids, sequences)

    def differentiated() -> None:
        scored(guide).sum().backward()
        for parameter in guide.parameters():
            parameter.grad = None

    def trained() -> None:
        bk.SVI(number, 64, learning_rate=1e-4).fit(posterior, seed=0)

    checks = [0]
    change = SequenceELBO.guide_change

    def counted(elbo: SequenceELBO) -> float:
        checks[0] += 1
        return change(elbo)

    SequenceELBO.guide_change = counted  # type: ignore[method-assign]
    trained()
    SequenceELBO.guide_change = change  # type: ignore[method-assign]
    with torch.no_grad():
        score = best(lambda: scored(prior), repetitions)
    parts = {
        "draw": best(lambda: drawn(prior, shape, list(range(1, 9))), repetitions),
        "score under the prior": score,
        "forward and backward pass of the guide": best(differentiated, repetitions),
        f"how far the step went ({checks[0] / number:.1f} per step)": score * checks[0] / number,
    }
    step = best(trained, repetitions) / number
    by_addmm, by_linear, reading = decoding_floor(shape, bandwidth())
    floors = []
    for multiply, draw in ((by_torch, by_addmm), (by_us, by_linear)):
        forward = forward_seconds(shape, 64 * shape.new, multiply)
        floors.append([draw + reading, forward, 3 * forward, 0.0])
    print("| part | seconds | share of the step | its arithmetic by torch | by us |\n|---|---|---|---|---|")
    for (name, seconds), theirs, ours in zip(parts.items(), *floors, strict=True):
        print(f"| {name} | {seconds:.3f} | {seconds / step:.0%} | {theirs:.3f} | {ours:.3f} |")
    rest = step - sum(parts.values())
    print(f"| rest: rewards, Pyro, optimizer | {rest:.3f} | {rest / step:.0%} | | |")
    print(f"| step | {step:.3f} | | {sum(floors[0]):.3f} | {sum(floors[1]):.3f} |")
    print(
        f"\nstep / arithmetic by torch {step / sum(floors[0]):.2f}, by us {step / sum(floors[1]):.2f}, "
        f"step / its parts {step / sum(parts.values()):.2f}"
    )


def bench_trl(repetitions: int) -> None:
    """Print the CPU seconds of a step of `bk.SVI` and of TRL's `RLOOTrainer`, in turn, with one model and one reward."""
    shape = replace(SMALL, new=16)
    prior = bk.TorchLM(shape.model(), word_tokenizer(shape.vocab, 0), eos_token_id=0)

    def short(completions: list[str], **kwargs: Any) -> list[float]:  # noqa: ARG001
        return [len(text) / 100 for text in completions]

    prompt = " ".join(map(str, range(1, shape.prompt + 1)))
    posterior = bk.Posterior(prior, bk.Reward(short, alpha=0.1), prompts=prompt, max_new_tokens=shape.new)

    def ours(num_steps: int) -> float:
        start = time.process_time()
        bk.SVI(num_steps, shape.rows, learning_rate=1e-4).fit(posterior, seed=0)
        return time.process_time() - start

    def theirs(num_steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            options = {"seed": 0, "num_steps": num_steps, "lora": False, "batch": shape.rows, "learning_rate": 1e-4}
            return trl_train("RLOO", posterior, Path(folder) / "policy", **options)

    found: dict[str, list[float]] = {"bk.SVI": [], "RLOOTrainer": []}
    for _ in range(repetitions):
        for name, run in zip(found, (ours, theirs), strict=True):
            found[name].append((run(25) - run(5)) / 20)  # without what is paid once
    middle = {name: float(np.median(seconds)) for name, seconds in found.items()}
    print("| trainer | CPU seconds per step, median | least | most |\n|---|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {middle[name]:.3f} | {min(seconds):.3f} | {max(seconds):.3f} |")
    print(f"\nours / TRL {middle['bk.SVI'] / middle['RLOOTrainer']:.2f}")


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decoding", "growth", "step", "trl"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="with more than one, wall seconds")
    parser.add_argument("--only", help="decoding and growth: the shapes or sizes whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what in ("decoding", "growth"):
        {"decoding": bench_decoding, "growth": bench_growth}[options.what](options.repetitions, options.only or "")
        return
    {"step": bench_step, "trl": bench_trl}[options.what](options.repetitions)


if __name__ == "__main__":
    main()
