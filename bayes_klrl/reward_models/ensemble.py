"""An uncertain reward as a likelihood: an ensemble of S draws of theta from its posterior (theory.md 1.10).

    cut            r(x) = alpha log mean_theta exp(r_theta(x) / alpha - log Z_theta)    E_theta[p*_theta]: the default
    joint          r(x) = alpha log mean_theta exp(r_theta(x) / alpha)                  theta with weight Z_theta: optimistic
    plug-in        r(x) = mean_theta r_theta(x)                                         the mean reward, as if it were known
    conservative   r(x) = mean_theta r_theta(x) - k sd_theta r_theta(x)                 penalises uncertainty

The cut posterior is the mixture of the normalised posteriors of all theta: uncertainty goes from the data to the completions,
and a theta does not gain weight because it gives high rewards. With every exp(r_theta / alpha) divided by its Z_theta, the
joint posterior is the cut one; its reward is one function of the completion, so every algorithm samples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from bayes_klrl.batch import Batch, Setting
from bayes_klrl.checks import check_count, check_finite
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.likelihood import Factor, Likelihood, TokenReward, check_alpha_and_bounds, product
from bayes_klrl.posterior import Posterior, numbered
from bayes_klrl.reward_models.anchors import Anchors, measured_anchors, posterior_batch, rewards_of
from bayes_klrl.reward_models.features import FeatureMap, HiddenStates
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel
from bayes_klrl.weights import logmeanexp

__all__ = ["EnsembleReward", "ensemble_of"]

Target = Literal["cut", "joint", "plug-in", "conservative"]
Anchor = Literal["mean", "none"]


@runtime_checkable
class UncertainWeights(Protocol):
    """Draws of the weights theta of a linear reward r_theta(x) = theta . z(x); a `RewardPosterior` has them."""

    @property
    def features(self) -> FeatureMap:
        """Function from completions to standardised features z."""

    @property
    def from_preferences(self) -> bool:
        """Whether r_theta is only known up to a constant per prompt."""

    def thetas(self, num: int | None = None) -> FloatArray:
        """Return `num` draws of theta, shape (num, J); None: all of them."""


def _no_reward(tokens: IntArray, lengths: IntArray) -> FloatArray:  # noqa: ARG001
    """Return 0 for every completion."""
    return np.zeros(len(lengths))


@dataclass(frozen=True, eq=False, repr=False)
class EnsembleReward(Factor):
    """An uncertain reward r_theta, theta ~ p(theta | data), as a factor of a `Posterior`'s likelihood.

    Inside a posterior it knows the prior and the prompts, and `anchors` are measured when they are first needed: by
    enumeration where there are few completions, otherwise from `num_draws` prior draws per prompt. When it is tempered or put
    into another posterior, it is measured anew, because log Z_theta depends on alpha, prior and prompts.

    Parameters
    ----------
    model
        The posterior of theta, a `RewardPosterior`.
    alpha
        Units of reward per nat.
    target
        The use that is made of the uncertainty: "cut", "joint", "plug-in" or "conservative"; the module has the formulas.
    anchor
        For the targets "joint" and "conservative", which change when a constant is added to one r_theta: "mean" subtracts
        E_p0[r_theta] of each prompt, "none" takes r_theta as it is. It must be given for a reward learned from preferences,
        which do not determine that constant; for a reward learned from scores None means "none".
    num_thetas
        S, the number of draws of theta, evenly spaced over those of the model.
    caution
        k, the number of standard deviations that the target "conservative" subtracts.
    num_draws, seed
        Draws per prompt in the pool of prior draws, and their seed.
    max_sequences
        The largest number of completions, over all prompts, for which the anchors are enumerated.
    name
        Name in tables and error messages; None: one that names the target.
    base
        Posterior of the other factors, which the anchors are measured on. `Posterior` sets it.

    Raises
    ------
    BayesKLRLError
        If an argument is wrong, or a joint or conservative target lacks the `anchor` that it needs.

    Examples
    --------
    `RewardPosterior.reward` makes one. Here three draws of theta are given by hand instead of by NUTS:

    >>> import bayes_klrl as bk
    >>> from bayes_klrl.reward_models.features import FeatureMap
    >>> class ThreeRewards:
    ...     features = FeatureMap(bk.TokenFeatures(lambda tokens, lengths: lengths), np.zeros(1), None, np.ones(1))
    ...     from_preferences = True
    ...     def thetas(self, num=None):
    ...         return np.array([[0.5], [1.0], [1.5]])
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> uncertain = bk.EnsembleReward(ThreeRewards(), alpha=1.0, num_thetas=3)
    >>> posterior = bk.Posterior(coin, uncertain, max_new_tokens=3)
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> bool(abs(exact.log_evidence[0]) < 1e-9)  # log 1: every exp(r_theta) is divided by its Z_theta
    True
    """

    model: UncertainWeights
    alpha: float = field(kw_only=True)
    target: Target = field(default="cut", kw_only=True)
    anchor: Anchor | None = field(default=None, kw_only=True)
    num_thetas: int = field(default=100, kw_only=True)
    caution: float = field(default=1.0, kw_only=True)
    num_draws: int = field(default=4096, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    max_sequences: int = field(default=20_000, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    base: Posterior | None = field(default=None, kw_only=True)
    bounds: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, UncertainWeights):
            raise BayesKLRLError(
                f"An EnsembleReward needs a bk.RewardPosterior, as bk.RewardModel(...).fit returns it; got {self.model!r}."
            )
        check_alpha_and_bounds(self)
        if self.target not in get_args(Target) or self.anchor not in (None, *get_args(Anchor)):
            raise BayesKLRLError(
                f"target is one of {get_args(Target)} and anchor one of {get_args(Anchor)} or None; got {self.target!r} and "
                f"{self.anchor!r}."
            )
        check_finite("caution", self.caution)
        check_count("num_draws", self.num_draws, least=2)
        check_count("seed", self.seed, least=0)
        check_count("max_sequences", self.max_sequences, least=0)
        check_count("num_thetas", self.num_thetas)
        _ = self.thetas  # refuses more than there are
        if self.shift_matters and self.anchor is None and self.model.from_preferences:
            raise BayesKLRLError(
                f"The {self.target} posterior changes when a constant is added to one r_theta, and preferences leave that "
                'constant open, so without an anchor it is not defined. Give anchor="mean" (every r_theta less its prior '
                'mean), accept the features\' own origin with anchor="none", or use the default target, "cut", which no '
                "constant changes."
            )

    def __repr__(self) -> str:
        return f"EnsembleReward({self.label!r}, alpha={self.alpha:.4g}, {self.num_thetas} thetas)"

    @property
    def label(self) -> str:
        """The given name, or one that names the target."""
        return self.name or f"uncertain reward ({self.target})"

    @property
    def shift_matters(self) -> bool:
        """Whether a constant added to one r_theta changes the target."""
        return self.target in ("joint", "conservative")

    @property
    def depends_on_alpha(self) -> bool:
        """See `Likelihood.depends_on_alpha`."""
        return self.target in ("cut", "joint")

    @cached_property
    def thetas(self) -> FloatArray:
        """The draws of theta, shape (S, J)."""
        return self.model.thetas(self.num_thetas)

    @cached_property
    def anchors(self) -> Anchors:
        """The log Z_theta and E_p0[r_theta] of each prompt, with their errors.

        Raises
        ------
        BayesKLRLError
            If the ensemble belongs to no posterior yet.
        """
        return measured_anchors(
            self._posterior,
            self.model.features,
            self.thetas,
            self.alpha,
            num_draws=self.num_draws,
            seed=self.seed,
            most=self.max_sequences,
        )

    def rewards(self, x: Batch | Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return r_theta(x) without anchors: (S, M) for a batch, (P, S, N) for completions of the posterior's prompts."""
        if isinstance(x, Batch):
            return rewards_of(self.thetas, self.model.features, x, self.alpha, self.label)
        sequences = self._posterior.sequences(x)
        each = [
            self.rewards(posterior_batch(self._posterior, sequences, p)) for p in range(self._posterior.num_prompts)
        ]
        return np.stack(each)

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`."""
        rewards = self.rewards(batch)
        if self.target == "plug-in":
            mean: FloatArray = rewards.mean(axis=0)
            return mean
        if self.target == "cut":
            self.anchors.check_ess(self.alpha)
            log_z = self.anchors.log_evidence[batch.prompt_index]
            return self.alpha * logmeanexp(rewards.T / self.alpha - log_z)
        if self.anchor == "mean":
            rewards = rewards - self.anchors.mean[batch.prompt_index].T
        if self.target == "joint":
            return self.alpha * logmeanexp(rewards.T / self.alpha)
        pessimistic: FloatArray = rewards.mean(axis=0) - self.caution * rewards.std(axis=0)
        return pessimistic

    def tempered(self, gamma: float) -> EnsembleReward:
        """Return the same uncertain reward at alpha / gamma; inside a posterior it stays there, and is measured anew."""
        base = self.base
        if base is not None:
            base = base.with_likelihood(base.likelihood**gamma)
        return replace(self, alpha=self.alpha / gamma, base=base)

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`."""
        self.model.features.features.check(prior, columns)

    def bind_with(self, setting: Setting, others: tuple[Factor, ...]) -> EnsembleReward:
        """See `Factor.bind_with`."""
        if any(isinstance(other, EnsembleReward) for other in others):
            raise BayesKLRLError(
                "A likelihood takes one EnsembleReward: of two, the cut posterior would be a mixture over pairs of thetas. "
                "Fit one reward model with the features of both."
            )
        features = self.model.features.features
        if isinstance(features, HiddenStates):
            features.check_room(setting.prompt_ids, setting.max_new_tokens, setting.prior)
        likelihood = product(others) if others else TokenReward(_no_reward, alpha=1.0)
        options = {**setting.columns, "prompts": setting.prompts, "max_new_tokens": setting.max_new_tokens}
        base = numbered(setting.prompt_numbers, setting.prior, likelihood, options)
        return replace(self, base=base)

    @property
    def _posterior(self) -> Posterior:
        """The posterior of the other factors, with prior and prompts."""
        if self.base is None:
            raise BayesKLRLError(
                f"{self.label!r} depends on the prior and the prompts: put it into a bk.Posterior(prior, reward, ...) and use "
                "`ensemble_of(posterior)`, or the posterior itself."
            )
        return self.base


def ensemble_of(posterior: Posterior) -> EnsembleReward:
    """Return the `EnsembleReward` of a posterior, which knows its prior and prompts.

    Raises
    ------
    BayesKLRLError
        If there is none.
    """
    likelihood: Any = posterior.likelihood
    assert isinstance(likelihood, Likelihood)
    for factor in likelihood.factors:
        if isinstance(factor, EnsembleReward):
            return factor
    raise BayesKLRLError(f"There is no bk.EnsembleReward in this likelihood, {likelihood.label!r}.")
