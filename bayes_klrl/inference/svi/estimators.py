"""The leave-one-out baseline, which lowers the variance of score-function gradients of the ELBO on every backend.

    grad ELBO ~ 1/N sum_n (log w_n - mean_{m != n} log w_m) grad log q(x_n)
              = 1/(N - 1) sum_n (log w_n - mean log w) grad log q(x_n)

It is unbiased, because the baseline of a draw does not depend on that draw (Kool et al. 2019; Ahmadian et al. 2024). At the
posterior every log w is log Z, so its variance is 0 there.
"""

from __future__ import annotations

from bayes_klrl.typing import Array

__all__ = ["leave_one_out"]


def leave_one_out(values: Array) -> Array:
    """Return v_n minus the mean of the other values along the first axis, which is N / (N - 1) (v_n - mean v).

    Parameters
    ----------
    values
        An array of NumPy, torch or JAX, shape (N, ...), N at least 2.

    Examples
    --------
    >>> import numpy as np
    >>> leave_one_out(np.array([1.0, 2.0, 6.0]))
    array([-3. , -1.5,  4.5])
    """
    num = len(values)
    return (values - values.mean(0)) * (num / (num - 1))
