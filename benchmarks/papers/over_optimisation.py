"""Curves of proxy and gold reward along KL to the prior, on problem P13: by best-of-n, by posteriors, by training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

import bayes_klrl as bk
from bayes_klrl.problems import Overoptimisation
from bayes_klrl.typing import FloatArray, LanguageModel
from benchmarks.papers.truth import EnumeratedTruth, best_of_n_law, kl

__all__ = ["FORMS", "LARGEST_KL", "Curve", "best_of_n_curve", "fit", "posterior_curve", "training_curve"]

FORMS = {"d (a - c d)": lambda d: d**2, "d (a - c log d)": lambda d: d * np.log(d)}
LARGEST_KL = 3.0  # nats: every data set's curves reach it
_NUM_POINTS = 25


@dataclass(frozen=True, eq=False)
class Curve:
    """Proxy and gold reward above the prior's along KL to the prior, as arrays over points of growing KL."""

    kl: FloatArray
    proxy: FloatArray
    gold: FloatArray

    def at(self, kls: FloatArray) -> Curve:
        """Return the curve at other KLs, linear in d = sqrt(KL) between its points; NaN past the last."""
        d, at = np.sqrt(np.maximum(self.kl, 0.0)), np.sqrt(kls)
        proxy, gold = (np.interp(at, d, values, right=np.nan) for values in (self.proxy, self.gold))
        return Curve(kls, proxy, gold)

    def kl_of_proxy(self, proxy: FloatArray) -> FloatArray:
        """Return the KL at which the proxy reward is first reached; NaN where it is not."""
        highest = np.maximum.accumulate(self.proxy)
        d: FloatArray = np.interp(proxy, highest, np.sqrt(np.maximum(self.kl, 0.0)), right=np.nan)
        return d**2


def _curve(problem: Overoptimisation, laws: Sequence[FloatArray]) -> Curve:
    """Return the curve of laws, given as log-probs of all completions, from the prior on."""
    log_prior, proxy = problem.enumeration.log_prior[0], problem.enumeration.reward[0]
    prior = np.exp(log_prior)
    rows = [(kl(law, log_prior), np.exp(law) @ proxy, np.exp(law) @ problem.gold) for law in laws]
    away, of_proxy, of_gold = np.array(rows).T
    return Curve(away, of_proxy - prior @ proxy, of_gold - prior @ problem.gold)


def best_of_n_curve(problem: Overoptimisation) -> Curve:
    """Return the curve of best-of-n by the proxy, n = 1 to 65,536, exactly."""
    ns = np.unique(np.round(np.geomspace(1, 2**16, 80)).astype(int))
    log_prior, proxy = problem.enumeration.log_prior[0], problem.enumeration.reward[0]
    return _curve(problem, [best_of_n_law(proxy, int(n), log_prior) for n in ns])


def posterior_curve(problem: Overoptimisation) -> Curve:
    """Return the curve of the posteriors p0 exp(b proxy) along b, exactly."""
    truth = EnumeratedTruth.of(problem.posterior)
    return _curve(problem, [truth.tilted(b) for b in np.concatenate([[0.0], np.geomspace(1e-2, 300.0, 150)])])


@dataclass(eq=False)
class _Trace:
    """A callback that notes log q of all completions every few steps."""

    truth: EnumeratedTruth
    every: int
    laws: list[FloatArray] = field(default_factory=list)

    def __call__(self, record: bk.StepRecord, guide: LanguageModel) -> None:
        if (record.step + 1) % self.every == 0:
            self.laws.append(self.truth.log_probs(guide))


def training_curve(problem: Overoptimisation, alpha: float, steps: int, seed: int) -> Curve:
    """Return the curve that a training of the prior's table passes through, made monotone in KL."""
    posterior = problem.posterior.at_alpha(alpha)
    trace = _Trace(EnumeratedTruth.of(posterior), max(1, steps // 40))
    bk.SVI(steps, 256).fit(posterior, seed=seed, callbacks=[trace])
    curve = _curve(problem, [trace.truth.log_prior, *trace.laws])
    order = np.flatnonzero(curve.kl >= np.maximum.accumulate(curve.kl))
    return Curve(curve.kl[order], curve.proxy[order], curve.gold[order])


def fit(curve: Curve, form: str, largest: float = LARGEST_KL) -> tuple[float, float, float]:
    """Return a, c and R^2 of the least-squares fit of a form to the gold reward.

    It is at even steps of d = sqrt(KL), from the curve's first point past the prior on: n = 2 for best-of-n.
    """
    first, end = float(curve.kl[curve.kl > 1e-9][0]), min(largest, float(curve.kl[-1]))
    d = np.linspace(np.sqrt(first), np.sqrt(end), _NUM_POINTS)
    gold = curve.at(d**2).gold
    design = np.stack([d, -FORMS[form](d)], axis=1)
    (a, c), *_ = np.linalg.lstsq(design, gold, rcond=None)
    residual = gold - design @ np.array([a, c])
    return float(a), float(c), 1.0 - float(residual @ residual) / float(((gold - gold.mean()) ** 2).sum())
