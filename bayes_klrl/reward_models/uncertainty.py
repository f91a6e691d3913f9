"""The part of the variance of generations that an uncertain reward causes.

Draws of the posterior of an `EnsembleReward`, with weights W_n, are reweighted to the posterior of each theta,

    w_theta(x_n) prop. to W_n exp(r_theta(x_n) / alpha - l(x_n)),   l the log-likelihood that the draws were weighted by,

so that for any function f of completions, with E_theta over the ensemble and Var f under the cut posterior E_theta[p*_theta],

    Var f = E_theta Var_{p*_theta} f  (generation)  +  Var_theta E_{p*_theta} f  (reward)

holds exactly for the reweighted draws. Their noise adds about Var f / ESS to the second part, so compare it with `ess`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.reward_models.anchors import posterior_batch
from bayes_klrl.reward_models.ensemble import ensemble_of
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import effective_sample_size, normalised

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RewardUncertainty", "VarianceParts", "reward_uncertainty"]


@dataclass(frozen=True)
class VarianceParts:
    """The variance of a function f of completions under the cut posterior and its two parts, per prompt, shape (P,).

    Parameters
    ----------
    mean
        The mean E f.
    total
        The variance Var f, the sum of the two parts.
    generation
        E_theta Var_{p*_theta} f: the variance that would remain if the reward were known.
    reward
        Var_theta E_{p*_theta} f: the variance that more preferences would remove.
    """

    mean: FloatArray
    total: FloatArray
    generation: FloatArray
    reward: FloatArray

    @property
    def share(self) -> FloatArray:
        """The share of the variance that the reward causes, from 0 to 1; NaN where f does not vary."""
        with np.errstate(invalid="ignore"):
            result: FloatArray = self.reward / self.total
        return result


@dataclass(frozen=True, eq=False, repr=False)
class RewardUncertainty:
    """The uncertainty of the reward model about each of N draws for P prompts; `reward_uncertainty` returns one.

    Parameters
    ----------
    reward_mean, reward_sd
        Mean and standard deviation over theta of r_theta(x) - E_p0[r_theta], the expectation for the prompt, shape (P, N).
    inclusion_mean, inclusion_sd
        Mean and standard deviation over theta of the weight w_theta(x) that a completion has among these draws, shape (P, N).
    weights
        The weights w_theta(x), which sum to 1 over N, shape (P, S, N).
    ess
        Effective sample size of these draws for each p*_theta, shape (P, S); NaN for an enumeration.
    draws
        The draws.

    Examples
    --------
    Two rewards, one for many tokens and one against, given by hand instead of by `RewardModel.fit`:

    >>> import bayes_klrl as bk
    >>> from bayes_klrl.reward_models.features import FeatureMap
    >>> class TwoRewards:
    ...     features = FeatureMap(bk.TokenFeatures(lambda tokens, lengths: lengths), np.zeros(1), None, np.ones(1))
    ...     from_preferences = True
    ...     def thetas(self, num=None):
    ...         return np.array([[-5.0], [5.0]])
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> posterior = bk.Posterior(coin, bk.EnsembleReward(TwoRewards(), alpha=1.0, num_thetas=2), max_new_tokens=3)
    >>> uncertainty = bk.reward_uncertainty(posterior, bk.Exact().run(posterior, seed=0))

    Nearly all of the variance of the length comes from not knowing the reward:

    >>> draws = uncertainty.draws
    >>> uncertainty.decompose(draws.lengths).share > 0.9
    array([ True])
    """

    reward_mean: FloatArray
    reward_sd: FloatArray
    inclusion_mean: FloatArray
    inclusion_sd: FloatArray
    weights: FloatArray
    ess: FloatArray
    draws: Draws = field(repr=False)

    def decompose(self, values: ArrayLike | Callable[[list[str]], Sequence[float]]) -> VarianceParts:
        """Return the variance of f under the cut posterior, in its two parts.

        Parameters
        ----------
        values
            The value f(x) of each draw, shape (P, N), or (N,) for one prompt; or a function that maps a list of texts to a
            list of numbers.
        """
        if callable(values):
            values = [values(texts) for texts in self.draws.texts()]
        try:
            f = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise BayesKLRLError(f"values must be numbers, one per draw: {error}.") from error
        f = f[None] if f.ndim == 1 and len(self.ess) == 1 else f
        if f.shape != self.draws.shape or not np.isfinite(f).all():
            raise BayesKLRLError(
                f"values must be finite, of the shape (P, N) = {self.draws.shape}; got shape {f.shape}."
            )
        means = np.einsum("psn,pn->ps", self.weights, f)  # E_{p*_theta} f
        within = np.einsum("psn,psn->ps", self.weights, np.square(f[:, None] - means[..., None]))
        generation, reward = within.mean(axis=1), means.var(axis=1)
        return VarianceParts(means.mean(axis=1), generation + reward, generation, reward)

    def table(self) -> pd.DataFrame:
        """Return one row per draw: `Draws.to_pandas` with mean and sd of reward and inclusion."""
        names = ("reward_mean", "reward_sd", "inclusion_mean", "inclusion_sd")
        return self.draws.to_pandas().assign(**{name: getattr(self, name).ravel() for name in names})

    def __repr__(self) -> str:
        num_prompts, num_thetas, num_draws = self.weights.shape
        ess = "an enumeration" if np.isnan(self.ess).all() else f"ESS of a theta {np.nanmin(self.ess):.0f} or more"
        return f"RewardUncertainty({num_draws} draws x {num_prompts} prompts, {num_thetas} thetas: {ess})"


def reward_uncertainty(posterior: Posterior, draws: Draws) -> RewardUncertainty:
    """Return the uncertainty of the reward about each draw of its posterior.

    Parameters
    ----------
    posterior
        A posterior with an `EnsembleReward`, of any target, in its likelihood.
    draws
        Draws of this posterior by any algorithm, weighted or equally weighted.

    Raises
    ------
    BayesKLRLError
        If there is no `EnsembleReward` in the likelihood, or the draws are of another posterior.

    Examples
    --------
    Two rewards, given by hand instead of by `RewardModel.fit`, that disagree more about longer completions:

    >>> import bayes_klrl as bk
    >>> from bayes_klrl.reward_models.features import FeatureMap
    >>> class TwoRewards:
    ...     features = FeatureMap(bk.TokenFeatures(lambda tokens, lengths: lengths), np.zeros(1), None, np.ones(1))
    ...     from_preferences = True
    ...     def thetas(self, num=None):
    ...         return np.array([[1.0], [2.0]])
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> posterior = bk.Posterior(coin, bk.EnsembleReward(TwoRewards(), alpha=1.0, num_thetas=2), max_new_tokens=3)
    >>> draws = bk.ImportanceSampling(500).run(posterior, seed=0)
    >>> uncertainty = bk.reward_uncertainty(posterior, draws)
    >>> uncertainty.reward_sd.shape, uncertainty.weights.shape
    ((1, 500), (1, 2, 500))
    """
    ensemble = ensemble_of(posterior)
    if draws.prompts != posterior.prompts or not np.isclose(draws.alpha, posterior.alpha, rtol=1e-12):
        raise BayesKLRLError("These draws are of another posterior: their prompts or their alpha differ.")
    sequences = posterior.sequences(draws)
    if not np.allclose(draws.reward, posterior.reward(sequences), rtol=1e-6, atol=1e-6 * posterior.alpha):
        raise BayesKLRLError(
            "These draws are of another posterior: their rewards differ from those of its likelihood, target included. Give "
            "the posterior that they were drawn for."
        )
    rewards = ensemble.rewards(sequences)
    own = ensemble.values(posterior_batch(posterior, sequences)).reshape(draws.shape) / ensemble.alpha
    log_weights = draws.log_weights[:, None] + rewards / ensemble.alpha - own[:, None]
    weights = normalised(log_weights)
    enumerated = np.isnan(draws.ess) & (draws.log_weights.max(axis=1) > draws.log_weights.min(axis=1))
    anchored = rewards - ensemble.anchors.mean[..., None]
    return RewardUncertainty(
        reward_mean=anchored.mean(axis=1),
        reward_sd=anchored.std(axis=1),
        inclusion_mean=weights.mean(axis=1),
        inclusion_sd=weights.std(axis=1),
        weights=weights,
        ess=np.where(enumerated[:, None], np.nan, effective_sample_size(log_weights)),
        draws=draws,
    )
