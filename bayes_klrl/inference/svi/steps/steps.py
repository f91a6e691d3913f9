"""The length of training steps: the schedule of learning rates, the clipping of gradients, a limit in nats.

Every training loop of the package (SVI on torch and on JAX, `BayesianSVI`, learned twists) takes them from here.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["MAX_GRADIENT_NORM", "StepLimit", "learning_rate_schedule"]

MAX_GRADIENT_NORM = 1.0
"""The largest norm of a gradient; longer gradients are shortened to it."""

_WARM_UP = 0.05
_CALM = 0.1
_CALM_STEPS = 10


def learning_rate_schedule(num_steps: int, warm_up: float = _WARM_UP) -> Callable[[int], float]:
    """Return the factor of the peak learning rate at each step: linear warm-up, then linear decay to 0.

    Parameters
    ----------
    num_steps
        Number of steps of the whole training.
    warm_up
        Share of the steps in which the rate rises; 0: the first step has the peak rate.

    Examples
    --------
    >>> factor = learning_rate_schedule(40)
    >>> [round(factor(step), 3) for step in (0, 1, 2, 21, 39)]
    [0.5, 1.0, 1.0, 0.5, 0.026]
    """
    rising = round(warm_up * num_steps) if warm_up == 0 else max(1, round(warm_up * num_steps))
    if rising == 0:
        return lambda step: 1.0 - step / num_steps
    return lambda step: min((step + 1) / rising, (num_steps - step) / max(1, num_steps - rising), 1.0)


class StepLimit:
    """The share of each step to take, so that it moves the guide by at most `max_kl` nats; see `pyro_backend.trust_region`.

    Measuring costs a forward pass, so after a step below a tenth of `max_kl` the next nine are not measured.

    Parameters
    ----------
    max_kl
        The most nats that a step may move the guide; inf: steps are never measured.

    Attributes
    ----------
    unmeasured
        Number of steps that need not be measured.
    last_kl
        KL by which the newest step moved the guide, in nats; NaN if it was not measured.

    Examples
    --------
    >>> limit = StepLimit(0.04)
    >>> limit.is_due(), limit.share(0.16), limit.last_kl
    (True, 0.5, 0.04)
    """

    def __init__(self, max_kl: float) -> None:
        self._max_kl = max_kl
        self.unmeasured = 0
        self.last_kl = float("nan")

    def is_due(self) -> bool:
        """Return whether the next step has to be measured."""
        self.last_kl = float("nan")
        if self._max_kl == float("inf"):
            return False
        self.unmeasured -= self.unmeasured > 0
        return self.unmeasured == 0

    def share(self, kl: float) -> float:
        """Return the share to take of a step that moved the guide by `kl` nats."""
        self.last_kl = min(kl, self._max_kl)
        if kl > self._max_kl:
            return float((self._max_kl / kl) ** 0.5)
        if kl < _CALM * self._max_kl:
            self.unmeasured = _CALM_STEPS
        return 1.0
