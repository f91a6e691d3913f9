"""The check that some distribution has the given means: mu must lie inside the convex hull of the features.

mu is on the boundary or outside if there is a direction u != 0 with u . f(x) >= u . mu for all x, and ">" for some x. Then
log Z(lambda) - lambda . mu decreases without end along -u, and no lambda is optimal. For several prompts the hulls are
averaged: the minimum over x is taken for each prompt, then the mean over prompts.
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray

__all__ = ["check_feasible"]

_ROUNDING = 1e-9
_SOLVER_ROUNDING = 1e-6  # linear programmes are solved to 1e-7


def check_feasible(values: FloatArray, log_base: FloatArray, targets: FloatArray, is_exact: bool) -> None:
    """Raise a `BayesKLRLError` if the targets are not inside the convex hull of the features.

    Parameters
    ----------
    values
        The features f of N completions per prompt, shape (P, N, J).
    log_base
        Log prior weights, (P, N); completions of weight -inf are ignored.
    targets
        The means mu, (J,).
    is_exact
        Whether these are all completions, rather than a pool of draws.

    Raises
    ------
    BayesKLRLError
        If a target is outside or at an end of the range of its feature, or if several targets cannot hold together.
    """
    possible = [np.unique(rows[np.isfinite(weights)], axis=0) for rows, weights in zip(values, log_base, strict=True)]
    low = np.mean([rows.min(axis=0) for rows in possible], axis=0)
    high = np.mean([rows.max(axis=0) for rows in possible], axis=0)
    where = "under this prior" if is_exact else f"in a pool of {values.shape[1]:,} prior draws"
    more = "" if is_exact else " Or raise num_draws: the pool may have missed the completions that reach it."
    for j, (target, least, most) in enumerate(zip(targets, low, high, strict=True)):
        if target < least - _ROUNDING or target > most + _ROUNDING:
            raise BayesKLRLError(
                f"No distribution gives feature {j} the mean {target:g}: its values {where} go from {least:g} to {most:g}. "
                f"Ask for a mean between them.{more}"
            )
        if not least + _ROUNDING < target < most - _ROUNDING:
            raise BayesKLRLError(
                f"The mean {target:g} of feature {j} is an end of its range {where}, {least:g} to {most:g}: lambda would be "
                "infinite. Ask for a mean strictly between the ends, or demand this value of every completion by a "
                f"bk.Constraint, which has no alpha.{more}"
            )
    if len(targets) > 1:
        _check_jointly(possible, targets, high - low, where, more)


def _check_jointly(possible: list[FloatArray], targets: FloatArray, spread: FloatArray, where: str, more: str) -> None:
    """Raise a `BayesKLRLError` if each feature can have its mean, but not all together."""
    scaled = [(rows - targets) / spread for rows in possible]
    if _best_direction(scaled, np.mean([rows.mean(axis=0) for rows in scaled], axis=0)) <= _SOLVER_ROUNDING:
        return
    outside = _best_direction(scaled, None) > _SOLVER_ROUNDING
    what = "No distribution gives" if outside else "Only distributions on a part of all completions give"
    cure = "together" if outside else "or replace one of them by a bk.Constraint, which has no alpha"
    raise BayesKLRLError(
        f"{what} the features the means {targets.tolist()} together {where}: they are "
        f"{'outside' if outside else 'on the boundary of'} the hull of their values. Ask for means that are possible {cure}."
        f"{more}"
    )


def _best_direction(scaled: list[FloatArray], objective: FloatArray | None) -> float:
    """Return the maximum over supporting directions u in [-1, 1]^J of u . objective, or of mean_p min_x u . f if it is None.

    This is a linear programme in u and m_p <= u . f_p(x) for all x, with mean_p m_p >= 0.
    """
    from scipy.optimize import linprog

    num_prompts, num_features = len(scaled), scaled[0].shape[1]
    rows = []
    for p, values in enumerate(scaled):
        chosen = np.zeros((len(values), num_prompts))
        chosen[:, p] = 1.0
        rows.append(np.column_stack([-values, chosen]))
    mean = np.full(num_prompts, 1 / num_prompts)
    rows.append(np.concatenate([np.zeros(num_features), -mean])[None])
    constraints = np.concatenate(rows)
    gain = np.concatenate([objective, 0 * mean]) if objective is not None else np.concatenate([0 * scaled[0][0], mean])
    bounds = [(-1.0, 1.0)] * num_features + [(None, None)] * num_prompts
    solved = linprog(-gain, A_ub=constraints, b_ub=np.zeros(len(constraints)), bounds=bounds, method="highs")
    return float(-solved.fun)
