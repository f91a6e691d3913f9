"""Checkpoints: all that the rest of a training depends on, in one file that is written whole or not at all.

A training that goes on from its checkpoint ends with the guide of one that was never interrupted, to the bit. The file holds
arrays by name (the guide's parameters, the optimizer, the critic, the random state, the history) and what they belong to: the
recipe, the seed, the backend with its version, and the posterior, of which prior and reward are compared by their numbers on a
few completions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.errors import CheckpointError
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import generator
from bayes_klrl.sequences import Sequences, completion_lengths
from bayes_klrl.whole_files import UNFINISHED, write_whole

__all__ = ["FILE", "differences_of", "fingerprint", "lasting_name", "read_checkpoint", "write_checkpoint"]

FILE = "training.safetensors"
_FORMAT = "bayes_klrl training 1"
_NUM_PROBES = 4
_CLOSE = 1e-3


def fingerprint(posterior: Posterior, plan: Any, seed: int, backend: str, version: str) -> dict[str, Any]:
    """Return what a checkpoint belongs to, as JSON."""
    tokens = generator(0).integers(0, posterior.prior.vocab_size, (1, _NUM_PROBES, posterior.max_new_tokens))
    tokens = np.repeat(tokens, posterior.num_prompts, axis=0)
    probes = Sequences(tokens, completion_lengths(tokens, posterior.prior.eos_token_ids))
    return {
        "seed": int(seed),
        "recipe": plan,
        "backend": backend,
        "version": version,
        "prompts": [list(ids) for ids in posterior.prompt_ids],
        "max_new_tokens": posterior.max_new_tokens,
        "alpha": posterior.alpha,
        "prior": posterior.log_prior(probes).tolist(),
        "reward": posterior.reward(probes).tolist(),
    }


def lasting_name(value: object) -> str:
    """Return the text by which a checkpoint knows a setting: the same in another process.

    Functions are known by their module and name, since their addresses change, and lambdas and functions inside of others by
    their code too. Sets are written in order: the order of strings in a set is another one in every process.

    Examples
    --------
    >>> lasting_name(len), lasting_name(0.5), lasting_name(object()), lasting_name({"b", "a"})
    ('builtins.len', '0.5', '<object object>', "{'a', 'b'}")
    """
    name = getattr(value, "__qualname__", None)
    if name is None:
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
        return re.sub(r"\{([^{}:]*)\}", lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", text)
    code = getattr(value, "__code__", None)
    if code is None or "<" not in name:
        return f"{value.__module__}.{name}"
    constants = [constant for constant in code.co_consts if not hasattr(constant, "co_code")]
    text = repr((code.co_code, code.co_names, constants))
    return f"{value.__module__}.{name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def write_checkpoint(folder: str | Path, arrays: Mapping[str, Any], belongs_to: Mapping[str, Any]) -> Path:
    """Write a checkpoint into a folder, in place of an earlier one, and return its file.

    Parameters
    ----------
    folder
        The folder, which is made if it is not there.
    arrays
        Arrays of torch, or of NumPy, by name.
    belongs_to
        What `fingerprint` returned, and the number of steps under "step".

    Raises
    ------
    OutputError
        If it cannot be written; an earlier checkpoint is as it was.
    """
    if any(type(array).__module__.startswith("torch") for array in arrays.values()):
        from safetensors.torch import save

        content = save(
            {name: array.detach().cpu().contiguous() for name, array in arrays.items()}, _metadata(belongs_to)
        )
    else:
        from safetensors.numpy import save as save_numpy

        content = save_numpy(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, _metadata(belongs_to)
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)  # that it can be made was checked before the training
    return write_whole(folder / FILE, content)


def _metadata(belongs_to: Mapping[str, Any]) -> dict[str, str]:
    return {"format": _FORMAT, "belongs_to": json.dumps(belongs_to)}


def read_checkpoint(folder: str | Path, expected: Mapping[str, Any], framework: str) -> tuple[dict[str, Any], int]:
    """Return the arrays of a checkpoint, and the number of steps before it.

    Parameters
    ----------
    folder
        The folder that `write_checkpoint` wrote into.
    expected
        What `fingerprint` returns for the training that goes on.
    framework
        "pt" for torch, "np" for NumPy.

    Raises
    ------
    CheckpointError
        If there is no whole checkpoint, or it belongs to another training; each difference is named.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / FILE
    if not file.is_file():
        unfinished = any(Path(folder).glob(f"{UNFINISHED}*"))
        why = (
            "only one that was not finished: the training was stopped while it wrote its first"
            if unfinished
            else "none"
        )
        raise CheckpointError(
            f"{str(folder)!r} should hold the checkpoint of a training, {FILE}, and holds {why}. Leave out resume= to start "
            "anew."
        )
    try:
        with safe_open(file, framework=framework) as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dictionary)
        found = json.loads(metadata.get("belongs_to", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"The checkpoint {str(file)!r} cannot be read: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{str(file)!r} is no checkpoint of a training by this version of bayes_klrl.")
    shown = differences_of(found, expected, "there", "here")
    if shown:
        raise CheckpointError(
            f"The checkpoint in {str(folder)!r} belongs to another training ({shown}). Go on with the posterior, the recipe "
            "and the seed that it was begun with, or leave out resume= to start anew."
        )
    return arrays, int(found["step"])


def differences_of(first: Mapping[str, Any], second: Mapping[str, Any], there: str, here: str) -> str:
    """Return the words that name how the first of two fingerprints differs from the second, numbers up to rounding; "" if not.

    Parameters
    ----------
    first, second
        What two trainings belong to, as `fingerprint` returns it.
    there, here
        The words for where the first and the second are.

    Examples
    --------
    >>> differences_of({"seed": 0, "alpha": 0.5}, {"seed": 1, "alpha": 0.5}, "there", "here")
    'seed: 0 there, 1 here'
    """
    plain = json.loads(json.dumps(dict(second)))
    names = [name for name, value in plain.items() if not _same(first.get(name), value)]
    return "; ".join(_difference(name, first.get(name), plain[name], there, here) for name in names)


def _difference(name: str, first: Any, second: Any, there: str, here: str) -> str:
    """Return the words that name a difference; of a recipe, its fields that differ."""
    if isinstance(first, dict) and isinstance(second, Mapping):
        fields = [field for field in {**first, **second} if first.get(field) != second.get(field)]
        return ", ".join(
            f"{name} {each}: {_short(first.get(each))} {there}, {_short(second.get(each))} {here}" for each in fields
        )
    return f"{name}: {_short(first)} {there}, {_short(second)} {here}"


def _same(first: Any, second: Any) -> bool:
    """Return whether two entries are equal, numbers up to rounding."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, float) or isinstance(second, float):
        return bool(np.isclose(float(first or 0), float(second or 0), rtol=_CLOSE, atol=_CLOSE, equal_nan=True))
    return bool(first == second)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
