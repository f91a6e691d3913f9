"""llamppl: a probabilistic program of the task, run by `smc_standard` or `smc_steer` on its torch backend.

    python -m benchmarks.peers.llamppl_peer --task job.json --json out.json

The program is written as its documentation does: `sample` the next token, `score` a finished completion, and `observe` that
the next token is an allowed one. Batches hold all particles, caches are emptied before each run, and the prompt's keys and
values are kept, which is what this backend keeps.
"""

from __future__ import annotations

import asyncio
from typing import Any

import llamppl
import numpy as np

from benchmarks.peers import measure

__all__ = ["prepared"]

NUM_CONTINUATIONS = 3
"""Continuations that `smc_steer` considers for each particle."""


class Completion(llamppl.Model):
    """A completion of at most T tokens: an EOS ends it if `eos` is given, and its log-likelihood is looked up at the end."""

    def __init__(self, lm: Any, job: dict[str, Any], context: Any, length: int) -> None:
        super().__init__()
        self.lm, self.length, self.context = lm, length, context
        self.eos, self.log_likelihood = job.get("eos"), job.get("log_likelihood")
        forbidden = job.get("forbidden")
        self.allowed = None if forbidden is None else lm.masks.ALL_TOKENS - set(forbidden)
        self.drawn: list[int] = []

    def immutable_properties(self) -> set[str]:
        return {"lm", "log_likelihood", "allowed"}

    async def step(self) -> None:
        if self.allowed is not None:
            await self.observe(self.context.mask_dist(self.allowed), True)
        self.drawn.append(int((await self.sample(self.context.next_token())).token_id))
        if len(self.drawn) == self.length or self.drawn[-1] == self.eos:
            if self.log_likelihood is not None:
                self.score(self.log_likelihood[" ".join(map(str, self.drawn))])
            self.finish()


def prepared(job: dict[str, Any]) -> measure.Run:
    """Return the run that draws, or that estimates log Z."""
    num_rows = job["num"] * (NUM_CONTINUATIONS if job["method"] == "smc_steer" else 1)
    lm = llamppl.CachedCausalLM.from_pretrained(job["model"], backend="hf", batch_size=num_rows)

    async def population(prompt: list[int], text: str, num: int, length: int) -> list[Completion]:
        lm.clear_cache()
        lm.cache_kv(prompt)
        program = Completion(lm, job, await llamppl.LMContext.create(lm, text), length)
        if job["method"] == "smc_steer":
            particles = await llamppl.smc_steer(program, num, NUM_CONTINUATIONS)
        else:
            threshold = 0.5 if job["kind"] == "evidence" else 0.0
            particles = await llamppl.smc_standard(program, num, ess_threshold=threshold)
        return list(particles)

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        np.random.seed(seed)  # noqa: NPY002  (llamppl draws from the global generator)
        length = 4 if small and job["kind"] == "sampling" else job["tokens"]
        with clock:
            populations = [
                asyncio.run(population(prompt, text, 2 if small else job["num"], length))
                for prompt, text in zip(job["prompts"], job["texts"], strict=True)
            ]
        weights = np.array([particle.weight for particle in populations[0]])
        tokens = sum(len(particle.drawn) for particles in populations for particle in particles)
        return {"tokens": tokens, "log_evidence": float(np.logaddexp.reduce(weights) - np.log(len(weights)))}

    return run


if __name__ == "__main__":
    measure.main(prepared, ("llamppl", "genlm-backend", "transformers"))
