"""The one table of algorithms: the tests of what all algorithms promise are parametrised by it. A new one adds a row here.

Importable without torch; `run` of what trains needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import bayes_klrl as bk

__all__ = ["DRAWING", "EVERY_REWARD", "ROWS", "Row", "named"]


@dataclass(frozen=True)
class Row:
    """One algorithm, and what it promises.

    Parameters
    ----------
    name
        The public name.
    make
        Takes N and returns the algorithm at sizes that suit a tiny posterior, N draws per prompt.
    law
        What the draws, with their weights, follow: the "posterior", a law of their "own" (best-of-n), or that of a "guide"
        which is trained and only near the posterior.
    weighted
        Whether the average of the log-weights is an estimate of the log evidence.
    has_density
        Whether `log_proposal` exists.
    needs_bounds
        Whether the reward must declare bounds.
    prefixes
        Whether N = 2000 begins with the draws of N = 1000.
    """

    name: str
    make: Callable[[int], bk.Algorithm]
    law: Literal["posterior", "own", "guide"] = "posterior"
    weighted: bool = False
    has_density: bool = False
    needs_bounds: bool = False
    prefixes: bool = False

    @property
    def trains(self) -> bool:
        """Whether a guide is trained, which needs torch and takes longer."""
        return self.law == "guide"


ROWS = (
    Row("Exact", lambda num: bk.Exact(num_draws=num), has_density=True),
    Row("ImportanceSampling", bk.ImportanceSampling, weighted=True, has_density=True, prefixes=True),
    Row("RejectionSampling", bk.RejectionSampling, needs_bounds=True, prefixes=True),
    Row("QuasiRejection", lambda num: bk.QuasiRejection(num, bound=3.0, max_proposals=10**6), prefixes=True),
    Row("BestOfN", lambda num: bk.BestOfN(3, num), law="own", prefixes=True),
    Row("SMC", bk.SMC, weighted=True, has_density=True),
    Row("AnnealedSMC", lambda num: bk.AnnealedSMC(num, num_pilot=16), weighted=True),
    Row("SuffixMH", lambda num: bk.SuffixMH(2, num // 2, num_warmup=30)),
    Row("SVI", lambda num: bk.SVI(3, num_particles=8, num_draws=num), law="guide", has_density=True),
    Row(
        "BayesianSVI",
        lambda num: bk.BayesianSVI(3, num_particles=8, parameters="all", num_predictive=3, num_draws=num),
        law="guide",
        has_density=True,
    ),
)

DRAWING = tuple(row for row in ROWS if not row.trains)
"""Those that train nothing."""

EVERY_REWARD = tuple(row for row in DRAWING if not row.needs_bounds)
"""Those of them that take a reward without bounds."""


def named(rows: tuple[Row, ...], num: int) -> dict[str, bk.Algorithm]:
    """The algorithms of some rows by name, N = `num` draws per prompt."""
    return {row.name: row.make(num) for row in rows}
