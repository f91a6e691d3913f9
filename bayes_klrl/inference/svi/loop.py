"""What training a guide is on every backend: the schedule of step lengths, the history, and how it ends early.

The loop is `trained`; a backend gives it steps and the guide so far. Nothing here knows torch or JAX.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError, UnboundedLossError
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.typing import FloatArray, LanguageModel

if TYPE_CHECKING:
    from bayes_klrl.inference.svi.svi import SVI, Fit

__all__ = [
    "MAX_GRADIENT_NORM",
    "StepLimit",
    "check_same_latents",
    "completion_text",
    "learning_rate_schedule",
    "no_adapter",
    "no_density",
    "run_training",
    "trained",
    "unbounded_loss",
]

MAX_GRADIENT_NORM = 1.0
"""Longer gradients are shortened to this."""

_WARM_UP = 0.05
_CALM = 0.1
_CALM_STEPS = 10


def learning_rate_schedule(num_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: up over the first 5 %, then linearly down to 0."""
    warm_up = max(1, round(_WARM_UP * num_steps))
    return lambda step: min((step + 1) / warm_up, (num_steps - step) / max(1, num_steps - warm_up), 1.0)


class StepLimit:
    """How much of each step to take, so that none moves the guide by more than `max_kl` nats; see `svi_trust_region`.

    Measuring costs a forward pass, so after a step below a tenth of `max_kl` the next nine are not measured.

    Parameters
    ----------
    max_kl
        In nats; inf: never measure.

    Attributes
    ----------
    last_kl
        How far the newest step went, in nats; NaN if it was not measured.

    Examples
    --------
    >>> limit = StepLimit(0.04)
    >>> limit.is_due(), limit.share(0.16), limit.last_kl
    (True, 0.5, 0.04)
    """

    def __init__(self, max_kl: float) -> None:
        self._max_kl = max_kl
        self._unmeasured = 0
        self.last_kl = float("nan")

    def is_due(self) -> bool:
        """Return whether the step about to be taken is to be measured."""
        self.last_kl = float("nan")
        if self._max_kl == float("inf"):
            return False
        self._unmeasured -= self._unmeasured > 0
        return self._unmeasured == 0

    def share(self, kl: float) -> float:
        """Return the share to take of a step that went `kl` nats far."""
        self.last_kl = min(kl, self._max_kl)
        if kl > self._max_kl:
            return float((self._max_kl / kl) ** 0.5)
        if kl < _CALM * self._max_kl:
            self._unmeasured = _CALM_STEPS
        return 1.0


def trained(
    svi: SVI,
    posterior: Posterior,
    steps: Iterable[Mapping[str, float]],
    guide_so_far: Callable[[], LanguageModel],
    *,
    start: float,
    progress: bool,
) -> Fit:
    """Return the guide of an `SVI` after all steps, or after those before Ctrl-C; see `run_training`.

    Parameters
    ----------
    svi, posterior
        What is done to what.
    steps
        See `run_training`; "elbo", "reward" and "kl" are among what each says.
    guide_so_far
        Returns the guide after the newest step.
    start, progress
        See `run_training`.
    """
    from bayes_klrl.inference.svi.svi import Fit

    def fit_so_far(history: Mapping[str, FloatArray], cost: Cost, interrupted: bool) -> Fit:
        return Fit(guide_so_far(), history, posterior, cost, interrupted)

    def status(step: Mapping[str, float]) -> str:
        return f"ELBO {step['elbo']:.3f} nats, E[r] {step['reward']:.3f}, KL {step['kl']:.3f}"

    return run_training("SVI", svi.num_steps, steps, fit_so_far, status, start=start, progress=progress)


FitT = TypeVar("FitT", bound="Fit")


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
    """Return what was fitted after all steps, or after those before Ctrl-C.

    Parameters
    ----------
    name, num_steps
        Of the training, for its progress.
    steps
        The training: each item says what a step saw, means over prompts in nats, and under "tokens" how many went through a
        model.
    fit_so_far
        Returns what is fitted after the newest step, given the history, the cost, and whether it was interrupted.
    status
        What progress says of a step.
    start
        `time.perf_counter()` at the beginning.
    progress
        Whether to show it.

    Raises
    ------
    BayesKLRLError
        Whatever a step raises; after the first step with what was learned as its attribute `fit`.
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
            error.add_note(f"What was learned in the {len(history['seconds'])} steps before is in this error's `fit`.")
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
                f"{name} was interrupted after {len(history['seconds'])} steps. What it learned is kept: the guide so far is "
                "in the returned Fit (fit.guide), and fit.save(folder) writes it.",
                stacklevel=7,
            )


def no_adapter(prior: LanguageModel, adapter: object) -> None:
    """Refuse an adapter for a model that has no place for it."""
    if adapter is not None:
        raise BayesKLRLError(
            f"Adapters are for a bk.TorchLM; the prior is a {type(prior).__name__}. Leave the adapter out."
        )


def unbounded_loss(completion: str, what: str = "likelihood") -> UnboundedLossError:
    """Return the error about a completion of likelihood 0 (or of another probability 0) that the guide drew."""
    cure = "Relax the constraint: a reward of alpha * log(eps) instead of -inf (say eps = 1e-3), or use bk.SMC."
    if what == "prior probability":
        cure = "Start the guide as a copy of the prior, which never draws what the prior cannot."
    return UnboundedLossError(
        f"The guide drew the completion {completion}, whose {what} is 0, so its ELBO is -inf and has no gradient. {cure}"
    )


def no_density(name: str, log_prob: float, completion: str) -> BayesKLRLError:
    """Return the error about a log-prob of site `name` that is -inf, inf or NaN where the guide drew a completion."""
    if log_prob == float("-inf"):
        said = {"likelihood": "likelihood", "x": "prior probability"}
        return unbounded_loss(completion, said.get(name, f"probability at the site {name!r}"))
    return BayesKLRLError(
        f"The log-prob of site {name!r} is {log_prob} for the completion {completion}; a log-density is finite or -inf."
    )


def check_same_latents(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """Refuse programs that do not draw the same latents; sites by name, as Pyro's and NumPyro's traces have them alike.

    Raises
    ------
    BayesKLRLError
        Names the site that only the guide draws, auxiliary ones apart, or that it leaves out.
    """
    for name, site in guide.items():
        latent = name in model and not model[name]["is_observed"]
        if not latent and not site["infer"].get("is_auxiliary"):
            raise BayesKLRLError(
                f"The guide draws {name!r}, which is no latent site of the model: its log-density would count for nothing. "
                "Add it to the model, or mark it with infer={'is_auxiliary': True}."
            )
    for name, site in model.items():
        if name not in guide and not site["is_observed"]:
            raise BayesKLRLError(
                f"The model has a latent site {name!r} that the guide does not draw, so there is no density to weigh it "
                "with. Draw it in the guide too."
            )


def completion_text(lm: LanguageModel, ids: Sequence[int]) -> str:
    """Return how to call a completion: its text, if there is one, and its ids."""
    return f"{lm.decode([ids])[0]!r} (ids {ids})" if lm.tokenizer is not None else f"with ids {ids}"
