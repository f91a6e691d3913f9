"""What a reward function returned, as one number per completion; anything else is an error that names the completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bayes_klrl.arrays import to_host
from bayes_klrl.batch import Batch
from bayes_klrl.errors import RewardError
from bayes_klrl.typing import FloatArray

__all__ = ["check_bounds", "check_numbers", "floats_where_given", "to_floats"]


def to_floats(outcome: Any, label: str, batch: Batch) -> FloatArray:
    """Return what a function returned as float64 (M,), refusing None, strings and wrong lengths."""
    values, given = floats_where_given(outcome, label, batch)
    if not given.all():
        raise _no_number(label, None, batch, int(np.flatnonzero(~given)[0]))
    return values


def floats_where_given(outcome: Any, label: str, batch: Batch) -> tuple[FloatArray, np.ndarray]:
    """Return the values as float64 (M,), 0 where the function returned None, and where it did not, bool (M,)."""
    num_rows = len(batch)
    outcome = _sequence(outcome, label, num_rows)
    given = np.ones(num_rows, dtype=bool)
    if isinstance(outcome, np.ndarray) and outcome.dtype.kind in "fiub":
        return outcome.astype(np.float64), given
    values = np.zeros(num_rows)
    for row, value in enumerate(outcome):
        if value is None:
            given[row] = False
            continue
        try:
            if isinstance(value, str | bytes | complex | np.complexfloating):
                raise TypeError
            values[row] = float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError, OverflowError):
            raise _no_number(label, value, batch, row) from None
    return values, given


def check_numbers(values: FloatArray, label: str, batch: Batch) -> None:
    """Refuse NaN and +inf."""
    bad = np.isnan(values) | np.isposinf(values)
    if bad.any():
        row = int(bad.argmax())
        raise _no_number(label, values[row], batch, row)


def check_bounds(values: FloatArray, bounds: tuple[float, float] | None, label: str, batch: Batch) -> None:
    """Refuse values outside of the declared range (low, high)."""
    if bounds is None:
        return
    outside = (values < bounds[0]) | (values > bounds[1])
    if outside.any():
        row = int(outside.argmax())
        raise RewardError(
            f"Reward {label!r} returned {values[row]}, outside its declared bounds {bounds}, for {batch.describe(row)}. Widen "
            "`bounds`, or clip the reward."
        )


def _sequence(outcome: Any, label: str, num_rows: int) -> Any:
    """Return what has the right length and an order: an array, or a sequence of anything."""
    if isinstance(outcome, Mapping | set | frozenset):
        raise RewardError(f"Reward {label!r} returned a {type(outcome).__name__}, which has no order; return a list.")
    if hasattr(outcome, "detach"):  # a torch tensor: with or without gradient, of any precision
        outcome = to_host(outcome.double())
    if hasattr(outcome, "__array__") and not isinstance(outcome, np.ndarray | np.generic):
        outcome = np.asarray(outcome)  # a JAX array, say: to read it number by number takes a thousand times longer
    if outcome is None or isinstance(outcome, str | bytes) or not hasattr(outcome, "__len__"):
        raise RewardError(
            f"Reward {label!r} returned {outcome!r} for {num_rows} completions. It must return one float per completion."
        )
    shape = np.shape(outcome) if isinstance(outcome, np.ndarray) else (len(outcome),)
    if shape != (num_rows,):
        raise RewardError(
            f"Reward {label!r} returned {'shape ' + str(shape) if len(shape) != 1 else f'{shape[0]} values'} for "
            f"{num_rows} completions. It must return one float per completion, in order."
        )
    return outcome


def _no_number(label: str, value: object, batch: Batch, row: int) -> RewardError:
    """Return the error about a value that is no reward."""
    shown = str(value) if isinstance(value, float) else repr(value)
    return RewardError(
        f"Reward {label!r} returned {shown} for {batch.describe(row)}. A reward is a finite number, or -inf for what is "
        "impossible."
    )
