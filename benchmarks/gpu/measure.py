"""Tokens per second, peak memory, and how often the host waits: sampling, SMC and a step of SVI, against `generate`."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as hf

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode
from bayes_klrl.models.torch_lm.on_device import static_steps
from bayes_klrl.models.torch_lm.on_device.static_step import StaticStep, stepper
from benchmarks.gpu.shapes import PROMPT, Shape, shapes

__all__ = ["Measure", "measures"]

REPETITIONS = 3
ENOUGH = 3.0  # seconds, after which a run is not repeated


@dataclass(frozen=True)
class Measure:
    """One line of the table: its name, the seconds that it may take, and the function that measures."""

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


class Loaded:
    """A shape's model, made when it is first needed and dropped before the next one is made."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        self.took: dict[str, float] = {}  # seconds of a measurement with fewer completions
        self._lm: bk.TorchLM | None = None

    @property
    def lm(self) -> bk.TorchLM:
        """The language model; its numbers are checked by `checks`."""
        if self._lm is None:
            self._lm = bk.TorchLM(self.shape.model(self.device), eos_token_id=(), check=False)
        return self._lm

    def drop(self) -> None:
        """Free the model's memory."""
        self._lm = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def measures(device: str, *, tiny: bool) -> Iterator[Measure]:
    """Yield the measurements, the most wanted first."""
    sizes = (2, 4) if tiny else (64, 1024)
    for shape in shapes(tiny=tiny):
        loaded = Loaded(shape, device)
        for num_rows in sizes:
            yield from of_size(loaded, num_rows, device, tiny=tiny)
        loaded.drop()


def of_size(loaded: Loaded, num_rows: int, device: str, *, tiny: bool) -> Iterator[Measure]:
    """Yield the measurements of one model with so many completions."""
    runs: dict[str, Callable[[int], int]] = {
        "generate": lambda seed: generated(loaded, num_rows, seed),
        "sampling": lambda seed: sampled(loaded, num_rows, seed),
        "sampling, static step": lambda seed: sampled(loaded, num_rows, seed, "static"),
    }
    if device == "cuda":
        runs["sampling, CUDA graph"] = lambda seed: sampled(loaded, num_rows, seed, "graph")
    runs["SMC"] = lambda seed: grown(loaded, num_rows, seed)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda run=run: timed(run, device, 1 if tiny else REPETITIONS)  # type: ignore[misc]
        for name, run in runs.items()
    }
    sections["step of SVI"] = lambda: step_of_svi(loaded, num_rows, device)
    for name, section in sections.items():
        needs = max(2.0 if tiny else 6.0, 8 * loaded.took.get(name, 0.0))  # of 16 times the completions
        yield Measure(f"{loaded.shape.name}, N = {num_rows}: {name}", needs, partial(noted, loaded, name, section))
    if not tiny and num_rows <= 64:  # translating takes long
        title = f"{loaded.shape.name}, N = {num_rows}: sampling, torch.compile"
        yield Measure(title, 60.0, lambda: translated(loaded, num_rows, device))


def noted(loaded: Loaded, name: str, section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a section and note how long it took."""
    start = time.perf_counter()
    try:
        return section()
    finally:
        loaded.took[name] = time.perf_counter() - start


def generated(loaded: Loaded, num_rows: int, seed: int) -> int:
    """Draw by Hugging Face's `generate` from the full distribution; return the number of new tokens."""
    torch.manual_seed(seed)
    num_tokens = loaded.shape.num_tokens
    tokens = torch.tensor([PROMPT], device=loaded.lm.device).repeat(num_rows, 1)
    settings = hf.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0
    )
    model: Any = loaded.lm.module
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return int(output[:, len(PROMPT) :].numel())


def sampled(loaded: Loaded, num_rows: int, seed: int, how: str | None = None) -> int:
    """Draw by the package; return the number of new tokens."""
    arguments = (loaded.lm,), [PROMPT], num_rows, loaded.shape.num_tokens, np.random.default_rng(seed)
    if how is None:
        return int(decode(*arguments).lengths.sum())
    with static_steps(how):
        return int(decode(*arguments).lengths.sum())


def posterior_of(loaded: Loaded) -> bk.Posterior:
    """Return a posterior whose reward costs nothing."""
    even = bk.TokenReward(lambda tokens, lengths: (tokens % 2 == 0).sum(axis=1) * 1.0, alpha=2.0)
    return bk.Posterior(loaded.lm, even, prompts=[PROMPT], max_new_tokens=loaded.shape.num_tokens)


def even_so_far(_posterior: bk.Posterior, _prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """Return a twist that makes SMC resample every few tokens."""
    return 0.5 * (prefixes % 2 == 0).sum(axis=1).astype(np.float64)


def grown(loaded: Loaded, num_rows: int, seed: int) -> int:
    """Run SMC; return the number of new tokens."""
    return int(bk.SMC(num_rows, twist=even_so_far).run(posterior_of(loaded), seed=seed).lengths.sum())


def timed(run: Callable[[int], int], device: str, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Return the median of some runs, the peak of the card's memory, and how often the host waited in one more run."""
    num_tokens = run(0)  # the warm-up
    reset(device)
    seconds: list[float] = []
    while len(seconds) < repetitions and sum(seconds) < ENOUGH:
        start = time.perf_counter()
        run(1 + len(seconds))
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds))
    found = {
        "seconds": median,
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / median,
        "peak_gib": peak(device),
    }
    return found | waits(lambda: run(9), device)


def step_of_svi(loaded: Loaded, num_rows: int, device: str) -> dict[str, Any]:
    """Return the seconds of the third step of a training, and its peak memory."""
    adapter = loaded.shape.adapter
    if adapter is not None:
        try:
            import peft  # noqa: F401
        except ImportError:
            return {"skipped": "peft is not installed, and all weights of this model are too many for Adam"}
    posterior = posterior_of(loaded)
    reset(device)
    recipe = bk.SVI(3, num_rows, optimizer="adam", twist="none", adapter=adapter)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit = recipe.fit(posterior, seed=0)
    wait_for(device)
    seconds = float(np.diff(fit.history["seconds"])[-1])
    num_tokens = num_rows * loaded.shape.num_tokens
    found: dict[str, Any] = {"seconds": seconds, "tokens": num_tokens, "tokens_per_second": num_tokens / seconds}
    halved = [str(each.message) for each in said if "memory of the device ran out" in str(each.message)]
    if halved:
        found["halved"] = halved[-1]
    found["peak_gib"] = peak(device)
    one = bk.SVI(1, num_rows, optimizer="adam", twist="none", adapter=adapter)
    counted = waits(lambda: one.fit(posterior, seed=1), device, num_tokens)
    del fit
    return found | counted


def translated(loaded: Loaded, num_rows: int, device: str) -> dict[str, Any]:
    """Return the time of the static step after `torch.compile`, and of the first step, which translates it."""
    lm, num_tokens = loaded.lm, loaded.shape.num_tokens
    with torch.no_grad():
        state = lm.prefill([PROMPT])
        cache = state.network.select(state.cache, torch.zeros(num_rows, dtype=torch.long, device=lm.device))
        newest = torch.full((num_rows,), PROMPT[-1], device=lm.device)
        uniforms = torch.rand((num_tokens, num_rows), device=lm.device)
        none = torch.zeros(0, dtype=torch.long, device=lm.device)
        one_more = stepper(StaticStep((lm,), (state.network,), (cache,), newest, uniforms, none), "compile")
        reset(device)
        start = time.perf_counter()
        one_more()
        wait_for(device)
        first, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(num_tokens - 1):
            one_more()
        wait_for(device)
    seconds, tokens = time.perf_counter() - start, num_rows * (num_tokens - 1)
    found = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "peak_gib": peak(device)}
    return found | {"seconds_of_translation": first}


def waits(run: Callable[[], Any], device: str, num_tokens: int | None = None) -> dict[str, Any]:
    """Return how often the host waited for the card in a run, as torch itself counts it; nothing on the CPU."""
    if device != "cuda":
        return {}
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    count = sum("synchroniz" in str(each.message) for each in said)
    length = num_tokens or found
    return {"waits": count, "waits_per_token": count / length if isinstance(length, int) and length else None}


def reset(device: str) -> None:
    """Begin a new peak of the card's memory."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def wait_for(device: str) -> None:
    """Wait for the card."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float | None:
    """Return the peak of the card's memory in GiB; None on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
