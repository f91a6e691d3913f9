"""A frontier beyond the reach of its draws, by annealing, and whether it goes on there as it must.

Annealed SMC passes p_s(x) prop. to p0(x) exp(s r(x) / alpha) for 0 = s_0 < ... < s_m = 1 and leaves log Z(s) and E[r] of
all in `Draws.info` (theory.md 7.6): points of the frontier at b = s / alpha. Runs are independent and weigh Z-hat each,
as draws do in `path`, whose influence functions give the errors: Z-hat is averaged, not its log, and E[r] loses the
bias that it has in every single run.

Runs that are too small miss the best completions all alike: they then agree with each other, and are wrong together. At the
cut draws can contradict them, and E[r] and KL must rise as alpha falls, whatever the posterior is (theory.md 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bayes_klrl.analysis.frontier.curves import Curves
from bayes_klrl.analysis.frontier.path_points import PathPoints
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import stream_seed
from bayes_klrl.typing import Algorithm, FloatArray
from bayes_klrl.weights import logmeanexp, normalised

__all__ = ["MIN_PARTICLES", "NUM_RUNS", "Join", "annealed_points", "join", "posterior_at"]

NUM_RUNS = 8
_STUDENT = 2.365 / 1.960  # 97.5 % points of t with 7 degrees of freedom and of the normal, so that intervals are right
_MOST_NODES = 200
MIN_PARTICLES = 256  # of each run; smaller ones have come out several of their errors too low on a language model
_MOST_ERRORS = 2.0  # by which draws and extension may differ at the cut
_SCATTER = {"log_evidence": 1.0, "reward": 1.25, "kl": 1.25}  # of draws at an ESS of 100, in units of their own errors
_QUANTITIES = {"log_evidence": "log Z", "reward": "E[r]", "kl": "KL"}
_KEYS = ("schedule", "path_log_evidence", "path_reward")


@dataclass(frozen=True, eq=False)
class Join:
    """How an extension goes on where the draws end, means over prompts.

    Parameters
    ----------
    alpha
        The cut, at which both are known.
    draws, extension
        log Z, E[r] and KL there by each of them, by name.
    z
        The extension's less the draws', in standard errors of both together, by name; NaN for points without errors. At the
        cut the draws' E[r] and KL scatter by about 1.25 of their own standard errors, and are given that.
    inverse_alpha, least
        The points b past the cut, shape (M,), and the least that E[r] and KL may be from each of them on, (M,) by name:
        what they were at a larger alpha, less the standard error.
    num_particles
        Particles of each run of the extension; None: it has no runs.
    """

    alpha: float
    draws: Mapping[str, float]
    extension: Mapping[str, float]
    z: Mapping[str, float]
    inverse_alpha: FloatArray
    least: Mapping[str, FloatArray]
    num_particles: int | None

    @property
    def agrees(self) -> bool:
        """Whether no quantity differs by more than two standard errors at the cut."""
        return not any(abs(z) > _MOST_ERRORS for z in self.z.values())

    @property
    def is_large_enough(self) -> bool:
        """Whether the runs have 256 particles or more, if the points are from runs."""
        return self.num_particles is None or self.num_particles >= MIN_PARTICLES

    def falls(self, inverse_alpha: FloatArray, points: Mapping[str, FloatArray]) -> np.ndarray:
        """Return where means of the extension lie below E[r] or KL of a larger alpha by more than an error, shape (A,)."""
        at = np.searchsorted(self.inverse_alpha, inverse_alpha, side="right") - 1
        result = np.zeros(inverse_alpha.shape, dtype=bool)
        for name, least in self.least.items():
            result |= (at >= 0) & (points[name] < least[np.maximum(at, 0)])
        return result

    def relies_on(self, inverse_alpha: FloatArray, points: Mapping[str, FloatArray]) -> np.ndarray:
        """Return where intervals of the extension can be relied on, as far as the join can tell, shape (A,)."""
        return ~self.falls(inverse_alpha, points) & (self.agrees and self.is_large_enough)

    def notes(self, inverse_alpha: FloatArray, points: Mapping[str, FloatArray]) -> list[str]:
        """Return what is wrong with the extension at some alphas, in sentences."""
        found = []
        if not self.is_large_enough:
            found.append(
                f"note: the extension's runs have {self.num_particles} particles each. Runs of fewer than {MIN_PARTICLES} can "
                "all miss the same completions: none of its intervals is called reliable. Take bk.AnnealedSMC(256) or more."
            )
        if not self.agrees:
            worst = max(self.z, key=lambda name: abs(self.z[name]))
            found.append(
                f"note: the extension does not meet the draws at alpha = {self.alpha:.4g}: {_QUANTITIES[worst]} is "
                f"{self.extension[worst]:.3f} by the extension and {self.draws[worst]:.3f} by the draws, "
                f"{abs(self.z[worst]):.1f} standard errors apart. None of its intervals is reliable. Take more particles or "
                "draws."
            )
        if (falls := self.falls(inverse_alpha, points)).any():
            colder, warmer = 1 / inverse_alpha[falls].max(), 1 / inverse_alpha[falls].min()
            where = f"at alpha = {colder:.4g}" if colder == warmer else f"between alpha = {warmer:.4g} and {colder:.4g}"
            found.append(
                f"note: E[r] or KL of the extension goes back {where} as alpha falls, which no true curve does. These "
                "intervals are not reliable. Take more particles or draws."
            )
        return found


def join(at_cut: Curves, cut: float, points: PathPoints) -> Join:
    """Return how points go on where draws end.

    Parameters
    ----------
    at_cut
        The draws' curves at the cut, mean over prompts, one alpha.
    cut
        The cut, positive and finite.
    points
        The extension, which reaches the cut.
    """
    start = 1.0 / cut
    nodes = np.unique(points.inverse_alpha)
    nodes = np.append(start, nodes[(nodes > start) & (nodes <= points.last)])
    path = points.mean_at(nodes)
    draws = {name: float(getattr(at_cut, name)[0]) for name in _QUANTITIES}
    extension = {name: float(path[name][0]) for name in _QUANTITIES}
    errors = {name: float(np.hypot(_SCATTER[name] * at_cut.se[name][0], path[f"{name}_se"][0])) for name in _QUANTITIES}
    z = {name: (extension[name] - draws[name]) / errors[name] for name in _QUANTITIES}
    least = {}
    for name in ("reward", "kl"):
        known = np.append(draws[name] - errors[name], path[name][1:] - path[f"{name}_se"][1:])
        least[name] = np.maximum.accumulate(np.where(np.isnan(known), -np.inf, known))
    return Join(cut, draws, extension, z, nodes, least, points.num_particles)


def posterior_at(posterior: Posterior, alpha: float) -> Posterior:
    """Return the same posterior at another alpha; constraints are untouched."""
    return posterior.with_likelihood(posterior.likelihood ** (posterior.alpha / alpha))


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
    return PathPoints(
        nodes,
        logmeanexp(log_evidence),
        reward,
        se["log_evidence"],
        se["reward"],
        se["kl"],
        num_particles=min(draws.log_weights.shape[1] for draws in runs),
    )


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
