"""R-hat and effective sample sizes of Markov chains, computed by ArviZ (Vehtari et al. 2021)."""

from __future__ import annotations

import numpy as np

from bayes_klrl.typing import FloatArray

__all__ = ["ess_bulk", "ess_tail", "r_hat"]

_FEWEST_DRAWS = 4  # ArviZ splits chains into halves and needs two draws in each


def r_hat(values: FloatArray) -> FloatArray:
    """Return rank-normalised split R-hat of a scalar, (P,); NaN for one chain, fewer than 4 draws, or a constant.

    Parameters
    ----------
    values
        The scalar in every draw, shape (P, chains, draws).
    """
    return _by_arviz("rhat", values) if values.shape[1] > 1 else np.full(len(values), np.nan)


def ess_bulk(values: FloatArray) -> FloatArray:
    """Return the bulk effective sample size of a scalar, (P,); NaN for fewer than 4 draws, or a constant."""
    return _by_arviz("ess", values)


def ess_tail(values: FloatArray) -> FloatArray:
    """Return the smaller of the effective sample sizes of the 5 % and 95 % quantiles, (P,); NaN as in `ess_bulk`."""
    return _by_arviz("ess", values, method="tail")


def _by_arviz(name: str, values: FloatArray, **options: str) -> FloatArray:
    """Return an ArviZ statistic of each prompt, (P,); old and new versions of ArviZ both take and return a Dataset."""
    result = np.full(len(values), np.nan)
    varied = np.flatnonzero(np.ptp(values, axis=(1, 2)) > 0)
    if values.shape[2] < _FEWEST_DRAWS or not varied.size:
        return result
    import xarray as xr

    from bayes_klrl.export.installed_arviz import installed_arviz

    arviz = installed_arviz()
    dataset = xr.Dataset({"value": (("chain", "draw", "prompt"), values[varied].transpose(1, 2, 0))})
    with np.errstate(all="ignore"):  # if each chain is constant, R-hat is infinite or undefined; not an error
        result[varied] = getattr(arviz, name)(dataset, **options)["value"].values
    return result
