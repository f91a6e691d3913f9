"""disco's `DPGTuner`: a policy tuned towards prior x exp(log-likelihood) by the gradient of the forward KL.

    python -m benchmarks.peers.disco_peer --task job.json --json out.json

disco 1.0.0 runs on Python 3.8 to 3.10 with a transformers of its time, so this file needs nothing of bayes_klrl. Its licence
forbids commercial use. Only its documented interface is called here.
"""

from __future__ import annotations

from typing import Any

import torch
from disco.distributions import LMDistribution
from disco.scorers import ExponentialScorer, Scorer
from disco.tuners import DPGTuner

from benchmarks.peers import measure

__all__ = ["prepared"]


def prepared(job: dict[str, Any]) -> measure.Run:
    """Return the run that tunes a policy; its seconds are those of `tuner.tune()`."""
    table, eos = job["log_likelihood"], job["eos"]

    def log_likelihood(sample: Any, _context: Any) -> float:
        ids = sample.token_ids.tolist()
        length = ids.index(eos) + 1 if eos in ids else len(ids)
        return float(table[" ".join(map(str, ids[:length]))])

    rate = float(job["method"].partition(" at ")[2])

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        torch.manual_seed(seed)
        folder, length = job["model"], job["tokens"]
        base = LMDistribution(folder, folder, length=length)
        model = LMDistribution(folder, folder, length=length, freeze=False)
        target = base * ExponentialScorer([Scorer(log_likelihood)], [1.0])
        tuner = DPGTuner(
            model,
            target,
            context=job["texts"][0],
            learning_rate=rate,
            n_gradient_steps=2 if small else job["steps"],
            n_samples_per_step=job["num"],
            sampling_size=job["num"],
            scoring_size=job["num"],
        )
        with clock:
            tuner.tune()
        policy = f"{job['out']}/{seed}"
        model.network.save_pretrained(policy)
        return {"policy": policy}

    return run


if __name__ == "__main__":
    measure.main(prepared, ("disco-generation", "transformers"))
