"""What training a guide is on every backend: the schedule of step lengths, the history, and how it ends early.

The loop is `trained`; a backend gives it steps and the guide so far. Nothing here knows torch or JAX.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError, UnboundedLossError
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.typing import LanguageModel

if TYPE_CHECKING:
    from bayes_klrl.inference.svi import SVI, Fit

__all__ = ["MAX_GRADIENT_NORM", "StepLimit", "learning_rate_schedule", "no_adapter", "trained", "unbounded_loss"]

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
    """Return the guide after all steps, or after those before Ctrl-C.

    Parameters
    ----------
    svi, posterior
        What is done to what.
    steps
        The training: each item says what a step saw, means over prompts in nats, "elbo", "reward" and "kl" among them, and
        under "tokens" how many went through a model.
    guide_so_far
        Returns the guide after the newest step.
    start
        `time.perf_counter()` at the beginning.
    progress
        Whether to show it.

    Raises
    ------
    BayesKLRLError
        Whatever a step raises; after the first step with what was learned as its attribute `fit`.
    """
    from bayes_klrl.inference.svi import Fit

    history: dict[str, list[float]] = defaultdict(list)
    interrupted: list[bool] = []

    def fit_so_far() -> Fit:
        return Fit(
            guide=guide_so_far(),
            history={name: np.array(values) for name, values in history.items() if name != "tokens"},
            posterior=posterior,
            training=Cost(training_tokens=int(sum(history["tokens"])), training_seconds=time.perf_counter() - start),
            interrupted=bool(interrupted),
        )

    try:
        with _kept_on_interrupt(history, interrupted), track("SVI", svi.num_steps, progress) as advance:
            for step in steps:
                for name, value in step.items():
                    history[name].append(value)
                history["seconds"].append(time.perf_counter() - start)
                advance(status=f"ELBO {step['elbo']:.3f} nats, E[r] {step['reward']:.3f}, KL {step['kl']:.3f}")
    except BayesKLRLError as error:
        if history["seconds"]:
            error.fit = fit_so_far()
            error.add_note(f"The guide after the {len(history['seconds'])} steps before is in this error's `fit`.")
        raise
    return fit_so_far()


@contextmanager
def _kept_on_interrupt(history: dict[str, list[float]], interrupted: list[bool]) -> Iterator[None]:
    """Turn Ctrl-C after the first step into the end of training, and note it in `interrupted`."""
    try:
        yield
    except KeyboardInterrupt:
        if not history["seconds"]:
            raise
        interrupted.append(True)
        with suppress(UserWarning):  # where warnings are errors: what was learned matters more
            warnings.warn(
                f"SVI was interrupted after {len(history['seconds'])} steps. What it learned is kept: the guide so far is "
                "in the returned Fit (fit.guide), and fit.save(folder) writes it.",
                stacklevel=6,
            )


def no_adapter(prior: LanguageModel, adapter: object) -> None:
    """Refuse an adapter for a model that has no place for it."""
    if adapter is not None:
        raise BayesKLRLError(f"Adapters are for a bk.TorchLM; the prior is a {type(prior).__name__}. Use adapter=None.")


def unbounded_loss(lm: LanguageModel, ids: Sequence[int]) -> UnboundedLossError:
    """Return the error about a completion of likelihood 0 that the guide drew."""
    text = f"{lm.decode([ids])[0]!r} (ids {ids})" if lm.tokenizer is not None else f"with ids {ids}"
    return UnboundedLossError(
        f"The guide drew the completion {text}, whose likelihood is 0, so its ELBO is -inf and has no gradient. "
        "Relax the constraint: a reward of alpha * log(eps) instead of -inf (say eps = 1e-3), or use bk.SMC."
    )
