"""The checkpoints of a run, and which of them are whole: a trainer may be writing the last one at this moment.

transformers writes the weights first and trainer_state.json last, so a checkpoint without it is not finished, if others have
one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bayes_klrl.analysis.certificate.training_runs.trainer_log import STATE, checkpoint_number
from bayes_klrl.errors import CheckpointError

__all__ = ["Checkpoints", "checkpoints_in"]

_BEING_WRITTEN = re.compile(r"\.?te?mp[-_.].*checkpoint.*|checkpoint-\d+\.te?mp.*")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Parameters
    ----------
    whole
        The folders of whole checkpoints by step, ascending.
    skipped
        Why a checkpoint is not among them, by the name of its folder.
    """

    whole: Mapping[int, Path]
    skipped: Mapping[str, str]


def checkpoints_in(folder: Path) -> Checkpoints:
    """Return the checkpoints of a run's folder; no weight is loaded.

    Raises
    ------
    CheckpointError
        If the folder does not exist, or has no whole checkpoint in it; the message names those that are not whole.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {str(folder)!r} to look for checkpoints in.")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    numbered = sorted((number, path) for path in inside if (number := checkpoint_number(path)) is not None)
    has_states = any((path / STATE).is_file() for _, path in numbered)
    skipped = {path.name: "it is being written" for path in inside if _BEING_WRITTEN.fullmatch(path.name)}
    whole: dict[int, Path] = {}
    for number, path in numbered:
        reason = why_not_whole(path, has_states)
        if reason is None and number in whole:
            reason = f"{whole[number].name} has the same number"
        if reason is None:
            whole[number] = path
        else:
            skipped[path.name] = reason
    if not whole:
        found = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise CheckpointError(
            f"{str(folder)!r} has no whole checkpoint-N in it{f' ({found})' if found else ''}. Give the folder that a trainer "
            "writes its checkpoints into; for a single model leave out --all-checkpoints, or call bk.certify."
        )
    return Checkpoints(whole, skipped)


def why_not_whole(folder: Path, has_states: bool) -> str | None:
    """Return what is missing from a checkpoint, None if nothing is.

    Parameters
    ----------
    folder
        The checkpoint.
    has_states
        Whether other checkpoints of the run have a trainer_state.json.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "it has neither config.json nor adapter_config.json, so it is being written or is no model"
    weights = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"its {index.name} is not whole, so it is being written or damaged"
        if missing := sorted(listed - weights):
            return f"it lacks {missing[0]}, so it is being written or damaged"
    if not weights:
        return "it has no safetensors weights, so it is being written, or they are pickles, which are not read"
    for name in sorted(weights):
        if not is_whole(folder / name):
            return f"its {name} is not whole, so it is being written or damaged"
    if has_states and not (folder / STATE).is_file():
        return f"it has no {STATE} yet, which a trainer writes last"
    return None


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says; the header alone is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False
