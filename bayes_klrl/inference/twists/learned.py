"""`LearnedTwist`: the recipe of a twist that is trained, on draws, towards the optimal one.

The losses are in `twist_losses`, the network in `models.torch_twist`, the training in `twist_training`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import Twist

__all__ = ["TWIST_LOSSES", "LearnedTwist"]

TWIST_LOSSES = ("ctl", "soft_q", "fudge")


@dataclass(frozen=True)
class LearnedTwist:
    """Train log psi_t(x_1:t) ~ log E_p0[exp(r(x) / alpha) | x_1:t] on the prior's hidden states.

    The prior stays as it is; a head of two layers reads what it predicts its next token from. A prior without hidden states
    gets a GRU over the tokens. Half of every step's draws come from the prior, half from the prior steered by the twist so
    far ("fudge": all from the prior), weighted as draws from that mixture, so that what the twist overlooks is still drawn.

    Parameters
    ----------
    num_steps
        Gradient steps.
    loss
        "ctl": contrastive twist learning; "soft_q": path consistency, for finite rewards; "fudge": classification, for
        rewards with a declared upper bound. See `bayes_klrl.inference.twists.losses`.
    num_draws
        Completions a prompt and step, an even number.
    learning_rate
        Of Adam; falls linearly to 0.
    hidden
        Units of the head's layers, and of the GRU.

    Examples
    --------
    >>> LearnedTwist(200, loss="fudge").num_draws
    64
    """

    num_steps: int
    loss: str = "ctl"
    num_draws: int = 64
    learning_rate: float = 3e-3
    hidden: int = 64

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_count("num_draws", self.num_draws, least=2)
        if self.num_draws % 2:
            raise BayesKLRLError(f"num_draws must be even, for half are drawn from the prior; got {self.num_draws}.")
        check_positive("learning_rate", self.learning_rate)
        check_count("hidden", self.hidden)
        if self.loss not in TWIST_LOSSES:
            raise BayesKLRLError(f"Unknown loss {self.loss!r}; choose one of {list(TWIST_LOSSES)}.")

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Twist:
        """Return the trained twist, for `SMC(twist=...)` and `TwistedLM`; see `TwistRecipe.fit`.

        Raises
        ------
        BayesKLRLError
            If the loss is "fudge" and the likelihood declares no upper bound.
        UnboundedLossError
            If the loss is "soft_q" and a draw has likelihood 0.
        """
        from bayes_klrl.inference.twists.training import train_twist

        if self.loss == "fudge":
            self._check_bound(posterior)
        return train_twist(self, posterior, seed=seed, progress=progress)

    def _check_bound(self, posterior: Posterior) -> None:
        """Refuse a likelihood that cannot be scaled into [0, 1]."""
        bounds = posterior.likelihood.bounds
        if bounds is None or not np.isfinite(bounds[1]):
            raise BayesKLRLError(
                f"The loss 'fudge' classifies, and needs the largest likelihood there is to scale by; "
                f"{posterior.likelihood.name or 'the reward'!r} has bounds={bounds}. Declare bounds=(low, high), or use "
                "loss='ctl'."
            )
