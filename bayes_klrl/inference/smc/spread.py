"""Independent runs of a prepared `SMC` as tasks for a runner, and the islands of one population merged again.

Runs that bound log Z and islands (Verge et al. 2015) are both populations that never meet, each with random numbers of its own
number. They are put into tasks of about as many particles as is worth a worker's while, whatever the runner is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayes_klrl.draws import Cost
from bayes_klrl.inference.smc.outcome import Outcome
from bayes_klrl.inference.smc.runs import EvidenceRuns, Grown, Prepared, evidence_runs, grown
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import Streams
from bayes_klrl.runners.runner import Runner, Task, values_of
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray

__all__ = ["Islands", "grown_islands", "spread_evidence_runs"]

_ROWS_PER_TASK = 1024  # about how many particles, over all prompts, one task grows


@dataclass(frozen=True, eq=False)
class Islands:
    """The islands of all prompts as one population per prompt, and the log Z-hat of each.

    Parameters
    ----------
    grown
        The merged particles, (P, M * N), island by island, with weights that hold the accumulated evidence of their islands.
    log_evidence
        log Z-hat of each island, (P, M). The mean of the Z-hats is that of the merged population.
    """

    grown: Grown
    log_evidence: FloatArray


def spread_evidence_runs(
    runner: Runner,
    ready: Prepared,
    posterior: Posterior,
    num_runs: int,
    retained: Sequences | None,
    streams: Streams,
    training: Cost,
    progress: bool,
) -> EvidenceRuns:
    """Return log Z-hat of M runs, as `evidence_runs` does, from the runner's workers."""
    firsts, sizes = _parts(num_runs, posterior.num_prompts * ready.num_particles)
    tasks = []
    for first, num in zip(firsts, sizes, strict=True):
        runs = slice(first, first + num)
        part = None if retained is None else Sequences(retained.tokens[:, runs], retained.lengths[:, runs])
        arguments = (ready, posterior, num, part, streams, first)
        tasks.append(Task("SMC", _evidence_of_part, arguments, (posterior, posterior.prior)))
    found: list[EvidenceRuns] = _found(runner, tasks, "runs of SMC", progress)
    log_evidence = np.concatenate([each.log_evidence for each in found], axis=1)
    return EvidenceRuns(log_evidence, sum((each.cost for each in found), training))


def _evidence_of_part(
    ready: Prepared,
    posterior: Posterior,
    num_runs: int,
    retained: Sequences | None,
    streams: Streams,
    first_run: int,
    *,
    progress: bool,
) -> EvidenceRuns:
    """Return log Z-hat of the runs of one task."""
    return evidence_runs(ready, posterior, num_runs, retained, streams, Cost(), progress, first_run=first_run)


def grown_islands(
    runner: Runner, ready: Prepared, posterior: Posterior, num_islands: int, streams: Streams, progress: bool
) -> Islands:
    """Return M independent populations per prompt, merged; with one island the population is as `grown` returns it."""
    firsts, sizes = _parts(num_islands, posterior.num_prompts * ready.num_particles)
    shared = (posterior, posterior.prior)
    tasks = [
        Task("SMC", _grown_part, (ready, posterior, num, streams, first), shared)
        for first, num in zip(firsts, sizes, strict=True)
    ]
    found: list[Grown] = _found(runner, tasks, "islands of SMC", progress)
    if num_islands == 1:
        return Islands(found[0], found[0].outcome.log_evidences(1))
    parts = [_by_island(each.outcome, num) for each, num in zip(found, sizes, strict=True)]
    outcome, log_evidence = _merged(parts)
    info = {"scoring_gap": np.max([each.info["scoring_gap"] for each in found], axis=0)} if found[0].info else {}
    return Islands(Grown(outcome, sum(each.model_tokens for each in found), info), log_evidence)


def _grown_part(
    ready: Prepared, posterior: Posterior, num_islands: int, streams: Streams, first: int, *, progress: bool
) -> Grown:
    """Return the islands of one task."""
    return grown(ready, posterior, num_islands, None, streams, progress, first_run=first)


def _found(runner: Runner, tasks: list[Task], what: str, progress: bool) -> list[Any]:
    """Return what the tasks return; several of them have a line of the progress display together, one has its own."""
    several = len(tasks) > 1
    with track(what, len(tasks), progress and several) as advance:
        return values_of(runner, tasks, progress=progress and not several, advance=advance)


def _parts(num_runs: int, rows_per_run: int) -> tuple[list[int], list[int]]:
    """Return the first run of each task and its number of runs, as equal as can be."""
    num_tasks = min(num_runs, -(-num_runs * rows_per_run // _ROWS_PER_TASK))
    sizes = [len(part) for part in np.array_split(np.arange(num_runs), num_tasks)]
    return [sum(sizes[:place]) for place in range(num_tasks)], sizes


def _by_island(outcome: Outcome, num_islands: int) -> dict[str, np.ndarray]:
    """Return the arrays of an outcome with the axes (P, M, ...)."""
    return {name: array.reshape(-1, num_islands, *array.shape[1:]) for name, array in vars(outcome).items()}


def _merged(parts: Sequence[dict[str, np.ndarray]]) -> tuple[Outcome, FloatArray]:
    """Return all islands as one population per prompt, and log Z-hat of each island.

    The weight of a particle is its last weight times the accumulated evidence of its island, so that the mean of all M * N
    weights is the mean of the islands' Z-hats.
    """
    arrays = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    num_prompts, num_islands, num_particles = arrays["lengths"].shape
    first = num_particles * np.arange(num_islands)[:, None]  # the number of each island's first particle
    log_weights = arrays["log_weights"] + arrays["log_evidence"][..., None]
    ancestors = np.moveaxis(arrays["ancestors"] + first[:, None], 1, 2)  # (P, T, M, N)
    num_steps = ancestors.shape[1]
    with np.errstate(invalid="ignore"):
        known = np.isfinite(arrays["step_ess"])
        step_ess = np.where(known.any(axis=1), np.where(known, arrays["step_ess"], 0.0).sum(axis=1), np.nan)

    def flat(array: np.ndarray) -> np.ndarray:
        return array.reshape(num_prompts, num_islands * num_particles, *array.shape[3:])

    merged = Outcome(
        **{name: flat(arrays[name]) for name in ("tokens", "lengths", "reward", "log_prior", "log_proposal")},
        log_weights=flat(log_weights),
        log_evidence=np.zeros(num_prompts),
        family=flat(arrays["family"] + first),
        num_resampled=arrays["num_resampled"].max(axis=1),
        ancestors=ancestors.reshape(num_prompts, num_steps, -1),
        step_ess=step_ess,
    )
    log_mean = np.logaddexp.reduce(log_weights, axis=2) - np.log(num_particles)
    return merged, log_mean
