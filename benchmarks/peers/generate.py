"""`model.generate` of transformers, drawing from the full distribution.

python -m benchmarks.peers.generate --task job.json --json out.json
"""

from __future__ import annotations

from typing import Any

import transformers

from benchmarks.bench_sampling import sample_generate
from benchmarks.peers import measure

__all__ = ["prepared"]


def prepared(job: dict[str, Any]) -> measure.Run:
    """Return the run that draws the completions of all prompts in one batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"]).eval()

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        num, length = (2, 4) if small else (job["num"], job["tokens"])
        with clock:
            tokens = sample_generate(model, job["prompts"], num, length, seed)
        return {"tokens": int(tokens.size)}

    return run


if __name__ == "__main__":
    measure.main(prepared, ("transformers",))
