"""Means with their standard errors, as the examples state them."""

from __future__ import annotations

import numpy as np

from bayes_klrl.typing import FloatArray

__all__ = ["mean_and_se"]


def mean_and_se(values: FloatArray) -> tuple[float, float]:
    """Return the mean of independent values, shape (N,), and its standard error sd / sqrt(N).

    Examples
    --------
    >>> mean_and_se(np.array([1.0, 2.0, 3.0, 2.0]))
    (2.0, 0.408248290463863)
    """
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
