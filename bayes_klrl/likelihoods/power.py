"""The prior to a power as a posterior, and the twist that makes local temperature of it (theory.md 1.14).

    p*(x | c) proportional to p0(x | c)^a,    twist psi_t(x_1:t) = p0(x_1:t | c)^(a - 1) c_t

Drawing every token from p0(x_t | x_<t)^a, normalised, is what decoding at temperature 1 / a does; it is not p0(x)^a, because
the normalisers depend on the prefix. They are exactly the weights that SMC gives to its particles under this twist.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.batch import Batch
from bayes_klrl.checks import check_count, check_finite
from bayes_klrl.draws import Cost
from bayes_klrl.likelihood import Factor, check_alpha_and_bounds
from bayes_klrl.likelihoods.scoring import batch_log_probs, row_log_probs
from bayes_klrl.models.passes import next_log_probs_of
from bayes_klrl.models.twists.simple import fitted_rows, log_evidence_of_pilot, next_log_psi, prior_pilot
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State
from bayes_klrl.weights import logmeanexp

__all__ = ["Power", "PowerTwist"]


@dataclass(frozen=True, eq=False, repr=False)
class Power(Factor):
    """The factor p0(x)^(exponent - 1), whose posterior is the prior to a power: p0(x)^exponent / sum_x p0(x)^exponent.

        r(x, c) = (exponent - 1) log p0(x | c),    log-likelihood r / alpha with alpha = 1

    An exponent above 1 sharpens the prior as a whole, completion by completion and not token by token; 1 leaves it as it is,
    and 0 makes all completions equally likely that the prior can draw. Completions that the prior cannot draw stay impossible
    at every exponent.

    Nothing is estimated: the likelihood is exact up to the rounding of the model. Each completion costs one more forward pass
    of the prior, which `Draws.cost` does not count. The evidence has no closed form.

    Parameters
    ----------
    exponent
        The power of the prior; finite.
    alpha
        Units of reward per nat. Tempering and `Posterior.at_alpha` change it; the power is then
        1 + (exponent - 1) / alpha, see `power`.
    name
        Name in tables and error messages; None: one with the exponent.

    Raises
    ------
    BayesKLRLError
        If the exponent is not finite, or alpha not positive and finite.

    References
    ----------
    Karan and Du 2025, "Reasoning with sampling: your base model is smarter than you think".

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.8, 0.2]), eos_token_id=None)
    >>> posterior = bk.Posterior(coin, bk.Power(2.0), max_new_tokens=3)
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> float(exact.log_evidence[0].round(6)), float((3 * np.log(0.8**2 + 0.2**2)).round(6))
    (-1.156987, -1.156987)
    >>> draws = bk.SMC(1, proposal="twisted", twist=bk.Power(2.0).twist()).run(posterior, seed=0)
    >>> float(draws.log_evidence[0].round(6))  # tokens are independent here, so one particle is exact
    -1.156987
    """

    exponent: float
    alpha: float = field(default=1.0, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    bounds: tuple[float, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_finite("exponent", self.exponent)
        if self.exponent >= 1:
            object.__setattr__(self, "bounds", (-np.inf, 0.0))
        check_alpha_and_bounds(self)

    def __repr__(self) -> str:
        return f"Power({self.exponent:.4g}, alpha={self.alpha:.4g})"

    @property
    def label(self) -> str:
        """The given name, or one with the exponent."""
        return self.name or f"prior to the power {self.exponent:.4g}"

    @property
    def power(self) -> float:
        """The power of the prior that the posterior is, tempering included: 1 + (exponent - 1) / alpha."""
        return 1 + (self.exponent - 1) / self.alpha

    def twist(self, *, num_pilot: int = 64) -> PowerTwist:
        """Return the recipe of this factor's partial twist, for `SMC(twist=...)`."""
        return PowerTwist(self.power, num_pilot)

    def tempered(self, gamma: float) -> Power:
        """Return the same reward at alpha / gamma."""
        return replace(self, alpha=self.alpha / gamma)

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`: it works with every prior and asks for no column."""

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`; -inf where the prior gives probability 0. A prefix gets (exponent - 1) log p0(prefix)."""
        return self.checked(_scaled(batch_log_probs(batch.prior, batch), self.exponent - 1), batch)


@dataclass(frozen=True)
class PowerTwist:
    """The recipe of the partial twist of `Power`: psi_t(x_1:t) = p0(x_1:t)^(power - 1) c_t.

    The constants c_t(c), means of exp(log-likelihood(x) - (power - 1) log p0(x_1:t)) over the pilot draws that are unfinished
    at t, put finished and unfinished particles on one scale (theory.md 3.7). If all completions have T tokens they change
    nothing. With `SMC(proposal="twisted")` the prior's own pass gives the twist of the whole vocabulary. If tokens are
    independent and completions of one length, the twist is the optimal one and every weight is the evidence.

    Parameters
    ----------
    power
        The power of the prior.
    num_pilot
        Draws per prompt from the prior, from which c_t is estimated.
    """

    power: float
    num_pilot: int = 64

    def __post_init__(self) -> None:
        check_finite("power", self.power)
        check_count("num_pilot", self.num_pilot)

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> FittedPowerTwist:
        """See `TwistRecipe.fit`."""
        start = time.perf_counter()
        pilot, log_likelihood = prior_pilot(posterior, self.num_pilot, Streams.of(seed, self.num_pilot))
        sequences = pilot.sequences()
        with no_gradient():
            each = to_host(posterior.prior.token_log_probs(posterior.prompt_ids, sequences)).astype(np.float64)
        constants = np.empty((posterior.num_prompts, posterior.max_new_tokens))
        constants[:, 0] = log_evidence_of_pilot(log_likelihood)
        for t in range(1, posterior.max_new_tokens):
            unfinished = sequences.lengths > t
            so_far = (self.power - 1) * each[..., :t].sum(axis=2)
            with np.errstate(divide="ignore", invalid="ignore"):
                ahead = logmeanexp(np.where(unfinished, log_likelihood - so_far, -np.inf))
                mean = ahead - np.log(unfinished.mean(axis=1))
            constants[:, t] = np.where(np.isfinite(mean), mean, constants[:, t - 1])
        # the second pass over the pilot, which scores its tokens one by one, counts as much as the first
        training = Cost(training_tokens=2 * pilot.model_tokens, training_seconds=time.perf_counter() - start)
        return FittedPowerTwist(self.power, posterior.prompt_ids, constants, training)


@dataclass(frozen=True, eq=False)
class FittedPowerTwist:
    """The twist that `PowerTwist.fit` returns.

    Parameters
    ----------
    power
        The power of the prior.
    prompts
        The token ids of the P prompts.
    log_constants
        log c_t in nats, shape (P, T).
    training
        Seconds and model tokens of the pilot.
    """

    power: float
    prompts: tuple[tuple[int, ...], ...]
    log_constants: FloatArray
    training: Cost = field(default_factory=Cost)

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        rows = fitted_rows(posterior, self.prompts, prompt_index)
        log_prior = _prefix_log_prior(posterior, prompt_index, prefixes)
        return self.log_constants[rows, prefixes.shape[1]] + _scaled(log_prior, self.power - 1)

    def next_log_psi(
        self,
        posterior: Posterior,
        prompt_index: IntArray,
        prefixes: IntArray,
        prior_rows: tuple[State, IntArray] | None = None,
    ) -> FloatArray:
        """Return log psi of every one-token extension, shape (R, V), from one next-token pass of the prior."""
        alone = isinstance(posterior.likelihood, Power) and np.isclose(posterior.likelihood.power, self.power)
        if not alone or prior_rows is None:  # complete extensions get their whole likelihood, token by token
            return next_log_psi(self.__call__, posterior, prompt_index, prefixes)
        rows, num_tokens = fitted_rows(posterior, self.prompts, prompt_index), prefixes.shape[1] + 1
        with no_gradient():
            following = to_host(next_log_probs_of(posterior.prior, *prior_rows)).astype(np.float64)
        log_prior = _prefix_log_prior(posterior, prompt_index, prefixes)[:, None] + following
        values = _scaled(log_prior, self.power - 1)
        if num_tokens < posterior.max_new_tokens:
            goes_on = ~np.isin(np.arange(following.shape[1]), list(posterior.prior.eos_token_ids))
            values[:, goes_on] += self.log_constants[rows, num_tokens, None]
        return values


def _scaled(log_prior: FloatArray, factor: float) -> FloatArray:
    """Return factor * log p0, -inf where p0 is 0; a log-prob that rounding made positive counts as 0."""
    impossible = np.isneginf(log_prior)
    scaled: FloatArray = factor * np.where(impossible, 0.0, np.minimum(log_prior, 0.0))
    return np.where(impossible, -np.inf, scaled)


def _prefix_log_prior(posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
    """Return log p0(x_1:t | c) of prefixes (R, t), shape (R,)."""
    lengths = np.full(len(prefixes), prefixes.shape[1])
    return row_log_probs(posterior.prior, posterior.prompt_ids, prompt_index, prefixes, lengths)
