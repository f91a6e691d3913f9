"""Go et al. (2023), f-DPG: the objectives along a training, reward against diversity.

Their claim: no divergence is best for everything, the Jensen-Shannon divergence has a good balance of alignment and
diversity, and the reverse KL aligns fastest with the least diversity, its entropy falling below the target's before it
recovers. Here `bk.SVI` trains a tiny GPT-2 on each objective, and a callback enumerates E_q[r], the entropy and the
KLs every few steps. The price of a reward is the gap KL(q || p0) - K(b*) to the frontier: 0 for the least KL at which
that reward can be earned (theory.md 1.7).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import bayes_klrl as bk
from bayes_klrl.problems import gpt2_task
from bayes_klrl.typing import FloatArray, LanguageModel
from benchmarks.papers.record import Cell, Claim, Interval, Paper, Table, interval
from benchmarks.papers.truth import EnumeratedTruth, entropy, kl

__all__ = ["OBJECTIVES", "Path", "study", "train"]

OBJECTIVES = {"reverse KL": "elbo", "forward KL": "forward_kl", "JS": "js", "TV": "tv"}
_SHARES = (0.5, 0.75, 0.9)  # of the way from the prior's reward to the posterior's


@dataclass(eq=False)
class Path:
    """A callback that enumerates the guide every few steps: what a training passes through.

    Parameters
    ----------
    truth
        The enumerated posterior.
    every
        Number of steps between two enumerations.
    points
        (step, E_q[r], KL(q || p0), gap, entropy, KL(q || p*), KL(p* || q)) of each enumeration.
    """

    truth: EnumeratedTruth
    every: int
    points: list[tuple[float, ...]] = field(default_factory=list)

    def __call__(self, record: bk.StepRecord, guide: LanguageModel) -> None:
        """Enumerate the guide, if it is time."""
        if (record.step + 1) % self.every == 0:
            self.note(record.step + 1, self.truth.log_probs(guide))

    def note(self, step: int, log_q: FloatArray) -> None:
        """Add a point."""
        truth = self.truth
        reward, away = truth.mean_reward(log_q), kl(log_q, truth.log_prior)
        both = kl(log_q, truth.log_posterior), kl(truth.log_posterior, log_q)
        self.points.append((step, reward, away, away - truth.frontier_kl(reward), entropy(log_q), *both))

    @property
    def array(self) -> FloatArray:
        """The points, shape (points, 7)."""
        return np.array(self.points)


def train(truth: EnumeratedTruth, objective: str, steps: int, draws: int, every: int, seed: int) -> FloatArray:
    """Return the points that a training passes through, the prior first, shape (points, 7)."""
    path = Path(truth, every)
    path.note(0, truth.log_prior)
    bk.SVI(steps, draws, objective=objective).fit(truth.posterior, seed=seed, callbacks=[path])
    return path.array


def study(*, num_seeds: int = 5, tiny: bool = False) -> Paper:
    """Return the study."""
    steps, draws, every = (4, 32, 2) if tiny else (60, 256, 5)
    tables: list[Table] = []
    paths: dict[str, dict[str, FloatArray]] = {}
    least_of_ends: dict[str, float] = {}
    for name in ("gpt2-8x4",) if tiny else ("gpt2-8x4", "gpt2-8x4-sharp"):
        truth = EnumeratedTruth.of(gpt2_task(name))
        least_of_ends[name] = min(entropy(truth.log_prior), entropy(truth.log_posterior))
        paths[name] = {
            label: np.stack([train(truth, objective, steps, draws, every, seed) for seed in range(num_seeds)])
            for label, objective in OBJECTIVES.items()
        }
        tables += _tables(name, truth, paths[name])
    return Paper(
        "go2023",
        "Go et al. 2023, Aligning language models with preferences through f-divergence minimization",
        f"{len(paths)} tiny GPT-2 posteriors, {steps} steps of {draws} completions, enumerated every {every} steps.",
        _claims(paths, least_of_ends),
        tuple(tables),
        num_seeds,
    )


def _tables(name: str, truth: EnumeratedTruth, paths: dict[str, FloatArray]) -> list[Table]:
    """Return the table of the end of the training, and that of the way there."""
    p = truth.log_posterior
    own = (truth.mean_reward(p), kl(p, truth.log_prior), 0.0, entropy(p))
    first = (truth.mean_reward(truth.log_prior), 0.0, 0.0, entropy(truth.log_prior))
    end: list[tuple[Cell, ...]] = [
        (label, *(round(value, 3) for value in law), "-", "-")
        for label, law in (("(the prior)", first), ("(the posterior)", own))
    ]
    for label, path in paths.items():
        end.append((label, *(interval(path[:, -1, column]) for column in (1, 2, 3, 4)), *_mean_and_least(path)))
    start, goal = first[0], own[0]
    way = [
        (label, *(_gap_at(path, start + share * (goal - start)) for share in _SHARES), _steps_to(path, start, goal))
        for label, path in paths.items()
    ]
    return [
        Table(
            f"{name}: the end of the training",
            ("objective", "E_q[r]", "KL(q || p0)", "gap", "entropy", "mean gap on the way", "least entropy"),
            tuple(end),
        ),
        Table(
            f"{name}: the gap (nats paid beyond the price of the reward) on the way, at equal shares of the reward",
            ("objective", *(f"{share:.0%}" for share in _SHARES), "steps to 90%"),
            tuple(way),
        ),
    ]


def _mean_and_least(path: FloatArray) -> tuple[Interval, Interval]:
    """Return the mean gap over the training, and the least entropy on it."""
    return interval(path[:, :, 3].mean(axis=1)), interval(path[:, :, 4].min(axis=1))


def _gap_at(path: FloatArray, reward: float) -> Cell:
    """Return the gap where the reward is first reached, linear between the enumerations; "-" unless all seeds reach it."""
    gaps = []
    for points in path:
        after = np.flatnonzero(points[:, 1] >= reward)
        if not after.size or after[0] == 0:
            return "-"
        before, now = points[after[0] - 1], points[after[0]]
        share = (reward - before[1]) / (now[1] - before[1])
        gaps.append(before[3] + share * (now[3] - before[3]))
    return interval(gaps)


def _steps_to(path: FloatArray, start: float, goal: float) -> Cell:
    """Return the step of the first enumeration that has 90 % of the reward; "-" unless all seeds have it."""
    reached = path[:, :, 1] >= start + 0.9 * (goal - start)
    return interval(path[0, reached.argmax(axis=1), 0]) if reached.any(axis=1).all() else "-"


def _claims(paths: dict[str, dict[str, FloatArray]], floor: dict[str, float]) -> tuple[Claim, ...]:
    """Return the verdicts on the trade-off, on speed and on the collapse of the entropy."""
    gap = {name: {label: path[:, :, 3].mean() for label, path in of.items()} for name, of in paths.items()}
    end = {name: {label: path[:, -1, 3].mean() for label, path in of.items()} for name, of in paths.items()}
    best = {name: min(of, key=lambda label: float(of[label])) for name, of in gap.items()}
    best_end = {name: min(of, key=lambda label: float(of[label])) for name, of in end.items()}
    early = {name: {label: path[:, 1, 1].mean() for label, path in of.items()} for name, of in paths.items()}
    fastest = {name: max(of, key=lambda label: float(of[label])) for name, of in early.items()}
    least = {name: float(of["reverse KL"][:, :, 4].min(axis=1).mean()) for name, of in paths.items()}
    last = {name: float(of["reverse KL"][:, -1, 4].mean()) for name, of in paths.items()}
    fell = [least[name] < floor[name] - 0.05 and last[name] > least[name] + 0.05 for name in paths]
    return (
        Claim(
            "JS has the best trade-off of alignment and diversity",
            _of([label == "JS" for label in [*best.values(), *best_end.values()]]),
            f"smallest mean gap to the frontier: {_listed(best)}; at the end: {_listed(best_end)}",
        ),
        Claim(
            "the reverse KL aligns fastest",
            _of([label == "reverse KL" for label in fastest.values()]),
            f"highest reward at the first enumeration: {_listed(fastest)}",
        ),
        Claim(
            "under the reverse KL the entropy falls below that of prior and target, and recovers",
            _of(fell),
            "; ".join(
                f"{n}: least {least[n]:.2f}, last {last[n]:.2f}, the lower of prior and target {floor[n]:.2f} nats"
                for n in paths
            ),
        ),
    )


def _of(found: list[bool]) -> str:
    return "reproduced" if all(found) else "partly" if any(found) else "not reproduced"


def _listed(best: dict[str, str]) -> str:
    return ", ".join(f"{label} ({name})" for name, label in best.items())
