"""The training loop that every backend shares: it runs the steps, keeps the history, and ends early without loss.

The loop is `trained`; a backend gives it the steps and the guide so far. This module uses neither torch nor JAX.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from bayes_klrl.draws import Cost
from bayes_klrl.inference.svi.callbacks import Callback, Checkpoint, StepRecord, call_all, close_all
from bayes_klrl.inference.svi.callbacks.alphas import alpha_schedule, has_settled
from bayes_klrl.inference.svi.checkpoint import read_checkpoint, write_checkpoint
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.inference.svi.ranks.group import ALONE, Ranks
from bayes_klrl.inference.svi.ranks.interruption import Interruption
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["Habits", "Training", "TrainingPlan", "run_training", "trained"]

_HISTORY = "history."


class TrainingPlan(Protocol):
    """The numbers that a backend needs to train a guide; `SVI` has and documents them."""

    @property
    def num_steps(self) -> int:
        """Number of gradient steps."""

    @property
    def num_particles(self) -> int:
        """Number of completions per prompt and step."""

    @property
    def learning_rate(self) -> float | None:
        """Adam's peak rate; None: the backend's default for the kind of guide."""

    @property
    def estimator(self) -> str:
        """Name of the gradient estimator."""

    @property
    def adapter(self) -> Any:
        """None for a full copy of the prior, else the kind of adapter."""

    @property
    def max_step_kl(self) -> float:
        """The most nats that a step may move the guide."""

    @property
    def prompts_per_step(self) -> int | None:
        """Number of prompts that each step uses; None: all."""

    @property
    def objective(self) -> Any:
        """What is minimised: a name or an objective."""

    @property
    def optimizer(self) -> Any:
        """The optimizer: a name or a recipe; None: Adam."""

    @property
    def twist(self) -> Any:
        """The critic: a twist or a recipe of one; None: none."""

    @property
    def discount(self) -> float:
        """Lambda of the critic's advantages."""

    @property
    def initial_guide(self) -> Any:
        """The policy that training starts from; None: the prior."""

    @property
    def particles_per_pass(self) -> int | None:
        """Number of completions per prompt that are differentiated at once; None: all."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations inside blocks are computed again in the backward pass."""


class Training(Protocol):
    """A training of one backend, step by step."""

    def step(self, number: int) -> Mapping[str, float]:
        """Take a step, and return its means over prompts in nats, by name, and under "tokens" the model tokens.

        Parameters
        ----------
        number
            The number of the step, from 0; with the seed it chooses the step's prompts.
        """

    def guide_so_far(self) -> LanguageModel:
        """Return the guide after the newest step."""

    def aim_at(self, posterior: Posterior) -> None:
        """Take the next steps towards the posterior of another alpha."""

    def saved(self) -> dict[str, Any]:
        """Return all arrays that later steps depend on, by name."""

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Go on from what `saved` returned."""


@dataclass(frozen=True)
class Habits:
    """What surrounds the steps of a training; see `SVI.fit`.

    Parameters
    ----------
    callbacks
        Who looks at each step.
    checkpoint
        Where and how often checkpoints are written; None: none are.
    resume
        The folder of the checkpoint to go on from; None: the training begins.
    belongs_to
        What checkpoints belong to, see `checkpoint.fingerprint`.
    framework
        "pt" or "np", the arrays of the state.
    ranks
        The group of processes that train together. Rank 0 calls the callbacks and writes; all do as it decides.
    """

    callbacks: Sequence[Callback] = ()
    checkpoint: Checkpoint | None = None
    resume: str | Path | None = None
    belongs_to: Mapping[str, Any] = field(default_factory=dict)
    framework: str = "pt"
    ranks: Ranks = ALONE


def trained(
    plan: TrainingPlan, posterior: Posterior, training: Training, habits: Habits, *, start: float, progress: bool
) -> Fit:
    """Return the guide after all steps, or after those before Ctrl-C; see `run_training`.

    Parameters
    ----------
    plan, posterior
        The numbers of the training, and the posterior that the guide approximates.
    training
        The training of a backend.
    habits
        Callbacks and checkpoints.
    start, progress
        See `run_training`.
    """
    history: dict[str, list[float]] = defaultdict(list)
    first, ranks = 0, habits.ranks
    if habits.resume is not None:
        with ranks.together():
            arrays, first = read_checkpoint(habits.resume, habits.belongs_to, habits.framework)
        training.restore({name: array for name, array in arrays.items() if not name.startswith(_HISTORY)})
        for name, array in arrays.items():
            if name.startswith(_HISTORY):
                history[name.removeprefix(_HISTORY)] = np.asarray(array, dtype=np.float64).tolist()
    before = history["seconds"][-1] if history["seconds"] else 0.0
    schedule = alpha_schedule(habits.callbacks)

    def aim(history: Mapping[str, Sequence[float] | FloatArray]) -> Posterior:
        """The posterior of the newest step's alpha."""
        return posterior if schedule is None or not len(history["alpha"]) else posterior.at_alpha(history["alpha"][-1])

    def fit_so_far(history: Mapping[str, FloatArray], cost: Cost, interrupted: bool) -> Fit:
        return Fit(training.guide_so_far(), history, aim(history), cost, interrupted)

    def status(step: Mapping[str, float]) -> str:
        return f"ELBO {step['elbo']:.3f} nats, E[r] {step['reward']:.3f}, KL {step['kl']:.3f}"

    def write(number: int) -> None:
        assert habits.checkpoint is not None
        state = training.saved()  # on all ranks: some may have to give their part
        with ranks.together():
            if ranks.is_first:
                kept = {f"{_HISTORY}{name}": _array(values, habits.framework) for name, values in history.items()}
                write_checkpoint(habits.checkpoint.folder, {**state, **kept}, {**habits.belongs_to, "step": number})

    def look(number: int, values: Mapping[str, float]) -> bool:
        """Call the callbacks, on rank 0, and return whether one of them ends the training."""
        ended = False
        guide = training.guide_so_far() if ranks.size > 1 and habits.callbacks else None  # which may take all ranks
        with ranks.together():
            if ranks.is_first:
                settled = has_settled(schedule, number, plan.num_steps, history, posterior)
                record = StepRecord(number, plan.num_steps, values, history, aim(history), plan, settled)
                ended = call_all(habits.callbacks, record, training.guide_so_far if guide is None else lambda: guide)
        return ranks.of_first(ended)

    def is_due(number: int, ended: bool) -> bool:
        every = None if habits.checkpoint is None else habits.checkpoint.every
        return every is not None and (ended or (number + 1) % every == 0 or number + 1 == plan.num_steps)

    def steps() -> Iterator[Mapping[str, float]]:
        for number in range(first, plan.num_steps):
            alpha = {}
            if schedule is not None:
                with ranks.together():
                    found = schedule.next_alpha(number, plan.num_steps, history, posterior) if ranks.is_first else 0.0
                alpha["alpha"] = ranks.of_first(found)
                training.aim_at(posterior.at_alpha(alpha["alpha"]))
            values = {**training.step(number), **alpha}
            if number == 0:  # what the schedule has read to begin with
                values["tokens"] += getattr(schedule, "model_tokens", 0)
            yield values  # the history has them from here on
            try:
                ended = look(number, values)
            except BaseException:
                if habits.checkpoint is not None:
                    write(number + 1)
                raise
            if is_due(number, ended):
                write(number + 1)
            if ended:
                return
            interruption.check()

    try:
        with Interruption(ranks) as interruption:
            return run_training(
                "SVI",
                plan.num_steps - first,
                steps(),
                fit_so_far,
                status,
                start=start - before,
                progress=progress and ranks.is_first,
                history=history,
            )
    finally:
        if ranks.is_first:
            close_all(habits.callbacks)


def _array(values: list[float], framework: str) -> Any:
    """Return a list of numbers as an array of the framework."""
    if framework == "np":
        return np.array(values)
    import torch

    return torch.tensor(values, dtype=torch.float64, device="cpu")


FitT = TypeVar("FitT", bound=Fit)


def run_training(
    name: str,
    num_steps: int,
    steps: Iterable[Mapping[str, float]],
    fit_so_far: Callable[[Mapping[str, FloatArray], Cost, bool], FitT],
    status: Callable[[Mapping[str, float]], str],
    *,
    start: float,
    progress: bool,
    history: dict[str, list[float]] | None = None,
) -> FitT:
    """Return the fit after all steps, or after those before Ctrl-C.

    Parameters
    ----------
    name, num_steps
        Name of the training and its number of steps, for the progress display.
    steps
        The training, one item per step: means over prompts in nats, by name, and under "tokens" the number of tokens that
        went through a model.
    fit_so_far
        Function that returns the fit after the newest step, given the history, the cost, and whether it was interrupted.
    status
        Function that returns the text that the progress display shows for a step.
    start
        `time.perf_counter()` at the beginning of the training.
    progress
        Whether to show progress.
    history
        The values of earlier steps by name, to which those of the steps are added; None: there are none.

    Raises
    ------
    BayesKLRLError
        The error that a step raised; after the first step its attribute `fit` holds the fit so far.
    """
    history = defaultdict(list) if history is None else history
    interrupted: list[bool] = []

    def fit() -> FitT:
        cost = Cost(training_tokens=int(sum(history["tokens"])), training_seconds=time.perf_counter() - start)
        arrays = {name: np.array(values) for name, values in history.items() if name != "tokens"}
        return fit_so_far(arrays, cost, bool(interrupted))

    try:
        with _kept_on_interrupt(name, history, interrupted), track(name, num_steps, progress) as advance:
            for step in steps:
                for key, value in step.items():
                    history[key].append(value)
                history["seconds"].append(time.perf_counter() - start)
                advance(status=status(step))
    except Exception as error:  # those of callbacks, too
        if history["seconds"]:
            with suppress(AttributeError):  # an error with slots has no room
                setattr(error, "fit", fit())  # noqa: B010  (which mypy knows of our own errors alone)
                error.add_note(
                    f"This error's `fit` holds what was learned in the {len(history['seconds'])} steps before."
                )
        raise
    return fit()


@contextmanager
def _kept_on_interrupt(name: str, history: dict[str, list[float]], interrupted: list[bool]) -> Iterator[None]:
    """Turn Ctrl-C after the first step into the end of training, and note it in `interrupted`."""
    try:
        yield
    except KeyboardInterrupt:
        if not history["seconds"]:
            raise
        interrupted.append(True)
        with suppress(UserWarning):  # where warnings are errors: what was learned matters more
            warnings.warn(
                f"{name} was interrupted after {len(history['seconds'])} steps. What it learned is kept: the returned Fit has "
                "the guide so far (fit.guide), and fit.save(folder) writes it.",
                stacklevel=7,
            )
