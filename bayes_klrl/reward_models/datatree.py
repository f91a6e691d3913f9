"""The posterior of a reward model as labelled arrays, for ArviZ.

posterior       theta (chain, draw, feature), and prior_scale and noise where they are inferred
sample_stats    diverging, num_steps, accept_prob, lp (log joint density of the unconstrained draw)
log_likelihood  of each pair or score (chain, draw, observation): what `az.loo` reads
observed_data   preferred, all 1, or the scores less their mean
constant_data   the design: differences of standardised features, or these themselves
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bayes_klrl.export.datatree import as_installed, numbered
from bayes_klrl.reward_models.posterior import RewardPosterior

__all__ = ["reward_posterior_to_arviz"]

_CHAINS = ("chain", "draw")


def reward_posterior_to_arviz(fit: RewardPosterior) -> Any:
    """Return what the installed ArviZ summarises: an InferenceData in 0.x, a DataTree in 1.x."""
    site = "preferred" if fit.scores is None else "scores"
    seen = np.ones(len(fit.design)) if fit.scores is None else fit.scores
    theta = {"theta": ((*_CHAINS, "feature"), fit.draws)}
    scales = {name: (_CHAINS, values) for name, values in fit.scales.items()}
    stats = {name.replace("potential_energy", "lp"): values for name, values in fit.sample_stats.items()}
    stats["lp"] = -stats["lp"]
    groups = {
        "/": xr.Dataset(attrs={"inference_library": "numpyro"}),
        "/posterior": xr.Dataset({**theta, **scales}),
        "/sample_stats": xr.Dataset({name: (_CHAINS, values) for name, values in stats.items()}),
        "/log_likelihood": xr.Dataset({site: ((*_CHAINS, "observation"), fit.log_likelihood())}),
        "/observed_data": xr.Dataset({site: ("observation", seen)}),
        "/constant_data": xr.Dataset({"design": (("observation", "feature"), fit.design)}),
    }
    return as_installed(xr.DataTree.from_dict({name: numbered(dataset) for name, dataset in groups.items()}))
