"""How SVI turns a gradient into a step, and how long the step is.

A recipe holds numbers only; each backend has the code for those that it supports.

    adam      Adam with a schedule of rates; a step that moves the guide by more than `max_step_kl` nats is shortened
    kl_sgd    momentum, whose every step has a length in nats
    natural   the natural gradient in the space of the draws (minSR), for guides that are small or have few draws
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bayes_klrl.checks import check_count, check_fraction, check_positive
from bayes_klrl.errors import BayesKLRLError

__all__ = ["KLSGD", "OPTIMIZERS", "Adam", "Natural", "StepLength", "optimizer_of"]


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015) with warm-up and linear decay; `SVI.learning_rate` and `SVI.max_step_kl` set its steps."""


@dataclass(frozen=True)
class KLSGD:
    """Momentum, whose steps have a length in nats.

        m <- momentum m + g,     theta <- theta - eta m,     KL(q || q_new) ~ 1/2 E_q (log q_new - log q)^2 = epsilon

    epsilon is `relative` times half the variance of log w (a moving mean), which near the optimum is the KL to the posterior,
    at most `step_kl`; it rises over the first three steps and falls linearly to 0 at the last.

    Parameters
    ----------
    momentum
        The share of the direction that is kept from step to step, in [0, 1).
    step_kl
        The most nats of a step.
    relative
        The length of a step relative to half the variance of log w.
    frequency_scaling
        Whether rows of embeddings and of the head are scaled by the frequency of their token, as (uses + 0.02)^(-1/4) on
        either side, where uses counts the token in a completion.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(30, optimizer=bk.KLSGD(relative=0.05)).fit(posterior, seed=0)
    >>> bool(fit.history["elbo"][-1] > fit.history["elbo"][0])
    True
    """

    momentum: float = 0.9
    step_kl: float = 0.2
    relative: float = 0.01
    frequency_scaling: bool = True

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)
        if self.momentum == 1:
            raise BayesKLRLError("momentum must be below 1; got 1, with which a step would never end.")
        check_positive("step_kl", self.step_kl)
        check_positive("relative", self.relative)


@dataclass(frozen=True)
class Natural:
    """The natural gradient of the ELBO in the space of the draws (minSR, with the momentum of SPRING); theory.md 2.16.

    It reaches the posterior of a small problem in a tenth of Adam's steps. A step of 64 draws takes 1.5 to 2.0 times the CPU
    of Adam's with replay=0, 2.3 to 3.6 times with replay=1, and 3.5 times (small models) to 10 times (2 million parameters)
    with replay=3, since the products of all scores grow with the square of the number of draws. On a language model with few
    draws a step it overfits them.

    Parameters
    ----------
    momentum
        The share of the last direction that is kept, at its largest, in [0, 1).
    damping
        The ridge of the regression of log w on the scores, relative to the mean eigenvalue; "held_out" chooses it by
        predicting one half of the draws from the other.
    step_kl
        The most nats of a step.
    replay
        Number of earlier steps whose draws are scored again and used beside the new ones: fewer new completions for the same
        distance to the posterior, at more CPU. Where completions and rewards are cheap, take 0 or 1.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(10, 256, optimizer=bk.Natural()).fit(posterior, seed=0)
    >>> bool(fit.history["elbo"][-1] > fit.history["elbo"][0])
    True
    """

    momentum: float = 0.8
    damping: float | str = 0.03
    step_kl: float = 1.0
    replay: int = 3

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)
        if self.momentum == 1:
            raise BayesKLRLError("momentum must be below 1; got 1, with which a step would never end.")
        if self.damping != "held_out":
            check_positive("damping", self.damping)
        check_positive("step_kl", self.step_kl)
        check_count("replay", self.replay, least=0)


class StepLength:
    """The length of the steps of `KLSGD`, in nats.

    Examples
    --------
    >>> length = StepLength(KLSGD(), num_steps=100)
    >>> [round(length.next(step, variance=8.0), 4) for step in (0, 1, 2, 50, 99)]
    [0.0133, 0.0264, 0.0392, 0.02, 0.0004]
    """

    def __init__(self, recipe: KLSGD, num_steps: int) -> None:
        self._recipe, self._num_steps = recipe, num_steps
        self.variance: float | None = None

    def next(self, step: int, variance: float) -> float:
        """Return the length of a step, given the variance of log w of its draws."""
        self.variance = variance if self.variance is None else 0.8 * self.variance + 0.2 * variance
        longest = min(self._recipe.step_kl, self._recipe.relative * self.variance / 2)
        return longest * min(1.0, (step + 1) / 3) * (1 - step / self._num_steps)


OPTIMIZERS: dict[str, Callable[[], Any]] = {"adam": Adam, "kl_sgd": KLSGD, "natural": Natural}


def optimizer_of(given: Any) -> Any:
    """Return the recipe of a name, or the recipe itself; refuse anything else."""
    if isinstance(given, str) and given in OPTIMIZERS:
        return OPTIMIZERS[given]()
    if isinstance(given, tuple(kind for kind in OPTIMIZERS.values() if isinstance(kind, type))):
        return given
    raise BayesKLRLError(
        f"Unknown optimizer {given!r}; choose one of {list(OPTIMIZERS)}, or a recipe such as KLSGD(momentum=0.9)."
    )
