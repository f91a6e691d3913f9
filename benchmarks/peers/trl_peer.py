"""TRL's `RLOOTrainer` and `GRPOTrainer`, configured as a posterior needs it (see `benchmarks/bench_trainers.py`).

python -m benchmarks.peers.trl_peer --task job.json --json out.json
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from benchmarks.bench_trainers import text_posterior, trl_train
from benchmarks.peers import measure, truth

__all__ = ["prepared"]


def prepared(job: dict[str, Any]) -> measure.Run:
    """Return the run that trains a policy; its seconds are those of `trainer.train()`."""
    warnings.simplefilter("ignore", FutureWarning)
    posterior = text_posterior(truth.task(job["task"]))
    trainer, _, rate = job["method"].partition(" at ")

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        steps = 2 if small else job["steps"]
        folder = Path(job["out"]) / str(seed)
        trl_train(
            trainer,
            posterior,
            folder,
            seed=seed,
            num_steps=steps,
            lora=False,
            batch=job["num"],
            learning_rate=float(rate),
            clock=clock,
        )
        return {"policy": str(folder / f"checkpoint-{steps}")}

    return run


if __name__ == "__main__":
    measure.main(prepared, ("trl", "transformers", "datasets"))
