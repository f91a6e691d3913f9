"""The training loop that every backend shares: it runs the steps, keeps the history, and ends early without loss.

The loop is `trained`; a backend gives it the steps and the guide so far. This module uses neither torch nor JAX.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import numpy as np

from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["TrainingPlan", "run_training", "trained"]


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


def trained(
    plan: TrainingPlan,
    posterior: Posterior,
    steps: Iterable[Mapping[str, float]],
    guide_so_far: Callable[[], LanguageModel],
    *,
    start: float,
    progress: bool,
) -> Fit:
    """Return the guide after all steps, or after those before Ctrl-C; see `run_training`.

    Parameters
    ----------
    plan, posterior
        The numbers of the training, and the posterior that the guide approximates.
    steps
        See `run_training`; each item has "elbo", "reward" and "kl" among its keys.
    guide_so_far
        Returns the guide after the newest step.
    start, progress
        See `run_training`.
    """

    def fit_so_far(history: Mapping[str, FloatArray], cost: Cost, interrupted: bool) -> Fit:
        return Fit(guide_so_far(), history, posterior, cost, interrupted)

    def status(step: Mapping[str, float]) -> str:
        return f"ELBO {step['elbo']:.3f} nats, E[r] {step['reward']:.3f}, KL {step['kl']:.3f}"

    return run_training("SVI", plan.num_steps, steps, fit_so_far, status, start=start, progress=progress)


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

    Raises
    ------
    BayesKLRLError
        The error that a step raised; after the first step its attribute `fit` holds the fit so far.
    """
    history: dict[str, list[float]] = defaultdict(list)
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
    except BayesKLRLError as error:
        if history["seconds"]:
            error.fit = fit()
            error.add_note(f"This error's `fit` holds what was learned in the {len(history['seconds'])} steps before.")
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
