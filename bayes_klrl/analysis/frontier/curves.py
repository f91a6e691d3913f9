"""Numbers along the path of posteriors, with their intervals and where these can be relied on, and how they print.

`path` computes them from draws; `record` joins them with those of an extension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bayes_klrl.typing import FloatArray

__all__ = ["HEADINGS", "LEVEL", "NORMAL_QUANTILE", "QUANTITIES", "Curves", "cells", "legend", "row_text"]

QUANTITIES = ("log_evidence", "reward", "kl", "ess")
LEVEL = 0.95  # of every interval
NORMAL_QUANTILE = 1.959963984540054  # of `LEVEL`, two-sided
HEADINGS = f"{'alpha':>12}{'log evidence':>20}{'reward':>20}{'KL to prior':>20}{'ESS':>10}"


@dataclass(frozen=True, eq=False, repr=False)
class Curves:
    """log Z, R, K and ESS at A inverse temperatures, with what is known of their errors; arrays (A,) or (P, A).

    `print` shows one line per alpha.

    Parameters
    ----------
    inverse_alpha
        b = 1 / alpha, shape (A,).
    log_evidence, reward, kl, ess
        The estimates; K is the KL to the prior, in nats.
    se
        Standard errors of the estimates, by name.
    within
        True where the draws reach: ESS >= 100 for every prompt, and so K < log N - 4.6. Elsewhere all is extrapolation.
    valid
        True where an interval can be relied on, by name: `within` is true, the error rests on 50 draws or more, the bias is
        below a quarter of the standard error, and it is not `exposed`. This is judged from the same draws: pools whose tail
        came out short pass more easily, so near the edge intervals cover less often than they claim.
    exposed
        True where completions that no draw has shown, but that the declared bounds of the reward allow, could move an estimate
        out of its interval, by name. False everywhere if no bounds are declared: then nobody can tell.

    Examples
    --------
    >>> one, known = np.ones(1), np.ones(1, dtype=bool)
    >>> se = {"log_evidence": 0.01 * one, "reward": 0.02 * one, "kl": 0.03 * one, "ess": 90 * one}
    >>> yes, no = dict.fromkeys(se, known), dict.fromkeys(se, ~known)
    >>> print(Curves(2 * one, 0.7 * one, 0.6 * one, 0.5 * one, 1000 * one, se, within=known, valid=yes, exposed=no))
           alpha        log evidence              reward         KL to prior       ESS
             0.5       0.700 ± 0.020       0.600 ± 0.039       0.500 ± 0.059     1,000
    ±: 95% interval
    """

    inverse_alpha: FloatArray
    log_evidence: FloatArray
    reward: FloatArray
    kl: FloatArray
    ess: FloatArray
    se: Mapping[str, FloatArray]
    within: np.ndarray
    valid: Mapping[str, np.ndarray]
    exposed: Mapping[str, np.ndarray]

    @property
    def alphas(self) -> FloatArray:
        """Units of reward per nat, shape (A,)."""
        with np.errstate(divide="ignore"):
            result: FloatArray = 1.0 / self.inverse_alpha
        return result

    @property
    def lower(self) -> dict[str, FloatArray]:
        """Lower ends of the 95 % intervals, by name; on the log scale for ESS, not below 0 for KL."""
        return {name: self._end(name, -1) for name in QUANTITIES}

    @property
    def upper(self) -> dict[str, FloatArray]:
        """Upper ends of the 95 % intervals, by name."""
        return {name: self._end(name, 1) for name in QUANTITIES}

    def _end(self, name: str, sign: int) -> FloatArray:
        """Return one end of the interval of a quantity."""
        value: FloatArray = getattr(self, name)
        half = sign * NORMAL_QUANTILE * self.se[name]
        if name == "ess":
            with np.errstate(over="ignore"):
                return value * np.exp(half / value)
        return np.maximum(value + half, 0.0) if name == "kl" else value + half

    def __repr__(self) -> str:
        if self.inverse_alpha.shape == self.reward.shape:
            return str(self)
        return f"Curves({self.reward.shape[0]} prompts x {self.reward.shape[1]} alphas)"

    def __str__(self) -> str:
        if self.inverse_alpha.shape != self.reward.shape:
            return repr(self)
        rows = range(self.inverse_alpha.size)
        return "\n".join([HEADINGS, *(row_text(self, a) for a in rows), legend(self, rows)])


def cells(curves: Curves, a: int) -> list[str]:
    """Return the numbers at one alpha: log evidence, reward and KL with their intervals, and ESS.

    An extrapolation gets no interval: the error of draws that do not reach so far is no bound on how far off they are.
    """
    result = []
    for name in QUANTITIES[:3]:
        half = (curves.upper[name][a] - curves.lower[name][a]) / 2
        shown = f"± {half:.3f}" if curves.valid[name][a] else f"(± {half:.3f})"
        result.append(
            f"{getattr(curves, name)[a]:.3f} {shown if curves.within[a] and np.isfinite(half) else ''}".rstrip()
        )
    return [*result, "" if np.isnan(curves.ess[a]) else f"{curves.ess[a]:,.0f}"]


def row_text(curves: Curves, a: int, mark: str = " ") -> str:
    """Return the line of one alpha, under `HEADINGS`, with a mark of one letter before it."""
    *numbers, ess = cells(curves, a)
    alpha = f"{mark}{' ' if curves.within[a] else '~'}{curves.alphas[a]:>10.4g}"
    return f"{alpha}{''.join(f'{cell:>20}' for cell in numbers)}{ess:>10}"


def legend(curves: Curves, rows: Iterable[int]) -> str:
    """Return what the marks in some rows mean, those that occur."""
    shown = list(rows)
    doubtful = any((curves.within & ~curves.valid[name])[shown].any() for name in QUANTITIES[:3])
    return "   ".join(
        (
            f"±: {LEVEL:.0%} interval",
            *(("(±): interval not reliable",) if doubtful else ()),
            *(("~: extrapolation, log Z and reward too low as a rule",) if not curves.within[shown].all() else ()),
        )
    )
