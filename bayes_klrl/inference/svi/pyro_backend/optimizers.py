"""The optimizers of torch guides, by the recipes of `svi.optimizers`.

Each has `step(loss)`, which takes one step along the gradients that the parameters hold, and a state for checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.inference.svi.optimizers import KLSGD, StepLength
from bayes_klrl.inference.svi.pyro_backend.elbo import spread
from bayes_klrl.inference.svi.pyro_backend.over_ranks.spread import spread_like, whole_tensor
from bayes_klrl.inference.svi.pyro_backend.trust_region import TrustRegion
from bayes_klrl.inference.svi.steps import MAX_GRADIENT_NORM, learning_rate_schedule

__all__ = ["AdamSteps", "MomentumSteps", "Steps", "embedding_rows"]

_MEASURED_FIRST, _MEASURED_EVERY = 10, 4
_MOST_TRIALS = 4
_LONGER = 10.0
_RARE = 0.02


class Steps(Protocol):
    """An optimizer at work."""

    needs_gradient: bool
    """Whether the loss must leave its gradient in the parameters before `step`."""

    def step(self, log_weights: Tensor) -> Mapping[str, float]:
        """Take a step along the parameters' gradients; return "gradient_norm", "learning_rate" and "step_kl".

        Parameters
        ----------
        log_weights
            log w of the draws of this step, (N, P).
        """

    def forget_draws(self) -> None:
        """Forget the log-weights of earlier draws, since the posterior has changed."""

    def state(self) -> dict[str, Tensor]:
        """Return all that later steps depend on, as tensors by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""


class AdamSteps:
    """Adam in a trust region; see `trust_region`."""

    needs_gradient = True

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rate: float,
        num_steps: int,
        max_step_kl: float,
        measure: Callable[[], float],
    ) -> None:
        self._parameters = list(parameters)
        self._optimiser = torch.optim.Adam(self._parameters, lr=rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, learning_rate_schedule(num_steps))
        self._trust_region = TrustRegion(self._parameters, max_step_kl, measure)

    def step(self, log_weights: Tensor) -> Mapping[str, float]:
        """See `Steps.step`."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        rate = float(self._schedule.get_last_lr()[0])
        self._trust_region.step(self._optimiser)
        self._schedule.step()
        return {
            "gradient_norm": float(whole_tensor(norm)),
            "learning_rate": rate,
            "step_kl": self._trust_region.limit.last_kl,
        }

    def forget_draws(self) -> None:
        """See `Steps.forget_draws`; there are none."""

    def state(self) -> dict[str, Tensor]:
        """See `Steps.state`."""
        found = {}
        for i, parameter in enumerate(self._parameters):
            for name, value in self._optimiser.state[parameter].items():
                found[f"{i}.{name}"] = whole_tensor(torch.as_tensor(value)).clone()
        found["numbers"] = torch.tensor(
            [self._schedule.last_epoch, self._trust_region.limit.unmeasured], dtype=torch.float64, device="cpu"
        )
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Steps.load_state`."""
        for key, value in state.items():
            if key != "numbers":
                i, name = key.split(".", 1)
                parameter = self._parameters[int(i)]
                is_like_it = value.shape == parameter.shape
                self._optimiser.state[parameter][name] = spread_like(value, parameter) if is_like_it else value.clone()
        epoch, unmeasured = (int(number) for number in state["numbers"].tolist())
        self._schedule.last_epoch = epoch
        for group, base, factor in zip(
            self._optimiser.param_groups, self._schedule.base_lrs, self._schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(epoch)
        self._schedule._last_lr = [group["lr"] for group in self._optimiser.param_groups]
        self._trust_region.limit.unmeasured = unmeasured


class MomentumSteps:
    """Momentum, whose steps have a length in nats; see `KLSGD`.

    The KL of a step is quadratic in its length, so one measurement gives the length for the next steps, too. It is measured in
    the first ten steps, then in every fourth; each measurement is a forward pass.

    Parameters
    ----------
    recipe, num_steps
        The recipe, and the number of steps of the training.
    parameters
        The parameters to train.
    measure
        Returns the KL by which the guide has moved since its draws, in nats.
    scales
        Factors of the gradient of each parameter, broadcast over it; None: 1.
    model_tokens
        Tokens that the prior read and drew for the factors.
    """

    needs_gradient = True

    def __init__(
        self,
        recipe: KLSGD,
        num_steps: int,
        parameters: Sequence[Tensor],
        measure: Callable[[], float],
        scales: Sequence[Tensor | None] | None = None,
        model_tokens: int = 0,
    ) -> None:
        self.model_tokens = model_tokens
        self._recipe, self._parameters, self._measure = recipe, list(parameters), measure
        self._length = StepLength(recipe, num_steps)
        self._scales = [None] * len(self._parameters) if scales is None else list(scales)
        self._momentum = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._curvature = float("nan")  # KL of a step per squared norm
        self._count = 0

    @torch.no_grad()
    def step(self, log_weights: Tensor) -> Mapping[str, float]:
        """See `Steps.step`."""
        variance = float(np.mean(spread(log_weights)))
        epsilon = self._length.next(self._count, variance)
        squared = 0.0
        for momentum, parameter, scale in zip(self._momentum, self._parameters, self._scales, strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            squared += float(whole_tensor(gradient.square().sum()))
            momentum.mul_(self._recipe.momentum).add_(gradient if scale is None else gradient * scale)
        kl = self._move(epsilon)
        self._count += 1
        return {"gradient_norm": squared**0.5, "learning_rate": float("nan"), "step_kl": kl}

    def _move(self, epsilon: float) -> float:
        """Move by `epsilon` nats against the momentum, and return the KL as far as it is known."""
        directions = [m if scale is None else m * scale for m, scale in zip(self._momentum, self._scales, strict=True)]
        norm = float(sum(whole_tensor(direction.square().sum()) for direction in directions)) ** 0.5
        if norm == 0 or not epsilon > 0:
            return 0.0
        known = np.isfinite(self._curvature)
        length = float((epsilon / self._curvature) ** 0.5) if known else 1e-3
        if known and self._count >= _MEASURED_FIRST and self._count % _MEASURED_EVERY:
            self._take(directions, -length / norm)
            return float("nan")
        before = [parameter.clone() for parameter in self._parameters]
        try:
            for _ in range(_MOST_TRIALS):
                self._take(directions, -length / norm)
                kl = self._measure()
                usable = 0 < kl < np.inf
                share = float(min((epsilon / kl) ** 0.5, _LONGER)) if usable else 1 / _LONGER
                if usable:
                    self._curvature = kl / length**2
                self._restore(before)
                length *= share
                if 0.5 < share < 2:
                    break
        except BaseException:  # Ctrl-C before it is known how far the step went: it was not taken
            self._restore(before)
            raise
        self._take(directions, -length / norm)
        return epsilon

    def _take(self, directions: Sequence[Tensor], factor: float) -> None:
        for parameter, direction in zip(self._parameters, directions, strict=True):
            parameter.add_(direction, alpha=factor)

    def _restore(self, before: Sequence[Tensor]) -> None:
        for parameter, start in zip(self._parameters, before, strict=True):
            parameter.copy_(start)

    def forget_draws(self) -> None:
        """See `Steps.forget_draws`; there are none."""

    def state(self) -> dict[str, Tensor]:
        """See `Steps.state`."""
        variance = self._length.variance
        numbers = [self._count, self._curvature, np.nan if variance is None else variance]
        found = {f"{i}.momentum": whole_tensor(momentum).clone() for i, momentum in enumerate(self._momentum)}
        return found | {"numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu")}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Steps.load_state`."""
        for i, momentum in enumerate(self._momentum):
            momentum.copy_(spread_like(state[f"{i}.momentum"], momentum))
        count, self._curvature, variance = state["numbers"].tolist()
        self._count, self._length.variance = int(count), None if np.isnan(variance) else variance


def embedding_rows(guide: Any, parameters: Sequence[Tensor], uses: Tensor) -> list[Tensor | None]:
    """Return the factors of the gradients of embedding and head by token frequency; None for all other parameters.

    Parameters
    ----------
    guide, parameters
        The guide, and its parameters in the order of the factors.
    uses
        Mean number of uses of each token in a completion, (V,).
    """
    module: Any = getattr(guide, "module", None)
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    layers = [getattr(base, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    rows = {id(getattr(layer, "weight", None)) for layer in layers if layer is not None}
    factors = (uses + _RARE).pow(-0.25)[:, None]
    found: list[Tensor | None] = []
    for p in parameters:
        scaled = id(p) in rows and p.dim() == 2 and len(p) == len(uses)
        found.append(spread_like(factors.to(p.dtype).to(p.device), p) if scaled else None)
    return found
