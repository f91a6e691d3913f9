"""Points on the path of posteriors from another source, which continue a frontier where its draws end.

Annealed SMC gives log Z(b_j) and R(b_j) at its temperatures for free, far beyond the reach of prior draws (theory.md 3.12).
Between points R is linear and log Z the cubic with R as its slope (d log Z / db = R), so that K = b R - log Z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray

__all__ = ["PathPoints"]


@dataclass(frozen=True, eq=False)
class PathPoints:
    """log Z, R and their standard errors at M inverse temperatures of each of P prompts.

    Parameters
    ----------
    inverse_alpha
        b = 1 / alpha >= 0 in increasing order, shape (M,) or, where prompts differ, (P, M).
    log_evidence, reward
        log Z(b) and R(b), shape (P, M), or (M,) for one prompt.
    log_evidence_se, reward_se, kl_se
        Standard errors, same shape; None: unknown, and intervals are then NaN.
    num_particles
        How many particles each run had that these points come from; None: they are not from runs. A frontier does not rely on
        the errors of runs that are too small.

    Raises
    ------
    BayesKLRLError
        If shapes do not fit, there are fewer than two points, numbers are not finite, or temperatures are out of order.

    Examples
    --------
    >>> b = np.linspace(0, 2, 5)                                          # Gaussian reward: log Z = b^2 / 2, R = b
    >>> PathPoints(b, b**2 / 2, b).at(np.array([1.1]))["kl"].round(6)     # and K = b^2 / 2
    array([[0.605]])
    """

    inverse_alpha: FloatArray
    log_evidence: FloatArray
    reward: FloatArray
    log_evidence_se: FloatArray | None = None
    reward_se: FloatArray | None = None
    kl_se: FloatArray | None = None
    num_particles: int | None = None

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = np.atleast_2d(self.log_evidence).shape
        for name in ("inverse_alpha", "log_evidence", "reward", "log_evidence_se", "reward_se", "kl_se"):
            given = getattr(self, name)
            if given is None:
                array = np.full(shape, np.nan)
            else:
                array = np.atleast_2d(np.asarray(given, dtype=np.float64))
                array = np.broadcast_to(array, shape) if name == "inverse_alpha" and len(array) == 1 else array
                if array.shape != shape or shape[1] < 2 or not np.isfinite(array).all():
                    raise BayesKLRLError(
                        f"{name} of path points must be finite, of shape (P, M) with at least M = 2; got shape {array.shape}, "
                        f"where log_evidence has {shape}."
                    )
            object.__setattr__(self, name, array)
        if (self.inverse_alpha[:, 0] < 0).any() or (np.diff(self.inverse_alpha, axis=1) <= 0).any():
            raise BayesKLRLError("inverse_alpha of path points must increase from a number of at least 0.")

    @property
    def first(self) -> float:
        """The least b that the points of every prompt cover."""
        return float(self.inverse_alpha[:, 0].max())

    @property
    def last(self) -> float:
        """The largest b that the points of every prompt cover."""
        return float(self.inverse_alpha[:, -1].min())

    def at(self, inverse_alpha: FloatArray) -> dict[str, FloatArray]:
        """Return log_evidence, reward, kl and their se (`log_evidence_se`, ...) at other b, (P, A); NaN outside the points.

        The se has in it how far interpolation may be off (`log_evidence_gap`, ...).

        Parameters
        ----------
        inverse_alpha
            b, shape (A,).
        """
        rows = [self._row(p, np.asarray(inverse_alpha, dtype=np.float64)) for p in range(len(self.log_evidence))]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, p: int, b: FloatArray) -> dict[str, FloatArray]:
        """Return what `at` does for one prompt."""
        nodes, log_z, r = self.inverse_alpha[p], self.log_evidence[p], self.reward[p]
        left = np.clip(np.searchsorted(nodes, b, side="right") - 1, 0, nodes.size - 2)
        step = nodes[left + 1] - nodes[left]
        s = (b - nodes[left]) / step
        inside = (b >= nodes[0]) & (b <= nodes[-1])
        cubic = (
            (1 + 2 * s) * (1 - s) ** 2 * log_z[left]
            + s**2 * (3 - 2 * s) * log_z[left + 1]
            + step * s * (1 - s) * ((1 - s) * r[left] - s * r[left + 1])
        )
        linear = (1 - s) * r[left] + s * r[left + 1]
        values = {"log_evidence": cubic, "reward": linear, "kl": b * linear - cubic}
        # R is between nodes what the slope of the cubic says as much as what the line says: where a step is so large that
        # they differ, neither is known better than that
        chord = (log_z[left + 1] - log_z[left]) / step
        gap = 6 * s * (1 - s) * np.abs(chord - (r[left] + r[left + 1]) / 2)
        gaps = {"reward": gap, "log_evidence": step * s * (1 - s) * gap}
        gaps["kl"] = b * gap + gaps["log_evidence"]
        for name, size in gaps.items():
            values[f"{name}_gap"] = size
            values[f"{name}_se"] = np.hypot(np.interp(b, nodes, getattr(self, f"{name}_se")[p]), size)
        return {name: np.where(inside, value, np.nan) for name, value in values.items()}

    def mean_at(self, inverse_alpha: FloatArray) -> dict[str, FloatArray]:
        """Return what `at` does, for the mean over prompts, (A,)."""
        points = self.at(inverse_alpha)
        averaged = {name: array.mean(axis=0) for name, array in points.items() if not name.endswith("_se")}
        for name in ("log_evidence", "reward", "kl"):
            averaged[f"{name}_se"] = np.sqrt(np.square(points[f"{name}_se"]).sum(axis=0)) / len(self.reward)
        return averaged
