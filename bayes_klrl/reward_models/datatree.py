"""The posterior of a reward model as labelled arrays, for ArviZ.

posterior       theta (chain, draw, feature), and prior_scale and noise where they are inferred
sample_stats    diverging, num_steps, accept_prob, lp (log joint density of the unconstrained draw)
log_likelihood  of each pair or score (chain, draw, observation): what `az.loo` reads
observed_data   preferred, all 1, or the scores less their mean
constant_data   the design: differences of standardised features, or these themselves
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from bayes_klrl.export.datatree import as_installed, numbered
from bayes_klrl.typing import FloatArray

__all__ = ["reward_posterior_to_arviz"]

_CHAINS = ("chain", "draw")


def reward_posterior_to_arviz(
    draws: FloatArray,
    scales: Mapping[str, FloatArray],
    sample_stats: Mapping[str, np.ndarray],
    log_likelihood: FloatArray,
    design: FloatArray,
    scores: FloatArray | None,
) -> Any:
    """Return the object that the installed ArviZ summarises: an InferenceData in 0.x, a DataTree in 1.x.

    Parameters
    ----------
    draws, scales, sample_stats, design, scores
        The fields of a `RewardPosterior`.
    log_likelihood
        The log-likelihood of each observation under each draw in nats, shape (C, S, n).
    """
    site = "preferred" if scores is None else "scores"
    seen = np.ones(len(design)) if scores is None else scores
    theta = {"theta": ((*_CHAINS, "feature"), draws)}
    scale_arrays = {name: (_CHAINS, values) for name, values in scales.items()}
    stats: dict[str, np.ndarray] = {
        name.replace("potential_energy", "lp"): values for name, values in sample_stats.items()
    }
    stats["lp"] = -stats["lp"]
    groups = {
        "/": xr.Dataset(attrs={"inference_library": "numpyro"}),
        "/posterior": xr.Dataset({**theta, **scale_arrays}),
        "/sample_stats": xr.Dataset({name: (_CHAINS, values) for name, values in stats.items()}),
        "/log_likelihood": xr.Dataset({site: ((*_CHAINS, "observation"), log_likelihood)}),
        "/observed_data": xr.Dataset({site: ("observation", seen)}),
        "/constant_data": xr.Dataset({"design": (("observation", "feature"), design)}),
    }
    return as_installed(xr.DataTree.from_dict({name: numbered(dataset) for name, dataset in groups.items()}))
