"""genlm-control: SMC over its torch backend, with a critic for the reward or AWRS for the constraint.

    python -m benchmarks.peers.genlm_peer --task job.json --json out.json

The reward is a critic that scores finished completions only; the constraint is a condition, as its documentation does it.
`terminate_when` cuts completions after T tokens without a weight, as the posterior does. Batches hold all particles, caches
are emptied before each run, and the prompt's keys and values are kept, which is what this backend keeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from genlm.backend.llm import AsyncTransformer
from genlm.control import AWRS, Potential, PromptedLLM, direct_token_sampler

from benchmarks.peers import measure

__all__ = ["prepared"]


class LookedUp(Potential):  # type: ignore[misc]
    """The log-likelihood of finished completions, by their token ids; 0 for every prefix."""

    def __init__(self, llm: PromptedLLM, job: dict[str, Any]) -> None:
        super().__init__(llm.vocab)
        self.log_likelihood, self.eos_id, self.length = job["log_likelihood"], job["eos"], job["tokens"]

    async def complete(self, context: Sequence[Any]) -> float:
        ids = [token.token_id for token in context]
        ends = [] if len(ids) == self.length else [self.eos_id]
        return float(self.log_likelihood[" ".join(map(str, ids + ends))])

    async def prefix(self, context: Sequence[Any]) -> float:
        return 0.0

    def is_terminal_only(self) -> bool:
        return True


class Allowed(Potential):  # type: ignore[misc]
    """0 where none of the forbidden tokens occurs, -inf elsewhere."""

    def __init__(self, llm: PromptedLLM, forbidden: Sequence[int]) -> None:
        super().__init__(llm.vocab)
        self.forbidden = frozenset(forbidden)

    async def complete(self, context: Sequence[Any]) -> float:
        return await self.prefix(context)

    async def prefix(self, context: Sequence[Any]) -> float:
        return float("-inf") if any(token.token_id in self.forbidden for token in context) else 0.0


def prepared(job: dict[str, Any]) -> measure.Run:
    """Return the run that draws, or that estimates log Z."""
    model = AsyncTransformer.from_name(job["model"], batch_size=job["num"])
    llm = PromptedLLM(model, prompt_ids=job["prompts"][0])
    critic = LookedUp(llm, job) if job["method"] == "SMC" and job["kind"] == "evidence" else None

    async def population(prompt: list[int], num: int, length: int, seed: int) -> Any:
        model.clear_cache()
        model.cache_kv(prompt)
        llm.prompt_ids = prompt
        if job["method"] == "AWRS":
            sampler: Any = AWRS(llm, Allowed(llm, job["forbidden"]), seed=seed)
        else:
            sampler = direct_token_sampler(llm)
        return await sampler.smc(
            n_particles=num,
            ess_threshold=0.5 if job["kind"] == "evidence" else 0.0,
            max_tokens=length + 1,
            critic=critic,
            terminate_when=lambda context: len(context) == length,
        )

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        np.random.seed(seed)  # noqa: NPY002  (genlm-control draws from the global generators)
        torch.manual_seed(seed)
        length = 4 if small and job["kind"] == "sampling" else job["tokens"]
        with clock:
            populations = [
                asyncio.run(population(prompt, 2 if small else job["num"], length, seed)) for prompt in job["prompts"]
            ]
        tokens = sum(len(context) - 1 for sequences in populations for context in sequences.contexts)
        return {"tokens": tokens, "log_evidence": float(populations[0].log_ml)}

    return run


if __name__ == "__main__":
    measure.main(prepared, ("genlm-control", "genlm-backend", "transformers"))
