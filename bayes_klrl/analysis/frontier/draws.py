"""The draws that a frontier is computed from: new ones from the prior, or a user's own."""

from __future__ import annotations

import numpy as np

from bayes_klrl.analysis.frontier.path import RewardPool
from bayes_klrl.checks import check_count
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.same_posterior import check_are_of
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.blocks import run_in_blocks
from bayes_klrl.runners.runner import Runner

__all__ = ["drawn_or_given", "pool_of"]


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
