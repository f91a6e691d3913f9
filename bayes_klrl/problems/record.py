"""Problems of the suite: a posterior that is made when it is asked for, its purpose, and its true answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bayes_klrl.inference.exact.enumeration import enumerated_posterior
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import FloatArray

__all__ = ["Problem", "Truth", "by_enumeration", "by_messages"]


@dataclass(frozen=True, eq=False)
class Truth:
    """The true answer of a posterior, found without the samplers that are tested; arrays (P,), in nats.

    Parameters
    ----------
    log_evidence
        log Z; where only bounds are known, their midpoint (the convention of Zhao et al. 2024).
    log_evidence_bounds
        Lower and upper bound on log Z, shape (P, 2); equal where log Z is exact.
    mean_bounds
        Bounds on the mean of log Z over prompts, shape (2,); they are narrower than the mean of the bounds.
    reward
        E[r] under the posterior, in its own units; NaN where unknown.
    kl
        KL(p* || p0); NaN where unknown.
    source
        "enumeration", "messages", "closed form", or the method behind the bounds.
    """

    log_evidence: FloatArray
    log_evidence_bounds: FloatArray
    mean_bounds: FloatArray
    reward: FloatArray
    kl: FloatArray
    source: str

    @classmethod
    def exact(cls, log_evidence: FloatArray, reward: FloatArray, kl: FloatArray, source: str) -> Truth:
        """Return the truth where log Z is known to all digits."""
        bounds = np.repeat(log_evidence[:, None], 2, axis=1)
        return cls(log_evidence, bounds, bounds.mean(axis=0), reward, kl, source)

    @classmethod
    def between(cls, bounds: FloatArray, mean_bounds: FloatArray, source: str) -> Truth:
        """Return the truth where only two-sided bounds (P, 2) on log Z are known."""
        unknown = np.full(len(bounds), np.nan)
        return cls(bounds.mean(axis=1), bounds, mean_bounds, unknown, unknown, source)

    @property
    def is_exact(self) -> bool:
        """Whether log Z is known to all digits."""
        return bool((self.log_evidence_bounds[:, 0] == self.log_evidence_bounds[:, 1]).all())


@dataclass(frozen=True, eq=False)
class Problem:
    """One problem of the suite; nothing is built, loaded or solved before it is asked for.

    Parameters
    ----------
    name
        The name as in theory.md 8: P1 to P13, with "-" and a word for a second, harder size.
    purpose
        The difficulty that the problem tests, in a few words.
    make
        A function that makes the posterior.
    solve
        A function that finds the truth of the posterior.
    """

    name: str
    purpose: str
    make: Callable[[], Posterior] = field(repr=False)
    solve: Callable[[Posterior], Truth] = field(repr=False)

    @cached_property
    def posterior(self) -> Posterior:
        """The posterior, made at first use."""
        return self.make()

    @cached_property
    def truth(self) -> Truth:
        """The truth, computed at first use."""
        return self.solve(self.posterior)


def by_enumeration(posterior: Posterior) -> Truth:
    """Return the truth by summing over every completion.

    Examples
    --------
    >>> from bayes_klrl.problems import gold_posterior
    >>> by_enumeration(gold_posterior()).log_evidence.round(8)
    array([1.65238447])
    """
    draws = enumerated_posterior(posterior, method="enumeration")
    reward = draws.mean(draws.reward)
    kl = draws.mean(draws.log_likelihood) - draws.log_evidence
    return Truth.exact(draws.log_evidence, reward, kl, "enumeration")


def by_messages(posterior: Posterior) -> Truth:
    """Return the truth by backward messages, at any length."""
    messages = backward_messages(posterior)
    moments = messages.moments()
    return Truth.exact(messages.log_evidence, moments.reward, moments.kl, "messages")
