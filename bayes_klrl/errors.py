"""Typed errors; each message names the value, the rule and the cure.

ValueError
└── BayesKLRLError            any refusal of ours, plain bad arguments included
    ├── RewardError           a reward raised, or returned something that is not a log-likelihood
    │   └── TextRewardError   a reward on text, and a prior that has no tokenizer
    ├── UnboundedLossError    SVI met a completion of likelihood 0: the ELBO is -inf
    ├── BudgetError           the budget was spent without an answer; carries what was drawn
    ├── ConvergenceError      Markov chains did not converge; carries what was drawn
    ├── SupportError          mass where there must be none, or none where there must be some
    └── CheckpointError       a folder, file or tokenizer that is not the model it should be
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayes_klrl.draws import Draws
    from bayes_klrl.inference.svi.fit import Fit
    from bayes_klrl.reward_models.posterior import RewardPosterior

__all__ = [
    "BayesKLRLError",
    "BudgetError",
    "CheckpointError",
    "ConvergenceError",
    "RewardError",
    "SupportError",
    "TextRewardError",
    "UnboundedLossError",
    "needs_jax",
]


class BayesKLRLError(ValueError):
    """Base of every error that `bayes_klrl` raises on purpose.

    Attributes
    ----------
    fit
        What `SVI` had learned when the error ended its training; None otherwise.
    """

    fit: Fit | None = None


class RewardError(BayesKLRLError):
    """A reward function raised, or returned something that cannot be a reward."""


class TextRewardError(RewardError):
    """A reward that reads text was given a prior that cannot decode its tokens."""


class UnboundedLossError(BayesKLRLError):
    """The guide drew a completion of likelihood 0, so its ELBO is -inf and has no gradient."""


class BudgetError(BayesKLRLError):
    """The budget was spent without an answer.

    Attributes
    ----------
    draws
        What was drawn before the budget ran out, or None.
    """

    def __init__(self, message: str, draws: Draws | None = None) -> None:
        super().__init__(message)
        self.draws = draws


class ConvergenceError(BayesKLRLError):
    """Markov chains have not converged, so that their draws are not those of the posterior.

    Attributes
    ----------
    result
        What was drawn, with its diagnostics.
    """

    def __init__(self, message: str, result: RewardPosterior | None = None) -> None:
        super().__init__(message)
        self.result = result


class SupportError(BayesKLRLError):
    """A distribution has mass where another has none, or no mass at all."""


class CheckpointError(BayesKLRLError):
    """A folder, file or tokenizer is not the model it was said to be."""


@contextmanager
def needs_jax(what: str) -> Iterator[None]:
    """Name the extra to install where an import inside fails for want of it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("jax", "numpyro", "optax"):
            raise
        raise ImportError(f"{what} needs the {error.name} package: pip install 'bayes_klrl[jax]'") from error
