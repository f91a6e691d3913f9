"""What this package does: decoding, importance sampling, SMC and SVI.

python -m benchmarks.peers.ours --task job.json --json out.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode
from benchmarks.peers import measure, truth

__all__ = ["prepared"]


def prepared(job: dict[str, Any]) -> measure.Run:
    """Return the run of a job: "sample", an algorithm's log Z-hat, or a training."""
    return {"sampling": _sampling, "evidence": _evidence, "tuning": _tuning}[job["kind"]](job)


def _sampling(job: dict[str, Any]) -> measure.Run:
    lm = bk.TorchLM.from_pretrained(job["model"], eos_token_id=())

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        num, length = (2, 4) if small else (job["num"], job["tokens"])
        with clock:
            drawn = decode((lm,), job["prompts"], num, length, np.random.default_rng(seed))
        return {"tokens": int(drawn.tokens.size)}

    return run


def _algorithm(method: str, num: int) -> bk.Algorithm:
    if method == "IS":
        return bk.ImportanceSampling(num)
    if method == "SMC, twisted":  # the prior without what the constraint forbids, one token ahead
        return bk.SMC(num, proposal="twisted", twist=truth.forbidden_twist)
    return bk.SMC(num)


def _evidence(job: dict[str, Any]) -> measure.Run:
    posterior = truth.task(job["task"])

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        algorithm = _algorithm(job["method"], 4 if small else job["num"])
        with clock:
            try:
                draws = algorithm.run(posterior, seed=seed)
            except bk.BudgetError as error:  # all weights are 0, and so is Z-hat
                draws = error.draws
        return {"log_evidence": float(draws.log_evidence[0])}

    return run


def _tuning(job: dict[str, Any]) -> measure.Run:
    posterior = truth.task(job["task"])
    optimizer = {"SVI": "adam", "SVI, natural": "natural"}[job["method"]]

    def run(seed: int, clock: measure.Clock, small: bool) -> dict[str, Any]:
        steps = 2 if small else job["steps"]
        with clock:
            fit = bk.SVI(steps, job["num"], optimizer=optimizer).fit(posterior, seed=seed)
        return {"policy": str(fit.save(Path(job["out"]) / str(seed)))}

    return run


if __name__ == "__main__":
    measure.main(prepared, ("bayes_klrl", "transformers"))
