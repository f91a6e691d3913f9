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
from bayes_klrl.likelihood import Factor, check_alpha_and_bounds, product
from bayes_klrl.likelihoods.scoring import batch_log_probs, row_log_probs
from bayes_klrl.models.decoding import check_shares_vocabulary
from bayes_klrl.models.passes import next_log_probs_of
from bayes_klrl.models.twists.simple import (
    fitted_rows,
    log_evidence_of_pilot,
    log_likelihoods_of,
    model_draws,
    next_log_psi,
)
from bayes_klrl.posterior import Posterior, check_context
from bayes_klrl.randomness import Streams
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State
from bayes_klrl.weights import logsumexp

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

    @property
    def prior_power(self) -> float:
        """See `Likelihood.prior_power`."""
        return max(self.power - 1, 0.0)

    def twist(self, *, num_pilot: int = 64, proposal: LanguageModel | None = None) -> PowerTwist:
        """Return the recipe of this factor's partial twist, for `SMC(twist=...)`; see `PowerTwist`.

        Parameters
        ----------
        num_pilot
            Pilot draws per prompt.
        proposal
            The model that they are drawn from, such as a local temperature; None: the prior.
        """
        return PowerTwist(self.power, num_pilot, proposal)

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

    The constants c_t(c) put finished and unfinished particles on one scale (theory.md 3.7): under the prior, psi_t and the
    likelihood have the same mean over what is unfinished at t, by the estimate from pilot draws x_n of a proposal q

        c_t = sum_n p0(x_n) / q(x_n) exp(log-likelihood(x_n)) / sum_n p0(x_n,1:t)^power / q(x_n,1:t),    n longer than t.

    c_0 estimates the evidence. If all completions have T tokens, the c_t change nothing.

    SMC gives the twist the log p0 of its prefixes, which decoding has summed in any case, and `SMC(proposal="twisted")` the
    prior's next-token log-probs, so that no token is read twice. If tokens are independent and completions of one length,
    the twist is the optimal one and every weight is the evidence.

    Parameters
    ----------
    power
        The power of the prior.
    num_pilot
        Pilot draws per prompt.
    proposal
        The model q that the pilot is drawn from; None: the prior. At a large power the prior hardly ever draws what the
        posterior consists of, and local temperature, each next-token distribution to the power, shows more of it.

    Raises
    ------
    BayesKLRLError
        If the power is not finite, or there is no pilot draw.
    CheckpointError
        From `fit`, if the proposal is no language model on the prior's vocabulary.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> lm = bk.NgramLM(np.log([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [1, 1e-9, 1e-9]]), eos_token_id=2)
    >>> colder = 3 * lm.log_probs
    >>> colder = bk.NgramLM(colder - np.logaddexp.reduce(colder, axis=-1, keepdims=True), eos_token_id=2)
    >>> posterior = bk.Posterior(lm, bk.Power(3.0), prompts=[[0]], max_new_tokens=6)
    >>> draws = bk.SMC(200, proposal=colder, twist=bk.Power(3.0).twist(proposal=colder)).run(posterior, seed=0)
    >>> bool(abs(draws.log_evidence - bk.Exact().run(posterior, seed=0).log_evidence) < 0.1)
    True
    """

    power: float
    num_pilot: int = 64
    proposal: LanguageModel | None = None

    def __post_init__(self) -> None:
        check_finite("power", self.power)
        check_count("num_pilot", self.num_pilot)

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> FittedPowerTwist:
        """See `TwistRecipe.fit`."""
        start = time.perf_counter()
        prior = posterior.prior
        proposal = prior if self.proposal is None else self.proposal
        check_shares_vocabulary("The proposal of the twist's pilot", proposal, prior)
        check_context(posterior.prompt_ids, posterior.max_new_tokens, proposal)
        pilot = model_draws(proposal, posterior, self.num_pilot, Streams.of(seed, self.num_pilot))
        log_likelihood, sequences = log_likelihoods_of(posterior, pilot), pilot.sequences()
        log_prior = _log_probs_of_prefixes(prior, posterior, sequences)
        log_proposal = log_prior if proposal is prior else _log_probs_of_prefixes(proposal, posterior, sequences)
        with np.errstate(invalid="ignore"):  # -inf - finite: what the prior cannot draw weighs nothing
            log_ratio = log_prior - log_proposal
            whole = log_ratio[..., -1] + log_likelihood
        constants = np.empty((posterior.num_prompts, posterior.max_new_tokens))
        constants[:, 0] = log_evidence_of_pilot(whole)
        for t in range(1, posterior.max_new_tokens):
            longer = sequences.lengths > t
            so_far = log_ratio[..., t] + _scaled(log_prior[..., t], self.power - 1)
            with np.errstate(invalid="ignore"):  # no draw is longer than t, or the likelihood of all is 0
                constant = logsumexp(np.where(longer, whole, -np.inf)) - logsumexp(np.where(longer, so_far, -np.inf))
            constants[:, t] = np.where(np.isfinite(constant), constant, constants[:, t - 1])
        # a pass that scores the pilot token by token counts as much as the one that draws it
        passes = 2 if proposal is prior else 3
        training = Cost(training_tokens=passes * pilot.model_tokens, training_seconds=time.perf_counter() - start)
        return FittedPowerTwist(self.power, posterior.prompt_ids, constants, training)


@dataclass(frozen=True, eq=False)
class FittedPowerTwist:
    """The twist that `PowerTwist.fit` returns; it keeps nothing from one call to the next.

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
        """See `Twist.__call__`; one forward pass of the prior over the prefixes, which `of_log_prior` does without."""
        num_tokens = prefixes.shape[1]
        lengths = np.full(len(prefixes), num_tokens)
        log_prior = row_log_probs(posterior.prior, posterior.prompt_ids, prompt_index, prefixes, lengths)
        return self.of_log_prior(posterior, prompt_index, num_tokens, log_prior)

    def of_log_prior(
        self, posterior: Posterior, prompt_index: IntArray, num_tokens: int, log_prior: FloatArray
    ) -> FloatArray:
        """Return log psi of prefixes from log p0(x_1:t | c) alone, both (R,); see `Twist`."""
        rows = fitted_rows(posterior, self.prompts, prompt_index)
        constants: FloatArray = self.log_constants[rows, num_tokens]
        return constants + _scaled(log_prior, self.power - 1)

    def next_log_psi(
        self,
        posterior: Posterior,
        prompt_index: IntArray,
        prefixes: IntArray,
        prior_rows: tuple[State, IntArray] | None = None,
    ) -> FloatArray:
        """Return log psi of every one-token extension, shape (R, V), less (power - 1) log p0 of its prefix.

        What is left out is the same for all extensions of a prefix; see `bayes_klrl.models.twists.simple.next_log_psi`.
        Complete extensions get their whole likelihood, other factors than the power included.
        """
        powers = [factor for factor in posterior.likelihood.factors if isinstance(factor, Power)]
        others = tuple(factor for factor in posterior.likelihood.factors if not isinstance(factor, Power))
        # of another power the likelihood of complete extensions does not share the factor that is left out
        if prior_rows is None or not np.isclose(1 + sum(factor.power - 1 for factor in powers), self.power):
            return next_log_psi(self.__call__, posterior, prompt_index, prefixes)
        with no_gradient():
            following = to_host(next_log_probs_of(posterior.prior, *prior_rows)).astype(np.float64)
        values = _scaled(following, self.power - 1)
        num_tokens = prefixes.shape[1] + 1
        complete = np.isin(np.arange(following.shape[1]), list(posterior.prior.eos_token_ids))
        if num_tokens == posterior.max_new_tokens:
            complete[:] = True
        else:
            rows = fitted_rows(posterior, self.prompts, prompt_index)
            values[:, ~complete] += self.log_constants[rows, num_tokens, None]
        if others and complete.any():
            tokens = np.flatnonzero(complete)
            values[:, tokens] += _log_likelihood_of_extensions(others, posterior, prompt_index, prefixes, tokens)
        return values


def _log_likelihood_of_extensions(
    factors: tuple[Factor, ...], posterior: Posterior, prompt_index: IntArray, prefixes: IntArray, tokens: IntArray
) -> FloatArray:
    """Return the log of a product of factors for each prefix and each of K tokens that make it complete, (R, K)."""
    (num_rows, width), num = prefixes.shape, len(tokens)
    completions = np.full((num_rows * num, posterior.max_new_tokens), posterior.pad_token)
    completions[:, :width] = np.repeat(prefixes, num, axis=0)
    completions[:, width] = np.tile(tokens, num_rows)
    batch = posterior.batch(completions, np.full(num_rows * num, width + 1), np.repeat(prompt_index, num))
    likelihood = product(factors)
    return likelihood.log_likelihood(likelihood.reward(batch)).reshape(num_rows, num)


def _scaled(log_prior: FloatArray, factor: float) -> FloatArray:
    """Return factor * log p0, -inf where p0 is 0; a log-prob that rounding made positive counts as 0."""
    impossible = np.isneginf(log_prior)
    scaled: FloatArray = factor * np.where(impossible, 0.0, np.minimum(log_prior, 0.0))
    return np.where(impossible, -np.inf, scaled)


def _log_probs_of_prefixes(lm: LanguageModel, posterior: Posterior, sequences: Sequences) -> FloatArray:
    """Return log p(x_1:t | c) of the first t tokens of completions (P, N), t = 0 ... T, shape (P, N, T + 1)."""
    with no_gradient():
        each = to_host(lm.token_log_probs(posterior.prompt_ids, sequences)).astype(np.float64)
    return np.cumsum(np.pad(each, ((0, 0), (0, 0), (1, 0))), axis=2)
