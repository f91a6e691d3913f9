"""Problem P6: two modes that no product distribution can hold at once.

    V = 2, T = n,   r(x) = 1[x = 0 0 ... 0 or x = 1 1 ... 1],   p0(x) = prod_t theta^[x_t = 1] (1 - theta)^[x_t = 0]

With m = theta^n the second mode's prior mass and A = m + (1 - theta)^n, Z = 1 - A + A exp(1 / alpha). A guide that is a
product reaches one mode, at the cost of log 2, which its ELBO hardly shows; fitted by forward KL it covers everything and hits
nothing.
"""

from __future__ import annotations

import math

import numpy as np

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.automata.automaton import Automaton
from bayes_klrl.models.automata.reward import AutomatonReward
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems.record import Truth
from bayes_klrl.typing import FloatArray

__all__ = ["two_modes", "two_modes_truth"]

_START, _ALL_0, _ALL_1, _MIXED = range(4)
_WHICH = Automaton(
    np.array([[_ALL_0, _ALL_1], [_ALL_0, _MIXED], [_MIXED, _ALL_1], [_MIXED, _MIXED]]), accepting=[_ALL_0, _ALL_1]
)
_MAX_ORDER = 20


def two_modes(
    num_tokens: int = 6, *, second_mode_mass: float | None = None, alpha: float = 1 / 8, order: int = 1
) -> Posterior:
    """Return problem P6.

    Parameters
    ----------
    num_tokens
        n, the length of every completion.
    second_mode_mass
        m = p0(1 1 ... 1); None: 2**-n, as much as the first mode has.
    alpha
        Units of reward per nat.
    order
        The order of the prior's table. The prior is the same for every order; a guide made from it can remember order - 1
        tokens: with 1 it is a product, with n it can be the posterior itself.

    Notes
    -----
    At the default (n = 6, uniform prior) one mode by itself is 0.704 nats from the posterior, the best product guide 0.701, on
    one mode but for 0.0004 per token; the best by forward KL is the prior itself, KL(p* || q) = 3.37, with E[r] =
    2**-5 = 0.031.

    Examples
    --------
    >>> two_modes(3).reward([[0, 0, 0], [0, 1, 0], [1, 1, 1]])
    array([[1., 0., 1.]])
    """
    check_count("num_tokens", num_tokens)
    check_positive("alpha", alpha)
    check_count("order", order)
    if order > _MAX_ORDER:
        raise BayesKLRLError(f"order must be at most {_MAX_ORDER}, for the table has 2**order entries; got {order}.")
    theta = _theta(num_tokens, second_mode_mass)
    row = np.log([1 - theta, theta])
    prior = NgramLM(np.broadcast_to(row, (2,) * order), eos_token_id=None)
    likelihood = AutomatonReward(
        _WHICH, final_rewards=_WHICH.state_values, alpha=alpha, bounds=(0.0, 1.0), name="all equal"
    )
    return Posterior(prior, likelihood, max_new_tokens=num_tokens)


def two_modes_truth(num_tokens: int = 6, *, second_mode_mass: float | None = None, alpha: float = 1 / 8) -> Truth:
    """Return the truth of `two_modes` with the same arguments (and any `order`), in closed form.

    Examples
    --------
    >>> two_modes_truth().kl.round(3)
    array([3.373])
    """
    theta = _theta(num_tokens, second_mode_mass)
    mass = theta**num_tokens + (1 - theta) ** num_tokens
    log_evidence = float(np.logaddexp(math.log1p(-mass), math.log(mass) + 1 / alpha))
    reward = math.exp(math.log(mass) + 1 / alpha - log_evidence)
    kl = reward / alpha - log_evidence
    return Truth.exact(_array(log_evidence), _array(reward), _array(kl), "closed form")


def _theta(num_tokens: int, second_mode_mass: float | None) -> float:
    """Return p0(x_t = 1)."""
    if second_mode_mass is None:
        return 0.5
    check_positive("second_mode_mass", second_mode_mass)
    if second_mode_mass >= 1:
        raise BayesKLRLError(f"second_mode_mass is a probability below 1; got {second_mode_mass!r}.")
    return float(second_mode_mass ** (1 / num_tokens))


def _array(value: float) -> FloatArray:
    """Return a number as that of the only prompt."""
    return np.array([value])
