"""What `BayesianFit.save` writes and `load` reads: arrays as safetensors, the rest as JSON; no pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bayes_klrl.draws import Cost
from bayes_klrl.errors import CheckpointError
from bayes_klrl.inference.svi.bayesian.recipe import FIT_FILE, BayesianFit, BayesianSVI
from bayes_klrl.inference.svi.bayesian.training import predictive
from bayes_klrl.models.torch_lm.adapters import import_peft
from bayes_klrl.models.torch_lm.offsets import restored_family
from bayes_klrl.posterior import Posterior

__all__ = ["load_fit", "save_fit"]

_FORMAT = "bayes_klrl.BayesianFit/1"
_START = "start."
_ARRAYS, _ADAPTER = "policies.safetensors", "adapter"


def save_fit(fit: BayesianFit, folder: Path) -> Path:
    """See `BayesianFit.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {f.name: getattr(fit.recipe, f.name) for f in dataclasses.fields(fit.recipe)}
    if not isinstance(recipe["parameters"], str):
        recipe["parameters"].save_pretrained(folder / _ADAPTER)
        recipe["parameters"] = None
    said = {
        "format": _FORMAT,
        "recipe": recipe,
        "seed": fit.seed,
        "prior": fit.family.prior_digest,
        "training": dataclasses.asdict(fit.training),
        "interrupted": fit.interrupted,
        "history": {name: values.tolist() for name, values in fit.history.items()},
    }
    arrays = {_START + name: value.detach().cpu().contiguous() for name, value in fit.family.start.items()}
    arrays |= {"mu": torch.as_tensor(fit.mu), "sigma": torch.as_tensor(fit.sigma)}
    save_file(arrays, folder / _ARRAYS)
    (folder / FIT_FILE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return folder


def load_fit(folder: Path, posterior: Posterior) -> BayesianFit:
    """See `BayesianFit.load`."""
    try:
        said: dict[str, Any] = json.loads((folder / FIT_FILE).read_text(encoding="utf-8"))
        if said["format"] != _FORMAT:
            raise CheckpointError(f"{folder} is of format {said['format']!r}, not {_FORMAT!r}.")
        arrays = load_file(folder / _ARRAYS)
        mu, sigma = arrays.pop("mu").numpy(), arrays.pop("sigma").numpy()
        if said["recipe"]["parameters"] is None:
            said["recipe"]["parameters"] = import_peft().PeftConfig.from_pretrained(str(folder / _ADAPTER))
        prior_digest = str(said["prior"])
        recipe, training = BayesianSVI(**said["recipe"]), Cost(**said["training"])
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold a readable BayesianFit: {error}") from error
    start = {name.removeprefix(_START): value for name, value in arrays.items()}
    family = restored_family(posterior.prior, recipe.parameters, start, prior_digest)
    return BayesianFit(
        guide=predictive(family, mu, sigma, recipe.num_predictive, said["seed"]),
        history={name: np.array(values) for name, values in said["history"].items()},
        posterior=posterior,
        training=training,
        interrupted=said["interrupted"],
        mu=mu,
        sigma=sigma,
        recipe=recipe,
        seed=said["seed"],
        family=family,
    )
