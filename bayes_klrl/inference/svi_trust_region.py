"""Steps that move the guide by a bounded number of nats.

Adam fixes the length of a step in parameters, not in distributions: on a tiny model 2e-3 is timid, on one of two million
parameters its first step moves log q by hundreds of nats and the guide collapses onto one short completion. So a step
theta -> theta + d is followed by

    KL(q_theta || q_theta+d) ~ 1/2 E_q (log q_theta+d - log q_theta)^2,

estimated on the draws that the step was made from, and shortened by sqrt(max_kl / KL) where that exceeds `max_kl`
(Schulman et al. 2015, trust region policy optimization, with a first-order direction).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["TrustRegion"]

_CALM = 0.1
_CALM_STEPS = 10


class TrustRegion:
    """An optimiser's step, shortened where it would go too far.

    Parameters
    ----------
    parameters
        What the optimiser changes.
    max_kl
        In nats; inf: never look.
    measure
        Returns how far the model has moved since the gradient's draws, in nats. It costs a forward pass, so after a
        step below a tenth of `max_kl` the next nine are not measured.

    Attributes
    ----------
    last_kl
        How far the newest step went, in nats; NaN if it was not measured.
    """

    def __init__(self, parameters: Sequence[Tensor], max_kl: float, measure: Callable[[], float]) -> None:
        self._parameters, self._max_kl, self._measure = parameters, max_kl, measure
        self._unmeasured = 0
        self.last_kl = float("nan")

    @torch.no_grad()
    def step(self, optimiser: torch.optim.Optimizer) -> None:
        """Take the optimiser's step, or as much of it as `max_kl` allows."""
        if self._max_kl == float("inf") or self._unmeasured > 0:
            self._unmeasured -= 1
            self.last_kl = float("nan")
            optimiser.step()
            return
        before = [parameter.clone() for parameter in self._parameters]
        try:
            optimiser.step()
            kl = self._measure()
        except BaseException:  # Ctrl-C before it is known how far the step went: it was not taken
            for parameter, start in zip(self._parameters, before, strict=True):
                parameter.copy_(start)
            raise
        self.last_kl = min(kl, self._max_kl)
        if kl > self._max_kl:
            share = (self._max_kl / kl) ** 0.5
            for parameter, start in zip(self._parameters, before, strict=True):
                parameter.copy_(torch.where(parameter == start, start, start + share * (parameter - start)))
        elif kl < _CALM * self._max_kl:
            self._unmeasured = _CALM_STEPS - 1
