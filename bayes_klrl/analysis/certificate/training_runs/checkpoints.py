"""The checkpoints of a run, and which of them are whole: a trainer may be writing the last one at this moment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bayes_klrl.errors import CheckpointError
from bayes_klrl.models.checkpoint_files import TRAINER_STATE, checkpoint_number, why_not_whole

__all__ = ["Checkpoints", "checkpoints_in"]

_BEING_WRITTEN = re.compile(r"\.?te?mp[-_.].*checkpoint.*|checkpoint-\d+\.te?mp.*")
_TOO_LARGE = re.compile(r"checkpoint-[0-9]+")


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

    Of two folders with the same number, such as checkpoint-3 and checkpoint-03, the one that a trainer would have named so is
    taken, if it is whole, and the other is skipped.

    Raises
    ------
    CheckpointError
        If the folder does not exist, or has no whole checkpoint in it; the message names those that are not whole.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {str(folder)!r} to look for checkpoints in.")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    numbered = sorted(
        ((number, path) for path in inside if (number := checkpoint_number(path)) is not None),
        key=lambda pair: (pair[0], len(pair[1].name)),
    )
    has_states = any((path / TRAINER_STATE).is_file() for _, path in numbered)
    skipped = {path.name: "it is being written" for path in inside if _BEING_WRITTEN.fullmatch(path.name)}
    skipped |= {
        path.name: "its number is too large for a step"
        for path in inside
        if _TOO_LARGE.fullmatch(path.name) and checkpoint_number(path) is None
    }
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
