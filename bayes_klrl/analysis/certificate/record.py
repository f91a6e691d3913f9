"""The fields of a certificate, apart from how it is shown, so that text and picture can read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from bayes_klrl.analysis.certificate.coverage import Coverage
from bayes_klrl.analysis.certificate.intervals import Intervals
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.typing import FloatArray

__all__ = ["CertificateRecord", "bounds_in_words"]

_BOUNDS = {"A": "two-sided bounds", "B": "lower bound only", "C": "estimates, no bounds"}


def bounds_in_words(grade: str, failure_probability: float) -> str:
    """Return what a grade says of the bounds: "exact", or what kind they are. It is no praise of a policy.

    Examples
    --------
    >>> bounds_in_words("A", 0.0), bounds_in_words("A", 0.05), bounds_in_words("B", 0.05)
    ('exact', 'two-sided bounds', 'lower bound only')
    """
    return "exact" if (grade, failure_probability) == ("A", 0) else _BOUNDS[grade]


@dataclass(frozen=True, eq=False)
class CertificateRecord:
    """The fields of a `Certificate`, which explains each of them."""

    elbo: FloatArray
    log_evidence_bounds: FloatArray
    reverse_kl: FloatArray
    forward_kl: FloatArray
    reverse_kl_on_support: FloatArray
    pooled: Intervals
    prior_kl: FloatArray
    grade: str
    failure_probability: float
    implied_alpha: float
    implied_alpha_interval: tuple[float, float]
    frontier_gap: float
    frontier_gap_se: float
    alpha: float
    reward: float
    kl_prior: float
    evidence_source: str
    coverage: Coverage | None
    notes: tuple[str, ...]
    draws: Draws = field(repr=False)
    exact_draws: Draws | None = field(repr=False)
    cost: Cost = field(default_factory=Cost)
    prior_check: str = ""
    policy_check: str = ""
    findings: tuple[str, ...] = ()
