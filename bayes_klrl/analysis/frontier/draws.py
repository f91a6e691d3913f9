"""The draws that a frontier is computed from, new ones from the prior or a user's own, and how far they reach.

They reach to the least alpha at which their ESS is 100 for every prompt, and the default grid of alphas goes a little further;
rewards that none of them has may decide even before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bayes_klrl.analysis.frontier.implied_alpha import monotone_root
from bayes_klrl.analysis.frontier.path import RewardPool, curves, moments
from bayes_klrl.checks import check_count
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.same_posterior import check_are_of
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.blocks import run_in_blocks
from bayes_klrl.runners.runner import Runner
from bayes_klrl.typing import FloatArray

__all__ = ["default_grid", "drawn_or_given", "pool_cut", "pool_of", "unseen_cut"]

_NUM_POINTS = 40
_START_KL = 0.01  # nats above the (constrained) prior at which the grid begins
_PAST_CUT = 4.0  # how far past the cut the grid goes, as a ratio of alphas
_DOUBLINGS = 60


def drawn_or_given(
    posterior: Posterior,
    draws: Draws | None,
    num_draws: int | None,
    seed: int | None,
    progress: bool,
    runner: Runner,
) -> Draws:
    """Return new draws from the prior, or the user's if they are independent draws of a known density, weighted by it.

    Raises
    ------
    BayesKLRLError
        If both or neither are asked for, or the user's draws are of another posterior or another kind.
    """
    if draws is None:
        if num_draws is None or seed is None:
            raise BayesKLRLError("frontier needs num_draws= and seed= (or draws= of importance sampling).")
        check_count("num_draws", num_draws, least=2)
        prior = ImportanceSampling(num_draws)
        return run_in_blocks(runner, prior, posterior, seed=seed, progress=progress, name="prior draws")
    if num_draws is not None or seed is not None:
        raise BayesKLRLError("Give frontier either draws=, or num_draws= and seed=; not both.")
    if not isinstance(draws, Draws):
        raise BayesKLRLError(
            f"draws must come from bk.ImportanceSampling(...).run(posterior, seed=...); got {draws!r}."
        )
    check_are_of(posterior, draws, "Draw again: frontier(posterior, num_draws=..., seed=...).")
    alive = np.isfinite(draws.log_weights)
    log_w = draws.log_prior[alive] + draws.log_likelihood[alive] - draws.log_proposal[alive]
    if draws.method == "Exact" or not np.allclose(log_w, draws.log_weights[alive], rtol=0, atol=1e-6):
        raise BayesKLRLError(
            "A frontier needs independent draws of a known density, weighted by it: bk.ImportanceSampling's. These are of "
            f"{draws.method!r}, resampled or weighted otherwise."
        )
    return draws


def pool_of(draws: Draws, bounds: tuple[float, float] | None = None) -> RewardPool:
    """Return importance-sampling draws as a pool: how the prior weighs them, their rewards, and the range of these."""
    log_weights = np.where(np.isneginf(draws.log_prior), -np.inf, draws.log_prior - draws.log_proposal)
    return RewardPool(log_weights, draws.reward, bounds)


def pool_cut(pool: RewardPool, alpha: float) -> float:
    """Return the least alpha that a pool reaches (`Curves.within`); 0 if it reaches all of them, inf if none.

    Prior draws reach every alpha above the cut. A proposal's may miss alphas far above it too; the search then starts from
    the largest b = 1 / alpha on a coarse grid that they do reach.
    """
    coarse = 2.0 ** np.arange(-_DOUBLINGS // 2, _DOUBLINGS // 2) / alpha
    reached = np.flatnonzero(curves(pool, coarse)[0].within)
    if not reached.size:
        return float("inf")
    if reached[-1] == coarse.size - 1:
        return 0.0
    low, high = coarse[reached[-1]], coarse[reached[-1] + 1]
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if curves(pool, [middle])[0].within[0] else (low, middle)
    return float(1 / low)


def unseen_cut(pool: RewardPool, alpha: float) -> float:
    """Return the alpha below which unseen rewards could move log Z out of its interval (`Curves.exposed`).

    0: nowhere, since the best possible reward was drawn; inf: everywhere; NaN: no upper bound is declared.
    """
    headroom = pool.headroom(1.0)
    if np.isnan(headroom).any():
        return float("nan")
    if not headroom.any():
        return 0.0

    def excess(b: float) -> float:
        return 1.0 if curves(pool, [b])[0].exposed["log_evidence"][0] else -1.0

    least = 2.0 ** (-_DOUBLINGS // 2) / alpha
    if excess(least) > 0:
        return float("inf")
    b = monotone_root(excess, start=1.0 / alpha, low=least)
    return 0.0 if b is None else float(1 / b)


def default_grid(pool: RewardPool, alpha: float, cut: float) -> FloatArray:
    """Return inverse temperatures, rising: from near the prior to past the cut or to saturation, 1 / `alpha` among them."""
    own = 1.0 / alpha

    def kl(b: float) -> float:
        return moments(pool, b)[1]

    start, most = kl(0.0), kl(own * 2.0**40)
    if most - start < 1e-9:  # a constant reward: there is nothing to see
        low, high = own / 10, own * 10
    else:
        low = min(_first(kl, start + min(_START_KL, 0.05 * (most - start)), own), own / 2)
        saturated = _first(kl, start + 0.95 * (most - start), own)
        high = max(1.5 * own, saturated if cut in (0.0, np.inf) else min(saturated, _PAST_CUT / cut))
    return np.union1d(np.geomspace(low, high, _NUM_POINTS), own)


def _first(kl: Callable[[float], float], target: float, start: float) -> float:
    """Return the b at which KL reaches a target that it is known to reach."""
    root = monotone_root(lambda b: kl(b) - target, start=start, low=0.0)
    return start if root is None else root
