"""Training steps that move the guide by at most a given number of nats.

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

from bayes_klrl.inference.svi.steps import StepLimit

__all__ = ["TrustRegion"]


class TrustRegion:
    """An optimiser's step, shortened where it would move the model by more than `max_kl` nats.

    Parameters
    ----------
    parameters
        The parameters that the optimiser changes.
    max_kl
        The most nats that a step may move the model; inf: steps are never measured.
    measure
        Function that returns the KL by which the model has moved since the gradient's draws, in nats.

    Attributes
    ----------
    limit
        The `StepLimit`, which decides when to measure and holds the KL of the newest step.
    """

    def __init__(self, parameters: Sequence[Tensor], max_kl: float, measure: Callable[[], float]) -> None:
        self._parameters, self._measure = parameters, measure
        self.limit = StepLimit(max_kl)

    @torch.no_grad()
    def step(self, optimiser: torch.optim.Optimizer) -> None:
        """Take the optimiser's step, or the share of it that `max_kl` allows."""
        if not self.limit.is_due():
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
        share = self.limit.share(kl)
        if share < 1:
            for parameter, start in zip(self._parameters, before, strict=True):
                parameter.copy_(torch.where(parameter == start, start, start + share * (parameter - start)))
