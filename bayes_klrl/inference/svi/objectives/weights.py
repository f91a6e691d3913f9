"""What SVI minimises: objectives as the weight that each draw's score gets.

    gradient of the descent direction ~ 1/N sum_n a_n grad log q(x_n),      x_n ~ q

With log w = log p0 + r / alpha - log q and Z-hat the mean of w (a moving mean over the steps), the weights a_n are, up to a
baseline whose mean is 0 because E_q[grad log q] = 0:

    elbo           log w_n                                KL(q || p*)                          (theory.md 2.2)
    log_variance   log w_n - mean log w                   1/2 Var(log w), any draws            (Richter et al. 2020)
    forward_kl     w_n / sum_m w_m                        KL(p* || q), self-normalised         (Khalifa et al. 2021)
    js             -log(2 t / (1 + t)), t = Z-hat / w_n   Jensen-Shannon divergence            (Go et al. 2023)
    tv             -sign(t - 1) / 2                       total variation                      (Go et al. 2023)

They are written once for NumPy, torch and JAX; `pyro_backend.scores` and `numpyro_backend.scores` train on them. JAX traces
them, so that an objective of your own must compute its weights by functions of `xp`. `LogVariance(replay=M)`,
`ForwardKL(sampler=...)`, losses of `bk.audit` and draws of likelihood 0 are for priors on torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.estimators import leave_one_out
from bayes_klrl.typing import Algorithm, Array

__all__ = ["ELBO", "JS", "OBJECTIVES", "TV", "ForwardKL", "LogVariance", "LossObjective", "Objective", "objective_of"]


class Objective(Protocol):
    """What is minimised, as weights of scores.

    An attribute `zero_likelihood = True` says that the weights are finite also where log w is -inf, so that a hard constraint
    can be trained on.
    """

    def weights(self, log_weights: Array, log_evidence: Array, xp: Any) -> Array:
        """Return a_n of draws from the guide, shape (N, P), without a gradient.

        Parameters
        ----------
        log_weights
            log w of N draws for each of P prompts, in nats, (N, P), N at least 2.
        log_evidence
            log Z-hat of each prompt, in nats, (P,).
        xp
            The module of the arrays: numpy, torch or jax.numpy.
        """


@dataclass(frozen=True)
class ELBO:
    """KL(q || p*), the KL-regularised return; every draw against the mean of the others."""

    def weights(self, log_weights: Array, log_evidence: Array, xp: Any) -> Array:
        """See `Objective.weights`."""
        return leave_one_out(log_weights)


@dataclass(frozen=True)
class LogVariance:
    """Half the variance of log w (VarGrad, trajectory balance): on draws of the guide it has the ELBO's gradient.

    Parameters
    ----------
    replay
        Number of earlier draws per prompt that each step scores again and uses beside the new ones; 0: none. `Draws` of any
        method, of the same prior and prompts, are the first of them: as many are kept.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(30, objective=bk.LogVariance(replay=64)).fit(posterior, seed=0)
    >>> bool(fit.history["elbo"][-1] > fit.history["elbo"][0])
    True
    """

    replay: int | Draws = 0

    def __post_init__(self) -> None:
        if not isinstance(self.replay, Draws):
            check_count("replay", self.replay, least=0)

    def weights(self, log_weights: Array, log_evidence: Array, xp: Any) -> Array:
        """See `Objective.weights`."""
        return leave_one_out(log_weights)


@dataclass(frozen=True)
class ForwardKL:
    """KL(p* || q) by weighted draws (distributional policy gradient, wake phase).

    From the guide's own draws the weights are self-normalised importance weights, with a bias of order 1/N. It needs draws of
    high posterior probability: where the effective sample size is near 1, a step copies one draw. A sampler finds these
    where the guide does not. Likelihoods of 0 are allowed on torch: a hard constraint can be trained on.

    Parameters
    ----------
    sampler
        An algorithm whose weighted draws are learned from, such as `bk.SMC(64)` or `bk.SMC(64, twist=...)`; the history's
        "elbo", "kl" and "reward" are then the guide's by importance weights, rough where guide and posterior differ much, and
        blind to draws of likelihood 0. None: the guide's own draws.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> bk.ForwardKL().weights(np.log([[1.0], [3.0]]), np.zeros(1), np).round(2).tolist()
    [[-0.5], [0.5]]
    """

    sampler: Algorithm | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None and not isinstance(self.sampler, Algorithm):
            raise BayesKLRLError(f"sampler is an algorithm such as bk.SMC(64), or None; got {self.sampler!r}.")

    zero_likelihood: ClassVar[bool] = True

    def weights(self, log_weights: Array, log_evidence: Array, xp: Any) -> Array:
        """See `Objective.weights`."""
        highest = log_weights.max(0)[0] if xp.__name__ == "torch" else log_weights.max(0)
        shifted = xp.exp(log_weights - xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest)))
        total = shifted.sum(0)
        some = xp.where(
            total > 0, xp.ones_like(total), xp.zeros_like(total)
        )  # 0: no draw is possible, which says nothing
        return len(log_weights) * shifted / (total + 1.0 - some) - some


@dataclass(frozen=True)
class JS:
    """The Jensen-Shannon divergence between q and p*, by the moving log Z-hat."""

    zero_likelihood: ClassVar[bool] = True

    def weights(self, log_weights: Array, log_evidence: Array, xp: Any) -> Array:
        """See `Objective.weights`."""
        log_t = log_evidence - log_weights  # log q / p*
        return leave_one_out(-0.5 * (xp.log(xp.ones_like(log_t) * 2.0) - xp.log1p(xp.exp(-log_t))))


@dataclass(frozen=True)
class TV:
    """The total variation between q and p*, by the moving log Z-hat."""

    zero_likelihood: ClassVar[bool] = True

    def weights(self, log_weights: Array, log_evidence: Array, xp: Any) -> Array:
        """See `Objective.weights`."""
        return leave_one_out(0.5 * xp.sign(log_weights - log_evidence))


@dataclass(frozen=True)
class LossObjective:
    """A trainer's loss as an objective: what `bk.audit` takes, a function of `LossInputs`; on torch alone."""

    loss: Callable[[Any], Any]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "elbo": ELBO,
    "log_variance": LogVariance,
    "forward_kl": ForwardKL,
    "js": JS,
    "tv": TV,
}


def objective_of(given: Any) -> Any:
    """Return the objective of a name, or of a loss as `bk.audit` takes it, or the object itself.

    Raises
    ------
    BayesKLRLError
        If there is no objective of that name, or the object is no objective.
    """
    if isinstance(given, str):
        if given not in OBJECTIVES:
            raise BayesKLRLError(
                f"Unknown objective {given!r}; choose one of {list(OBJECTIVES)}, or an object with their method `weights`."
            )
        return OBJECTIVES[given]()
    if isinstance(given, LossObjective) or callable(getattr(given, "weights", None)):
        return given
    if callable(given) and not isinstance(given, type):
        return LossObjective(given)
    raise BayesKLRLError(
        f"objective is a name of {list(OBJECTIVES)}, an object with their method `weights`, or a loss as bk.audit takes it, a "
        f"function of bk.LossInputs; got {given!r}."
    )
