"""Saving and loading a `BayesianFit`: arrays as safetensors, the rest as JSON; no pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bayes_klrl.draws import Cost
from bayes_klrl.errors import CheckpointError
from bayes_klrl.inference.svi.bayesian.programs import predictive
from bayes_klrl.models.torch_lm.adapters import import_peft
from bayes_klrl.models.torch_lm.offsets import restored_family
from bayes_klrl.posterior import Posterior
from bayes_klrl.whole_files import whole_folder

__all__ = ["read_fit", "save_fit"]

_FORMAT = "bayes_klrl.BayesianFit/1"
_START = "start."
_ARRAYS, _ADAPTER = "policies.safetensors", "adapter"


class Saved(Protocol):
    """The fields of a `BayesianFit` that are written; it documents them."""

    @property
    def recipe(self) -> Any:
        """The `BayesianSVI`, a dataclass."""

    @property
    def seed(self) -> int:
        """Seed for all random numbers of the fit."""

    @property
    def family(self) -> Any:
        """The policies at an offset."""

    @property
    def training(self) -> Cost:
        """Seconds and tokens of the training."""

    @property
    def interrupted(self) -> bool:
        """Whether the training was interrupted."""

    @property
    def history(self) -> Any:
        """Arrays of one value per step, by name."""

    @property
    def mu(self) -> np.ndarray:
        """Means, shape (D,)."""

    @property
    def sigma(self) -> np.ndarray:
        """Standard deviations, shape (D,)."""


def save_fit(fit: Saved, file: Path) -> None:
    """Write a fit into the folder of `file`, and its header into `file`; see `BayesianFit.save`."""
    recipe = {f.name: getattr(fit.recipe, f.name) for f in dataclasses.fields(fit.recipe)}
    adapter = None if isinstance(recipe["parameters"], str) else recipe["parameters"]
    if adapter is not None:
        recipe["parameters"] = None
    header = {
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
    with whole_folder(file.parent, last=(file.name,)) as unfinished:
        if adapter is not None:
            adapter.save_pretrained(unfinished / _ADAPTER)
        save_file(arrays, unfinished / _ARRAYS)
        (unfinished / file.name).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def read_fit(file: Path, posterior: Posterior) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the recipe, and the other arguments of the `BayesianFit`; see `BayesianFit.load`."""
    folder = file.parent
    try:
        header: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise CheckpointError(f"{folder} is of format {header['format']!r}, not {_FORMAT!r}.")
        arrays = load_file(folder / _ARRAYS)
        mu, sigma = arrays.pop("mu").numpy(), arrays.pop("sigma").numpy()
        recipe = dict(header["recipe"])
        if recipe["parameters"] is None:
            recipe["parameters"] = import_peft().PeftConfig.from_pretrained(str(folder / _ADAPTER))
        prior_digest, seed = str(header["prior"]), header["seed"]
        num_predictive, training = recipe["num_predictive"], Cost(**header["training"])
        history = {name: np.array(values) for name, values in header["history"].items()}
        interrupted = header["interrupted"]
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold a readable BayesianFit: {error}") from error
    start = {name.removeprefix(_START): value for name, value in arrays.items()}
    family = restored_family(posterior.prior, recipe["parameters"], start, prior_digest)
    return recipe, {
        "guide": predictive(family, mu, sigma, num_predictive, seed),
        "history": history,
        "posterior": posterior,
        "training": training,
        "interrupted": interrupted,
        "mu": mu,
        "sigma": sigma,
        "seed": seed,
        "family": family,
    }
