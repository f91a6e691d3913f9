"""A frontier's curves at any alpha: from the pool of draws, and past their reach from an extension.

`Frontier` adds the questions that can be asked of them; table and picture read the curves only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.analysis.frontier.best_of_n_curve import BestOfNCurve
from bayes_klrl.analysis.frontier.curves import QUANTITIES, Curves
from bayes_klrl.analysis.frontier.extension import Join, join
from bayes_klrl.analysis.frontier.path import RewardPool, curves
from bayes_klrl.analysis.frontier.path_points import PathPoints
from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.likelihood import check_nats
from bayes_klrl.typing import FloatArray

__all__ = ["FrontierRecord", "checked_alphas"]


@dataclass(frozen=True, eq=False, repr=False)
class FrontierRecord:
    """The fields of a `Frontier`, which explains each of them, and its curves at other alphas."""

    mean: Curves
    per_prompt: Curves
    cut: float
    alpha: float
    best_of_n: BestOfNCurve
    pool: RewardPool
    unseen_cut: float = float("nan")
    extension: PathPoints | None = None
    cost: Cost = field(default_factory=Cost)

    @property
    def alphas(self) -> FloatArray:
        """Units of reward per nat, falling, shape (A,)."""
        return self.mean.alphas

    @property
    def log_evidence(self) -> FloatArray:
        """The log evidence log Z, mean over prompts, shape (A,)."""
        return self.mean.log_evidence

    @property
    def reward(self) -> FloatArray:
        """E[r] of the posterior, mean over prompts, shape (A,)."""
        return self.mean.reward

    @property
    def kl(self) -> FloatArray:
        """KL of the posterior to the prior in nats, mean over prompts, shape (A,)."""
        return self.mean.kl

    @property
    def ess(self) -> FloatArray:
        """How many draws from the posterior the pool is worth, mean over prompts, shape (A,)."""
        return self.mean.ess

    @property
    def lower(self) -> dict[str, FloatArray]:
        """Lower ends of the 95 % intervals, by name, shape (A,) each."""
        return self.mean.lower

    @property
    def upper(self) -> dict[str, FloatArray]:
        """Upper ends of the 95 % intervals, by name, shape (A,) each."""
        return self.mean.upper

    @property
    def valid(self) -> Mapping[str, np.ndarray]:
        """Where the intervals can be relied on, by name, shape (A,) each; see `Curves`."""
        return self.mean.valid

    @property
    def within(self) -> np.ndarray:
        """Where the numbers are no extrapolation, shape (A,)."""
        return self.mean.within

    def at(self, alphas: ArrayLike) -> Curves:
        """Return the curves of the mean over prompts at other alphas, in the order given."""
        return self.curves_at(1.0 / np.atleast_1d(checked_alphas(alphas, self.pool.reward)))[0]

    def curves_at(self, inverse_alpha: FloatArray) -> tuple[Curves, Curves]:
        """Return the curves of the mean and of each prompt: from the pool, and below `cut` from the extension."""
        mean, per_prompt = curves(self.pool, inverse_alpha)
        if self.extension is None:
            return mean, per_prompt
        points = self.extension.at(inverse_alpha)
        points["ess"] = self._planned_ess(inverse_alpha, points["log_evidence"])
        points["ess_se"] = np.full_like(points["ess"], np.nan)
        beyond = (inverse_alpha * self.cut > 1) & np.isfinite(points["log_evidence"]).all(axis=0)
        averaged = self.extension.mean_at(inverse_alpha)
        for name in ("ess", "ess_se"):
            averaged[name] = points[name].mean(axis=0)
        relied_on = beyond if self.join is None else self.join.relies_on(inverse_alpha, averaged)
        return _joined(mean, averaged, beyond, relied_on), _joined(per_prompt, points, beyond, relied_on)

    @cached_property
    def join(self) -> Join | None:
        """How the extension goes on where the draws end; None without an extension, or if the draws have no finite cut."""
        if self.extension is None or not 0 < self.cut < np.inf or self.extension.last * self.cut < 1:
            return None
        return join(curves(self.pool, [1.0 / self.cut])[0], self.cut, self.extension)

    @property
    def notes(self) -> list[str]:
        """What is wrong with the extension, in sentences; empty if nothing is known to be."""
        if self.extension is None or self.join is None:
            return []
        cold = self.mean.inverse_alpha[self.mean.inverse_alpha * self.cut > 1]
        return self.join.notes(cold, self.extension.mean_at(cold))

    def _planned_ess(self, inverse_alpha: FloatArray, log_evidence: FloatArray) -> FloatArray:
        """Return N Z(b)^2 / Z(2b) by the extension, (P, A); NaN where it does not reach 2b, or for draws not of the prior."""
        if self.extension is None or self.pool.log_weights.any():
            return np.full(log_evidence.shape, np.nan)
        log_square = self.extension.at(2 * inverse_alpha)["log_evidence"]
        result: FloatArray = self.pool.num_draws * np.exp(2 * log_evidence - log_square)
        return result


def checked_alphas(alphas: ArrayLike, reward: FloatArray) -> FloatArray:
    """Return alphas as float64, refusing what is not positive and finite, and rewards of too many nats at one of them."""
    try:
        values = np.asarray(alphas, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty((0, 0))
    if values.ndim > 1 or not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise BayesKLRLError(f"alphas must be positive finite numbers, one or a list; got {alphas!r}.")
    check_nats(reward, float(values.min()), "the frontier's own")
    return values


def _joined(pool: Curves, points: Mapping[str, FloatArray], beyond: np.ndarray, relied_on: np.ndarray) -> Curves:
    """Return curves that are those of the points where `beyond`, (A,), says so, valid only where they are `relied_on`."""

    def join(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.where(beyond, other, own)

    values: dict[str, Any] = {name: join(getattr(pool, name), points[name]) for name in QUANTITIES}
    return replace(
        pool,
        **values,
        se={name: join(pool.se[name], points[f"{name}_se"]) for name in QUANTITIES},
        within=pool.within | beyond,
        valid={name: join(pool.valid[name], np.isfinite(points[f"{name}_se"]) & relied_on) for name in QUANTITIES},
        exposed={name: pool.exposed[name] & ~beyond for name in QUANTITIES},
    )
