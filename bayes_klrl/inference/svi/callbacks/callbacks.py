"""Callbacks: who looks at a training after each step, and may end it.

A callback is a function of the step's record and of the guide so far; it ends the training by returning True. One that has
the method `close()` is told when the training has ended. Checkpoints are written by `SVI.fit(checkpoint=...)`, since only the
training knows its whole state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import LanguageModel
from bayes_klrl.whole_files import check_folder

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "StepRecord", "call_all", "close_all"]


@dataclass(frozen=True, eq=False)
class StepRecord:
    """What a callback sees of a step.

    Parameters
    ----------
    step, num_steps
        The number of the step, from 0, and the number of steps of the whole training.
    values
        The step's means over prompts in nats, by the names of `Fit.history`.
    history
        The values of all steps so far by the same names, this step's last; those before a resume included.
    posterior
        The posterior that the guide approximates.
    recipe
        The recipe of the training, an `SVI`; None where a record is made by hand.
    settled
        Whether alpha has come to what it is to be; False while a schedule still moves it on purpose.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> def enough(record, guide):
    ...     return record.values["kl"] > 0.1
    >>> fit = bk.SVI(200).fit(posterior, seed=0, callbacks=[enough])
    >>> len(fit.history["kl"]) < 200
    True
    """

    step: int
    num_steps: int
    values: Mapping[str, float]
    history: Mapping[str, Sequence[float]]
    posterior: Posterior
    recipe: Any = None
    settled: bool = True

    @property
    def logged(self) -> dict[str, float]:
        """The values under the names of logs, in nats: elbo, kl_to_prior, log_weight_sd, step_kl; and ess and reward."""
        names = {"kl": "kl_to_prior"}
        return {names.get(name, name): value for name, value in self.values.items() if name != "tokens"}


@dataclass(frozen=True)
class Checkpoint:
    """Write the whole state of the training into a folder, whole or not at all; `SVI.fit(checkpoint=...)` takes it.

    Parameters
    ----------
    folder
        The folder, which is made if it is not there.
    every
        Number of steps between two checkpoints.

    Raises
    ------
    OutputError
        If the folder cannot be made or written into.

    Examples
    --------
    >>> import tempfile, numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior, svi = bk.Posterior(coin, longer, max_new_tokens=3), bk.SVI(30)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit = svi.fit(posterior, seed=0, checkpoint=bk.Checkpoint(folder, every=5))
    ...     again = svi.fit(posterior, seed=0, resume=folder)  # which had ended
    >>> bool((fit.history["elbo"] == again.history["elbo"]).all())
    True
    """

    folder: str | Path
    every: int = 10

    def __post_init__(self) -> None:
        check_count("every", self.every)
        if not isinstance(self.folder, str | Path) or Path(self.folder).is_file():
            raise BayesKLRLError(
                f"A checkpoint is written into a folder; {self.folder!r} is none. Give the name of a folder."
            )
        check_folder(self.folder)


Callback: TypeAlias = Callable[[StepRecord, LanguageModel], bool | None]
"""`callback(record, guide)` after each step; True ends the training.

If it has a method `close()`, this is called once when the training ends: after the last step, by another callback, by an error
or by Ctrl-C. It may be used in another training afterwards. An error in `close()` becomes a warning, since what was learned
matters more."""


@dataclass(frozen=True)
class EarlyStopping:
    """End the training once the guide is near its posterior.

    Near the optimum the KL to the posterior is about half the variance of log w. The training ends when a moving mean of that
    is below `gap` nats, but not in the first `least_steps`, nor while a schedule still moves alpha. Draws of likelihood 0, a
    share 1 - A of them, add -log A. A gap of a few draws per step is rough: with `ForwardKL` on a sampler it is of the
    sampler's draws.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(200).fit(posterior, seed=0, callbacks=[bk.EarlyStopping(gap=0.1, least_steps=5)])
    >>> 5 <= len(fit.history["elbo"]) < 200
    True
    """

    gap: float
    least_steps: int = 10

    def __post_init__(self) -> None:
        check_positive("gap", self.gap)
        check_count("least_steps", self.least_steps)

    def __call__(self, record: StepRecord, guide: LanguageModel) -> bool:
        """Return whether the gap is small enough."""
        gaps = [sd**2 / 2 for sd in record.history["log_weight_sd"]]
        mean = gaps[0]
        for gap in gaps[1:]:
            mean = 0.8 * mean + 0.2 * gap
        return record.settled and record.step + 1 >= self.least_steps and mean < self.gap


def call_all(callbacks: Sequence[Callback], record: StepRecord, guide_so_far: Callable[[], LanguageModel]) -> bool:
    """Call all callbacks, and return whether one of them ends the training."""
    if not callbacks:
        return False
    guide, ended = guide_so_far(), False
    for callback in callbacks:  # all of them, also after one that ends the training
        ended |= bool(callback(record, guide))
    return ended


def close_all(callbacks: Sequence[Callback]) -> None:
    """Call `close()` of all callbacks that have it; an error in one of them becomes a warning."""
    for callback in callbacks:
        close = getattr(callback, "close", None)
        if not callable(close):
            continue
        try:
            close()
        except Exception as error:  # whatever a logger raises, the training is over and its guide is kept
            with suppress(UserWarning):  # where warnings are errors, too
                warnings.warn(
                    f"{type(callback).__name__}.close() raised {type(error).__name__}: {error}. The training itself has ended "
                    "as it should; only what this callback does at the end is missing.",
                    stacklevel=3,
                )
