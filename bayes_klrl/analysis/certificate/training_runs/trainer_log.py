"""What a trainer logged: the `log_history` of trainer_state.json, which transformers and TRL write into each checkpoint.

Read from the source of TRL 1.16: RLOO and GRPO log "kl" **per token** of the completions (RLOO the mean log ratio, GRPO
Schulman's estimate k3 of the same), "completions/mean_length", and "reward", the mean before any penalty; a "kl" is logged if
and only if beta is not 0. PPO and older trainers log "objective/kl", **per completion**. DPO logs "rewards/margins" and SFT
"loss"; neither logs a KL. Row s is measured with the policy before update s, so the policy of checkpoint-N is in the row after
N. beta itself stands in training_args.bin alone, a pickle, which is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.errors import CheckpointError
from bayes_klrl.models.checkpoint_files import TRAINER_STATE, checkpoint_number
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["TrainerLog", "log_of"]

_REWARDS = ("reward", "objective/scores", "rewards/margins", "loss")
_WINDOW = 3  # rows up to a checkpoint that speak for it
_LARGEST_STEP = 2**63 - 1


@dataclass(frozen=True, eq=False)
class TrainerLog:
    """The R rows of a trainer's log.

    Parameters
    ----------
    step
        Number of updates that the policy beside this log has had.
    steps
        The step of each row, (R,), ascending.
    values
        What was logged by name, (R,) each; NaN in rows without it.
    """

    step: int
    steps: IntArray
    values: Mapping[str, FloatArray]

    @classmethod
    def read(cls, file: Path) -> TrainerLog:
        """Return the log in a trainer_state.json.

        Raises
        ------
        CheckpointError
            If the file is not whole, or is no trainer's state, as with a number that no float or no step can be.
        """
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{str(file)!r} cannot be read: {error}. If the trainer is writing it, wait; otherwise remove it, and the "
                "policy is certified without what was logged."
            ) from error
        rows = state.get("log_history") if isinstance(state, dict) else None
        if rows is None:
            rows = []
        if not isinstance(state, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise CheckpointError(f"{str(file)!r} is no trainer's state: its log_history must be a list of rows.")
        rows = sorted((row for row in rows if is_step(row.get("step"))), key=lambda row: row["step"])
        step: Any = state.get("global_step")
        step = step if is_step(step) else rows[-1]["step"] if rows else 0
        names = sorted({name for row in rows for name, value in row.items() if is_number(value)} - {"step"})
        try:
            values = {
                name: np.array([float(row[name]) if is_number(row.get(name)) else np.nan for row in rows])
                for name in names
            }
        except OverflowError as error:
            raise CheckpointError(f"{str(file)!r} is no trainer's state: it logs a number above all floats.") from error
        for each in (step, *(row["step"] for row in rows)):
            if abs(each) > _LARGEST_STEP:
                raise CheckpointError(
                    f"{str(file)!r} is no trainer's state: it has a step of {len(str(abs(each)))} digits."
                )
        return cls(step, np.array([row["step"] for row in rows], dtype=np.int64), values)

    @property
    def reward_name(self) -> str | None:
        """The name of what the trainer improved: its reward, else the margin of DPO, else the loss; None if none is there."""
        return next((name for name in _REWARDS if name in self.values), None)

    @property
    def kl_name(self) -> str | None:
        """The name of the logged KL: "kl" (per token), "objective/kl" (per completion), or None."""
        return next((name for name in ("kl", "objective/kl") if name in self.values), None)

    @property
    def main_names(self) -> list[str]:
        """`reward_name` and `kl_name`, as far as there are any."""
        return [name for name in (self.reward_name, self.kl_name) if name is not None]

    @property
    def without_kl(self) -> bool:
        """Whether an online trainer of TRL logged rewards but no KL, as it does if and only if beta = 0."""
        return {"reward", "frac_reward_zero_std"} <= self.values.keys() and self.kl_name is None

    def rows(self, name: str) -> tuple[IntArray, FloatArray]:
        """Return the steps at which something was logged, and its values."""
        values = self.values.get(name, np.full(self.steps.shape, np.nan))
        known = np.isfinite(values)
        return self.steps[known], values[known]

    def at(self, name: str, step: int) -> float:
        """Return the value logged last up to a step; NaN if there is none."""
        steps, values = self.rows(name)
        before = values[steps <= step]
        return float(before[-1]) if before.size else float("nan")

    def around(self, name: str, step: int) -> FloatArray:
        """Return the last three values logged up to a step, and the first one after it, which is of this step's policy."""
        steps, values = self.rows(name)
        return np.concatenate([values[steps <= step][-_WINDOW:], values[steps > step][:1]])

    def goes_on_in(self, other: TrainerLog) -> bool:
        """Whether another log has all rows of this one, and more: the same training, later."""
        num = len(self.steps)
        return len(other.steps) > num and all(
            np.array_equal(values, other.values.get(name, np.array([]))[:num], equal_nan=True)
            for name, values in {"step": self.steps.astype(float), **self.values}.items()
            if name != "step"
        )


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number; NaN and infinity are, true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_step(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def log_of(folder: Path) -> TrainerLog | None:
    """Return the log of the run that a policy's folder belongs to, with the step of this policy; None if there is none.

    A checkpoint has the log up to its own step. If a later checkpoint beside it goes on with the same rows, its longer log is
    taken. A model beside its checkpoints, as `trainer.save_model` leaves it, has the log of the last one.

    Raises
    ------
    CheckpointError
        If the folder's own log cannot be read.
    """
    number = checkpoint_number(folder)
    own = TrainerLog.read(folder / TRAINER_STATE) if (folder / TRAINER_STATE).is_file() else None
    if number is not None and own is None:
        return None
    run = folder if number is None else folder.parent
    later = [
        path
        for path in run.iterdir()
        if (checkpoint_number(path) or -1) > (number or -1) and (path / TRAINER_STATE).is_file()
    ]
    if not later or (number is None and own is not None):
        return own
    last = max(later, key=lambda path: checkpoint_number(path) or 0)
    try:
        longest = TrainerLog.read(last / TRAINER_STATE)
    except CheckpointError:  # of another checkpoint, which may be being written
        return own
    if own is None:
        return longest
    return replace(longest, step=own.step) if own.goes_on_in(longest) else own
