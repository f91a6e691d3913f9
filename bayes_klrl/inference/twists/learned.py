"""`LearnedTwist`: the recipe for a twist that is trained on draws towards the optimal one.

It learns by contrast (Zhao et al. 2024; theory.md 3.8). The loss is in `losses`, the training is in `training`, and the
network is in `bayes_klrl.models.twists.neural`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bayes_klrl.checks import check_count, check_positive, check_posterior_given
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import Twist

__all__ = ["LearnedTwist"]


@dataclass(frozen=True)
class LearnedTwist:
    """Train log psi_t(x_1:t) ~ log E_p0[exp(r(x) / alpha) | x_1:t] on the prior's hidden states.

    The prior is not changed; a head of two layers reads the hidden state from which the prior predicts its next token. For a
    prior without hidden states, a GRU over the tokens is trained with the head. Half of the draws of each step come from the
    prior and half from the prior times the current twist, weighted as draws from this mixture, so that completions which the
    twist underrates are still drawn.

    Parameters
    ----------
    num_steps
        Number of gradient steps.
    num_draws
        Number of completions per prompt and step, an even number.
    learning_rate
        Adam's first rate, which decays linearly to 0.
    hidden
        Number of units of the head's layers, and of the GRU.

    Examples
    --------
    The reward is 5 if the last of four tosses is heads, with log Z = log((1 + exp(5)) / 2) = 4.31.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> last = bk.TokenReward(lambda tokens, lengths: 5.0 * tokens[:, 3], alpha=1.0)
    >>> twist = bk.LearnedTwist(50, num_draws=32)
    >>> draws = bk.SMC(200, twist=twist, proposal="twisted").run(bk.Posterior(coin, last, max_new_tokens=4), seed=0)
    >>> bool(abs(draws.log_evidence[0] - 4.31) < 0.1)
    True
    """

    num_steps: int
    num_draws: int = 64
    learning_rate: float = 3e-3
    hidden: int = 64

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_count("num_draws", self.num_draws, least=2)
        if self.num_draws % 2:
            raise BayesKLRLError(f"num_draws must be even: half are drawn from the prior; got {self.num_draws}.")
        check_positive("learning_rate", self.learning_rate)
        check_count("hidden", self.hidden)

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Twist:
        """Return the trained twist, a `bayes_klrl.models.twists.neural.NeuralTwist`; see `TwistRecipe.fit`.

        It can be passed to `SMC(twist=...)` and `TwistedLM`.
        """
        check_posterior_given(posterior)
        from bayes_klrl.inference.twists.training import train_twist

        return train_twist(self, posterior, seed=seed, progress=progress)
