"""The alphas and bounds that a reward may have, and how large it may be, so that float64 can add it to a log-prob."""

from __future__ import annotations

from typing import Any

import numpy as np

from bayes_klrl.batch import Batch
from bayes_klrl.errors import BayesKLRLError, RewardError
from bayes_klrl.typing import FloatArray

__all__ = ["MAX_NATS", "check_alpha_and_bounds", "check_nats", "positive"]

MAX_NATS = 1e12
"""The largest |r / alpha|: to a larger number float64 adds the log-prob of the prior with an error above 1e-4 nats."""
_LEAST, _LARGEST = 1e-280, 1e280  # of alpha: products with rewards of `MAX_NATS`, and sums of those, do not overflow


def check_alpha_and_bounds(factor: Any) -> None:
    """Refuse an alpha that is not positive, or bounds out of order; in a factor under construction, convert both to floats."""
    object.__setattr__(factor, "alpha", positive("alpha", factor.alpha))
    if factor.bounds is not None:
        try:
            low, high = (float(bound) for bound in factor.bounds)
        except (TypeError, ValueError):
            raise BayesKLRLError(f"bounds is a pair (low, high) of numbers; got {factor.bounds!r}.") from None
        if not low <= high or np.isposinf(low) or np.isneginf(high):
            raise BayesKLRLError(f"bounds = (low, high) needs low <= high; got {factor.bounds!r}.")
        object.__setattr__(factor, "bounds", (low, high))


def check_nats(reward: FloatArray, alpha: float | None, label: str, batch: Batch | None = None) -> None:
    """Refuse finite rewards of more than `MAX_NATS` at alpha; -inf, the reward of what is impossible, is legal.

    Parameters
    ----------
    reward
        The rewards, of any shape; where a batch is given the last axis is that of its completions.
    alpha, label
        Units of reward per nat (None: 1), and the name of the reward in the message.
    batch
        The completions, which the message then describes.
    """
    large = (np.abs(reward) > MAX_NATS * (alpha or 1.0)) & ~np.isneginf(reward)
    if not large.any():
        return
    index = tuple(np.argwhere(large)[0].tolist())
    where = "" if batch is None else f" for {batch.describe(index[-1])}"
    raise RewardError(
        f"Reward {label!r} returned {reward[index]:g}{where}, which is more than {MAX_NATS:g} nats at alpha = "
        f"{alpha or 1.0:g}. To such a number float64 cannot add the log-prob of the prior. Return -inf for completions that "
        "are excluded; otherwise scale the reward down, or raise alpha."
    )


def positive(what: str, value: float | None) -> float:
    """Return a positive finite number as float."""
    if getattr(value, "requires_grad", False):  # a tensor of torch, whose float has none
        raise BayesKLRLError(
            f"{what} must be a number; got a tensor whose gradient would be lost. For an unknown {what} write the factor "
            'yourself in a program of Pyro or NumPyro: pyro.factor("likelihood", reward / alpha); see docs/from/pyro.md.'
        )
    try:
        number = np.nan if value is None or isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not (np.isfinite(number) and number > 0):
        raise BayesKLRLError(
            f"{what} must be a positive finite number; got {value!r}. For a hard limit use bk.Constraint."
        )
    if not _LEAST <= number <= _LARGEST:
        raise BayesKLRLError(
            f"{what} must lie between {_LEAST:g} and {_LARGEST:g}, where r / alpha does not overflow; got {value!r}. For a "
            "hard limit use bk.Constraint."
        )
    return number
