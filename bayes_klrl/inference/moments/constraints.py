"""Posteriors with given means of features: the generative distributional control of Khalifa et al. (2021).

Among all distributions with E[f_j(x)] = mu_j, j = 1..J, the nearest to the prior in KL is

    p_lambda(x) = p0(x) exp(sum_j lambda_j f_j(x)) / Z(lambda),

where lambda minimises the convex log Z(lambda) - lambda . mu, with gradient E_lambda[f] - mu and Hessian Cov_lambda[f]
(theory.md 1.13). So alpha_j = 1 / lambda_j: a target for the mean determines the KL coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np

from bayes_klrl.batch import BATCH_NAMES
from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError, BudgetError
from bayes_klrl.inference.exact.enumeration import enumerated_posterior, num_sequences
from bayes_klrl.inference.moments.feasibility import check_feasible
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.likelihood import Factor, Likelihood, Reward, TokenReward
from bayes_klrl.models.automata.reward import AutomatonReward
from bayes_klrl.posterior import Posterior
from bayes_klrl.reward_functions.signatures import parameters
from bayes_klrl.typing import FloatArray, LanguageModel
from bayes_klrl.weights import effective_sample_size, logsumexp, normalised

__all__ = ["MomentConstraint", "moment_constraint"]

Feature = Likelihood | Callable[..., Any]

_LEAST_ESS = 10  # smallest effective sample size at which a mean is reported (theory.md 7.1)
_TOLERANCE = 1e-10  # error of a mean, in prior standard deviations
_COARSE = 1e-6  # accepted error if the objective has no more digits
_MAX_STEPS, _SMALLEST_STEP = 200, 1e-12
_SMALLEST_LAMBDA = 1e-12  # used if the prior already has the target mean


@dataclass(frozen=True, eq=False)
class MomentConstraint:
    """The distribution nearest to the prior that has the given means, as returned by `moment_constraint`.

    Parameters
    ----------
    posterior
        The posterior whose likelihood is the product of exp(lambda_j f_j).
    lambdas
        The weights lambda of the features, the same for all prompts, (J,).
    means
        E[f] under the posterior, mean over prompts, (J,): exact, or estimated by the reweighted pool.
    prior_means
        E[f] under the prior, mean over prompts, (J,).
    log_evidence
        log Z(lambda) of each prompt, (P,).
    ess
        Effective sample size of the pool at lambda, (P,); NaN if all completions were enumerated.
    is_exact
        Whether all completions were enumerated.

    Examples
    --------
    The result holds a posterior for any algorithm; here token 1 has prior probability 0.1 and gets probability 0.5.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.9, 0.1]), eos_token_id=None)
    >>> is_1 = bk.TokenReward(lambda tokens, lengths: tokens[:, 0], alpha=1.0)
    >>> found = bk.moment_constraint(coin, is_1, 0.5, max_new_tokens=1)
    >>> exact = bk.Exact().run(found.posterior, seed=0)
    >>> exact.mean(exact.tokens[..., 0]).round(6), found.alphas.round(3)
    (array([0.5]), array([0.455]))
    """

    posterior: Posterior
    lambdas: FloatArray
    means: FloatArray
    prior_means: FloatArray
    log_evidence: FloatArray
    ess: FloatArray
    is_exact: bool

    @property
    def alphas(self) -> FloatArray:
        """1 / lambda, (J,): the KL coefficients that RL would need; negative if the mean is below the prior's."""
        alphas: FloatArray = 1 / self.lambdas
        return alphas


def moment_constraint(
    prior: LanguageModel,
    features: Feature | Sequence[Feature],
    targets: float | Sequence[float],
    *,
    max_new_tokens: int,
    prompts: str | Sequence[object] = "",
    num_draws: int | None = None,
    seed: int = 0,
    max_sequences: int = 200_000,
    progress: bool = False,
) -> MomentConstraint:
    """Return the posterior nearest to the prior with E[f_j] = mu_j, by damped Newton.

    Parameters
    ----------
    prior, prompts, max_new_tokens
        The language model, prompts and largest number of tokens, as in `Posterior`. For several prompts one lambda is found,
        and E[f] is the mean over prompts.
    features
        One feature or a list of J: each is a function of a list of completions or of (tokens, lengths), a `Reward`,
        `TokenReward` or `AutomatonReward`. Only their functions are used; their alphas are replaced.
    targets
        The means mu, one number per feature.
    num_draws
        Number of prior draws per prompt in the pool. None enumerates all completions if there are at most `max_sequences`,
        and otherwise uses 10,000 draws.
    seed
        Seed for all random numbers.
    max_sequences
        The largest number of completions, over all prompts, that is enumerated.
    progress
        Show a progress bar.

    Raises
    ------
    BayesKLRLError
        If no distribution has these means (mu is outside the convex hull of f), or none with a finite lambda (mu is on its
        boundary).
    BudgetError
        If the pool is too small: the effective sample size at lambda is below 10.

    Examples
    --------
    A feature with prior mean 0.07 gets mean 0.5, so that lambda = logit 0.5 - logit 0.07.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.93, 0.07]), eos_token_id=None)
    >>> is_1 = bk.TokenReward(lambda tokens, lengths: tokens[:, 0], alpha=1.0)
    >>> found = bk.moment_constraint(coin, is_1, 0.5, max_new_tokens=1)
    >>> found.lambdas.round(3), found.means.round(6)
    (array([2.587]), array([0.5]))
    """
    factors = _factors(features)
    mu = _targets(targets, len(factors))
    if num_draws is not None:
        check_count("num_draws", num_draws, least=2)
    base = Posterior(prior, _product(factors, np.ones(len(factors))), prompts=prompts, max_new_tokens=max_new_tokens)
    count = num_sequences(prior.vocab_size, len(prior.eos_token_ids), max_new_tokens) * base.num_prompts
    is_exact = num_draws is None and count <= max_sequences
    values, log_base = _support(base, factors, None if is_exact else num_draws or 10_000, seed, progress)
    check_feasible(values, log_base, mu, is_exact)
    lambdas = _newton(values, log_base, mu)
    log_weights = log_base + values @ lambdas
    ess = effective_sample_size(log_weights)
    if not is_exact and ess.min() < _LEAST_ESS:
        raise BudgetError(
            f"At lambda = {lambdas.round(3).tolist()} the pool of {values.shape[1]:,} prior draws has an effective sample "
            f"size of {ess.min():.1f}, too small to estimate a mean. Raise num_draws, or ask for means nearer to the prior's, "
            f"{_means(values, log_base).round(3).tolist()}."
        )
    return MomentConstraint(
        posterior=Posterior(prior, _product(factors, lambdas), prompts=prompts, max_new_tokens=max_new_tokens),
        lambdas=lambdas,
        means=_means(values, log_weights),
        prior_means=_means(values, log_base),
        log_evidence=logsumexp(log_weights),
        ess=np.full(len(ess), np.nan) if is_exact else ess,
        is_exact=is_exact,
    )


def _factors(features: Feature | Sequence[Feature]) -> tuple[Factor, ...]:
    """Return the features as single rewards."""
    given: Any = list(features) if isinstance(features, Sequence) else [features]
    factors: list[Factor] = []
    for feature_or_function in given:
        is_function = callable(feature_or_function) and not isinstance(feature_or_function, Likelihood)
        each = _reward_of(feature_or_function) if is_function else feature_or_function
        for feature in each.factors if isinstance(each, Likelihood) else (each,):
            if not isinstance(feature, Reward | TokenReward | AutomatonReward):
                raise BayesKLRLError(
                    f"A feature is a function of completions, a bk.Reward, bk.TokenReward or bk.AutomatonReward; got "
                    f"{feature!r}. A hard constraint has no mean to choose: multiply it into the posterior instead."
                )
            factors.append(feature)
    if not factors:
        raise BayesKLRLError("features is empty; give at least one, such as bk.Reward(fn, alpha=1.0).")
    return tuple(factors)


def _reward_of(fn: Callable[..., Any]) -> Factor:
    """Return a function as a reward: of (tokens, lengths) if it requires two arguments that are no columns, else of texts."""
    required = parameters(fn)[0]
    reads_tokens = len(required) == 2 and not set(BATCH_NAMES).intersection(required)
    return TokenReward(fn, alpha=1.0) if reads_tokens else Reward(fn, alpha=1.0)


def _targets(targets: float | Sequence[float], num: int) -> FloatArray:
    """Return mu as float64 (J,)."""
    try:
        mu = np.atleast_1d(np.asarray(targets, dtype=np.float64))
    except (TypeError, ValueError):
        mu = np.array([np.nan])
    if mu.shape != (num,) or not np.isfinite(mu).all():
        raise BayesKLRLError(f"targets needs one finite number per feature, {num} in all; got {targets!r}.")
    return mu


def _product(factors: tuple[Factor, ...], lambdas: FloatArray) -> Likelihood:
    """Return the product of exp(lambda_j f_j) as a likelihood whose alphas are positive."""
    parts = [_weighted(factor, float(weight)) for factor, weight in zip(factors, lambdas, strict=True)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole * part
    return whole


def _weighted(factor: Factor, weight: float) -> Likelihood:
    """Return exp(weight * f): f at alpha = 1 / weight, or -f at alpha = -1 / weight."""
    alpha = 1 / max(abs(weight), _SMALLEST_LAMBDA)
    if weight >= 0:
        return _at_alpha(factor, alpha)
    bounds = None if factor.bounds is None else (-factor.bounds[1], -factor.bounds[0])
    if isinstance(factor, AutomatonReward):
        paid, final = -np.asarray(factor.token_rewards), -np.asarray(factor.final_rewards)
        return replace(factor, token_rewards=paid, final_rewards=final, alpha=alpha, bounds=bounds)
    if isinstance(factor, Reward):
        return replace(factor, weights=[-each for each in factor.weights or ()], alpha=alpha, bounds=bounds)
    assert isinstance(factor, TokenReward)
    return replace(factor, fn=_negated(factor.fn), alpha=alpha, bounds=bounds)


def _at_alpha(factor: Factor, alpha: float) -> Factor:
    """Return the same reward at another alpha."""
    assert factor.alpha is not None
    return factor.tempered(factor.alpha / alpha)


def _negated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return -fn with the same signature, because the signature decides how a reward is called."""

    @wraps(fn)
    def negative(*arguments: Any, **named: Any) -> FloatArray:
        return -np.asarray(fn(*arguments, **named), dtype=np.float64)

    return negative


def _support(
    base: Posterior, factors: tuple[Factor, ...], num_draws: int | None, seed: int, progress: bool
) -> tuple[FloatArray, FloatArray]:
    """Return f of all completions or of a pool of prior draws, shape (P, N, J), and their log prior weights (P, N)."""
    if num_draws is None:
        draws = enumerated_posterior(base, method="enumeration")
        log_base = draws.log_prior
    else:
        draws = ImportanceSampling(num_draws).run(base, seed=seed, progress=progress)
        log_base = np.full(draws.shape, -np.log(num_draws))
    columns = [
        Posterior(
            base.prior, _at_alpha(factor, 1.0), prompts=list(base.prompts), max_new_tokens=base.max_new_tokens
        ).reward(draws)
        for factor in factors
    ]
    values = np.stack(columns, axis=2)
    if not np.isfinite(values[np.isfinite(log_base)]).all():
        raise BayesKLRLError("A feature is -inf for a completion that the prior can draw, so it has no finite mean.")
    return np.where(np.isfinite(log_base)[..., None], values, 0.0), log_base


def _newton(values: FloatArray, log_base: FloatArray, mu: FloatArray) -> FloatArray:
    """Return the minimum of mean_p log Z_p(lambda) - lambda . mu by Newton steps, halved until they descend (Armijo), (J,)."""
    lambdas = np.zeros(len(mu))
    spread = np.sqrt(np.maximum(np.diag(_covariance(values, log_base)), np.finfo(float).tiny))

    def objective(at: FloatArray) -> float:
        return float(logsumexp(log_base + values @ at).mean() - at @ mu)

    for _ in range(_MAX_STEPS):
        log_weights = log_base + values @ lambdas
        gradient = _means(values, log_weights) - mu
        if (np.abs(gradient) <= _TOLERANCE * spread).all():
            return lambdas
        step = -np.linalg.lstsq(_covariance(values, log_weights), gradient, rcond=None)[0]
        before, slope, size = objective(lambdas), float(gradient @ step), 1.0
        while size > _SMALLEST_STEP and objective(lambdas + size * step) > before + 1e-4 * size * slope:
            size /= 2
        if size <= _SMALLEST_STEP:  # the objective has no more digits
            break
        lambdas = lambdas + size * step
    if (np.abs(gradient) <= _COARSE * spread).all():
        return lambdas
    raise BayesKLRLError(
        f"Newton's method stopped {np.abs(gradient).max():.2g} short of the targets, at lambda = {lambdas.round(3).tolist()}: "
        "only few completions reach means near the targets. Move the targets towards the prior's means."
    )


def _means(values: FloatArray, log_weights: FloatArray) -> FloatArray:
    """Return E[f] by self-normalised weights, mean over prompts, (J,)."""
    means: FloatArray = np.einsum("pn,pnj->pj", normalised(log_weights), values).mean(axis=0)
    return means


def _covariance(values: FloatArray, log_weights: FloatArray) -> FloatArray:
    """Return Cov[f] by self-normalised weights, mean over prompts, (J, J)."""
    weights = normalised(log_weights)
    centred = values - np.einsum("pn,pnj->pj", weights, values)[:, None]
    covariance: FloatArray = np.einsum("pn,pnj,pnk->jk", weights, centred, centred) / len(weights)
    return covariance
