"""A reward of which only a posterior is known, as a likelihood: an ensemble of S draws of theta (theory.md 1.10).

    cut            r(x) = alpha log mean_theta exp(r_theta(x) / alpha - log Z_theta)    E_theta[p*_theta]: the default
    joint          r(x) = alpha log mean_theta exp(r_theta(x) / alpha)                  theta with weight Z_theta: optimistic
    plug-in        r(x) = mean_theta r_theta(x)                                         as if the mean were known
    conservative   r(x) = mean_theta r_theta(x) - k sd_theta r_theta(x)                 pays for what is known

The cut posterior is the mixture of the posteriors of each theta, each normalised: uncertainty goes from the data to the
completions, and no theta gains weight by being easy to please. Divided by its own Z_theta, every r_theta is one function of
the completion, and their joint posterior is the cut one; so every algorithm that takes a reward samples it.
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
from bayes_klrl.posterior import Posterior
from bayes_klrl.reward_models.anchors import Anchors, measured_anchors, posterior_batch
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
        """Completions to standardised features z."""

    @property
    def from_preferences(self) -> bool:
        """Whether r_theta is known up to a constant per prompt only."""

    def thetas(self, num: int | None = None) -> FloatArray:
        """Return `num` draws of theta, shape (num, J); None: all of them."""


def _no_reward(tokens: IntArray, lengths: IntArray) -> FloatArray:  # noqa: ARG001
    """Return 0 for every completion."""
    return np.zeros(len(lengths))


@dataclass(frozen=True, eq=False, repr=False)
class EnsembleReward(Factor):
    """An uncertain reward r_theta, theta ~ p(theta | data), as a factor of a `Posterior`'s likelihood.

    Within a posterior it knows the prior and the prompts, and `anchors` are measured when they are first needed: by
    enumeration where there are few completions, else from `num_draws` prior draws of each prompt. Tempered, or in another
    posterior, it is measured anew, for log Z_theta depends on alpha, prior and prompts.

    Parameters
    ----------
    model
        The posterior of theta.
    alpha
        Units of reward per nat.
    target
        "cut", "joint", "plug-in" or "conservative"; see the file.
    anchor
        For "joint" and "conservative", which change when a constant is added to one r_theta: "mean" subtracts E_p0[r_theta]
        of each prompt, "none" takes r_theta as it is. Needed for a reward learned from preferences, which leave that constant
        open; for one learned from scores None means "none".
    num_thetas
        S, evenly spaced draws of theta.
    caution
        k of "conservative".
    num_draws, seed
        Of the pool of prior draws.
    max_sequences
        Enumerate if there are no more completions than this, over all prompts.
    name
        For tables and errors.
    base
        Prior, prompts and other factors that the anchors are of. `Posterior` sets it.

    Raises
    ------
    BayesKLRLError
        For bad arguments; for a joint or conservative target of a reward that is open to shifts without `anchor`.
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
                f"An ensemble is of a bk.RewardPosterior, as bk.RewardModel(...).fit returns it; got {self.model!r}."
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
        _ = self.thetas  # there must be as many
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
        """The given name, or the target's."""
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
        """Return r_theta(x), as the model has them: (S, M) of a batch, (P, S, N) of completions of the posterior's prompts."""
        if isinstance(x, Batch):
            of_batch: FloatArray = self.thetas @ self.model.features(x).T
            return of_batch
        sequences = self._posterior.sequences(x)
        each = [
            self.thetas @ self.model.features(posterior_batch(self._posterior, sequences, p)).T
            for p in range(self._posterior.num_prompts)
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
        """Return the same uncertain reward at alpha / gamma, to be measured anew in a posterior."""
        return replace(self, alpha=self.alpha / gamma, base=None)

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
        base = Posterior(
            setting.prior,
            product(others) if others else TokenReward(_no_reward, alpha=1.0),
            prompts=setting.prompts,
            max_new_tokens=setting.max_new_tokens,
            **setting.columns,
        )
        return replace(self, base=base)

    @property
    def _posterior(self) -> Posterior:
        """Prior, prompts and other factors."""
        if self.base is None:
            raise BayesKLRLError(
                f"{self.label!r} depends on the prior and the prompts: put it into a bk.Posterior(prior, reward, ...) and ask "
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
