"""Alphas that change in the course of a training: who chooses them, and annealing from a large one.

A callback with the method `next_alpha` chooses the alpha of each step. The guide then follows the posteriors of these alphas,
and `Fit.posterior` is the one of the last: that is the posterior which the guide approximates. Temperatures that fall from a
large alpha let a guide follow the path of posteriors instead of searching for a narrow one from far away.
`AdaptiveAlpha`, which looks for the alpha of a given KL or reward, is in the room `analysis/frontier`, since it reads the
frontier first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from bayes_klrl.checks import check_fraction, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.callbacks import StepRecord
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import LanguageModel

__all__ = ["AlphaSchedule", "AnnealedAlpha", "alpha_schedule", "has_settled"]


@runtime_checkable
class AlphaSchedule(Protocol):
    """A callback that chooses the alpha of each step."""

    def next_alpha(
        self, step: int, num_steps: int, history: Mapping[str, Sequence[float]], posterior: Posterior
    ) -> float:
        """Return the alpha of a step, positive.

        It has to be a function of its arguments, so that a training that is resumed goes on as if nothing had happened.

        Parameters
        ----------
        step, num_steps
            The number of the step, from 0, and the number of steps of the whole training.
        history
            The values of all steps before by the names of `Fit.history`, their alphas under "alpha".
        posterior
            The posterior that `SVI.fit` was given, with its own alpha.

        A method `has_settled` of the same arguments may say whether the training may end early: whether alpha has come to what
        it is to be.
        """


@dataclass(frozen=True)
class AnnealedAlpha:
    """Alpha falls from a large value to the posterior's own, by the same factor in each step, and then stays.

    Parameters
    ----------
    start
        The alpha of the first step, in the units of the posterior's alpha; usually larger than that.
    share
        The share of the steps in which alpha changes, in (0, 1].

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=0.5)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(40).fit(posterior, seed=0, callbacks=[bk.AnnealedAlpha(start=4.0, share=0.5)])
    >>> fit.history["alpha"][[0, 10, 20, 39]].round(2)
    array([4.  , 1.34, 0.5 , 0.5 ])
    """

    start: float
    share: float = 0.5

    def __post_init__(self) -> None:
        check_positive("start", self.start)
        check_fraction("share", self.share)
        check_positive("share", self.share)

    def next_alpha(
        self, step: int, num_steps: int, history: Mapping[str, Sequence[float]], posterior: Posterior
    ) -> float:
        """See `AlphaSchedule.next_alpha`."""
        done = min(1.0, step / max(self.share * num_steps - 1, 1e-9))
        return float(posterior.alpha * (self.start / posterior.alpha) ** (1.0 - done))

    def has_settled(
        self, step: int, num_steps: int, history: Mapping[str, Sequence[float]], posterior: Posterior
    ) -> bool:
        """Return whether alpha is the posterior's own."""
        return bool(history["alpha"][-1] == posterior.alpha)

    def __call__(self, record: StepRecord, guide: LanguageModel) -> None:
        """Do nothing: alphas are chosen by `next_alpha`."""


def has_settled(
    schedule: Any, step: int, num_steps: int, history: Mapping[str, Sequence[float]], posterior: Posterior
) -> bool:
    """Return whether a schedule has reached what it is for, so that a training may end early; True without a schedule."""
    asked = getattr(schedule, "has_settled", None)
    return True if asked is None else bool(asked(step, num_steps, history, posterior))


def alpha_schedule(callbacks: Sequence[Any]) -> AlphaSchedule | None:
    """Return the callback that chooses alphas; None if none does.

    Raises
    ------
    BayesKLRLError
        If two of them do.
    """
    found = [callback for callback in callbacks if isinstance(callback, AlphaSchedule)]
    if len(found) > 1:
        raise BayesKLRLError(
            f"Only one callback can choose alpha; {', '.join(type(each).__name__ for each in found)} want to. Leave one."
        )
    return found[0] if found else None
