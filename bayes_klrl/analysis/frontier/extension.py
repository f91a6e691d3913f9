"""A frontier beyond the reach of its draws, by annealing: several runs of an algorithm that reports its path.

Annealed SMC passes p_s(x) prop. to p0(x) exp(s r(x) / alpha) for 0 = s_0 < ... < s_m = 1 and leaves log Z(s) and E[r] of
all in `Draws.info` (theory.md 7.6): points of the frontier at b = s / alpha. Runs are independent and weigh Z-hat each,
as draws do in `path`, whose influence functions give the errors: Z-hat is averaged, not its log, and E[r] loses the
bias that it has in every single run.
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.analysis.frontier.path_points import PathPoints
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import stream_seed
from bayes_klrl.typing import Algorithm, FloatArray
from bayes_klrl.weights import logmeanexp, normalised

__all__ = ["NUM_RUNS", "annealed_points", "posterior_at"]

NUM_RUNS = 8
_STUDENT = 2.365 / 1.960  # 97.5 % points of t with 7 degrees of freedom and of the normal, so that intervals are right
_MOST_NODES = 200
_KEYS = ("schedule", "path_log_evidence", "path_reward")


def posterior_at(posterior: Posterior, alpha: float) -> Posterior:
    """Return the same posterior at another alpha; constraints are untouched."""
    return Posterior(
        posterior.prior,
        posterior.likelihood ** (posterior.alpha / alpha),
        prompts=posterior.prompts,
        max_new_tokens=posterior.max_new_tokens,
        **posterior.columns,
    )


def annealed_points(
    posterior: Posterior, algorithm: Algorithm, alpha: float, *, seed: int, progress: bool = False
) -> PathPoints:
    """Return points of the path from the prior to `alpha`, by `NUM_RUNS` runs of an algorithm such as `AnnealedSMC`.

    Raises
    ------
    BayesKLRLError
        If the algorithm's draws do not report the path (`Draws.info`).
    """
    colder = posterior_at(posterior, alpha)
    runs = []
    for run in range(NUM_RUNS):
        draws = algorithm.run(colder, seed=stream_seed(seed, run, "frontier extension"), progress=progress)
        if missing := [key for key in _KEYS if key not in draws.info]:
            raise BayesKLRLError(
                f"extend needs an algorithm that reports its path, such as bk.AnnealedSMC; {type(algorithm).__name__} "
                f"has no {missing} in its draws' info."
            )
        runs.append(draws)
    # A product of different alphas stays at alpha = 1 when tempered, and its reward changes instead: r / alpha is one.
    scale = alpha / colder.alpha
    nodes = _nodes(runs) / alpha
    at = [_on(nodes, draws, alpha, scale) for draws in runs]
    log_evidence = np.stack([each["log_evidence"] for each in at], axis=-1)  # (P, M, runs)
    each_reward = np.stack([each["reward"] for each in at], axis=-1)
    share = NUM_RUNS * normalised(log_evidence)
    reward = (share * each_reward).mean(axis=-1)
    f_evidence, f_reward = share - 1.0, share * (each_reward - reward[..., None])
    f_kl = nodes[:, None] * f_reward - f_evidence
    se = {"log_evidence": _error(f_evidence), "reward": _error(f_reward), "kl": _error(f_kl)}
    # every run was interpolated between its own temperatures, all of them in the same direction
    se = {name: np.hypot(error, np.mean([each[f"{name}_gap"] for each in at], axis=0)) for name, error in se.items()}
    return PathPoints(nodes, logmeanexp(log_evidence), reward, se["log_evidence"], se["reward"], se["kl"])


def _nodes(runs: list[Draws]) -> FloatArray:
    """Return common temperatures s from 0 to 1, (M,): those of all prompts and runs, thinned."""
    every = np.unique(np.concatenate([np.ravel(draws.info["schedule"]) for draws in runs]))
    kept = np.unique(np.linspace(0, every.size - 1, min(every.size, _MOST_NODES)).round().astype(int))
    result: FloatArray = every[kept]
    return result


def _on(nodes: FloatArray, draws: Draws, alpha: float, scale: float) -> dict[str, FloatArray]:
    """Return one run at common nodes, (P, M) by name; schedules differ between prompts and are padded with s = 1."""
    rows = []
    for schedule, log_z, reward in zip(*(draws.info[key] for key in _KEYS), strict=True):
        s, first = np.unique(schedule, return_index=True)
        rows.append(PathPoints(s / alpha, log_z[first], scale * reward[first]).at(nodes))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _error(influence: FloatArray) -> FloatArray:
    """Return the standard error that influence functions of the runs, the last axis, give: as large as so few demand."""
    variance = np.square(influence).sum(axis=-1) / (NUM_RUNS * (NUM_RUNS - 1))
    result: FloatArray = _STUDENT * np.sqrt(variance)
    return result
