"""The alpha that brings a guide to a given KL to its prior, or a given mean reward, found during the training.

The frontier of a few draws of the prior gives the alpha to start from. A controller then corrects it by what the guide does:
once the guide has come near the target, but after 20 to 40 % of the steps,

    log alpha += gain / (number of steps) error / slope,
    error = log(KL / target), or log of (reward - the prior's) / (target - the prior's),

with a moving mean of the guide's KL (or reward), errors cut off at 1, and the slope of the frontier's log KL (or reward) in
-log alpha. With gain = number of steps that would be a Newton step; the guide lags behind its alpha, so that the steps have
to be much smaller. It is gradient ascent of the dual of max E[r] subject to KL <= target, whose multiplier is alpha.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from bayes_klrl.analysis.frontier.frontier import Frontier, frontier
from bayes_klrl.checks import check_count, check_finite, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.callbacks import StepRecord
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import LanguageModel

__all__ = ["AdaptiveAlpha"]

_LARGEST_ERROR = 1.0
_KEPT = 0.8  # of the moving mean, per step
_NEAR, _LEAST, _FREE = 0.1, 0.2, 0.4  # the controller begins near the target, but in this part of the steps
_FAR, _HELD = 0.15, 0.05  # of the way from the prior to the target
_SEEN = 20  # draws
_FURTHEST = 0.5  # of the extrapolation beyond the frontier's cut
_BEFORE, _SLOPES = 0.8, (0.3, 2.0)


@dataclass(eq=False)
class AdaptiveAlpha:
    """A callback that looks for the alpha at which the guide has a given KL to its prior, or a given mean reward.

    `Fit.posterior` is the posterior of the last alpha: that is what the guide approximates. `Fit.history["alpha"]` has all of
    them. It takes 200 steps or more to hold a target within 5 % of its distance from the prior's KL, 0, or mean reward.

    Parameters
    ----------
    kl
        The target KL(q || p0), a mean over prompts in nats.
    reward
        Or the target mean reward E_q[r].
    gain
        The size of the controller's steps, see the module; a large one makes guide and alpha oscillate.
    num_draws
        Number of prior draws, shared by the prompts, of the frontier that the search starts from.
    seed
        Seed of these draws.

    Raises
    ------
    BayesKLRLError
        If not exactly one target is given; in the first step, if no alpha gives it: a reward that is not above the prior's
        mean reward, or not below the upper end of the reward's declared bounds; a KL above that of keeping only completions
        of the highest possible reward.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 8))
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=8)
    >>> fit = bk.SVI(200).fit(posterior, seed=0, callbacks=[bk.AdaptiveAlpha(kl=0.5)])
    >>> bool(0.4 < fit.history["kl"][-20:].mean() < 0.6), bool(np.isclose(fit.posterior.alpha, fit.history["alpha"][-1]))
    (True, True)
    """

    kl: float | None = None
    reward: float | None = None
    gain: float = 6.0
    num_draws: int = 2000
    seed: int = 0
    _frontiers: dict[int, tuple[Posterior, Frontier]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.kl is None) == (self.reward is None):
            raise BayesKLRLError(f"AdaptiveAlpha takes exactly one of kl= and reward=; got {self!r}.")
        if self.kl is not None:
            check_positive("kl", self.kl)
        if self.reward is not None:
            check_finite("reward", self.reward)
        check_positive("gain", self.gain)
        check_count("num_draws", self.num_draws, least=2)

    def __call__(self, record: StepRecord, guide: LanguageModel) -> None:
        """Say so if the training ends far from the target; alphas are chosen by `next_alpha`."""
        if record.step + 1 == record.num_steps:
            value = _moving_mean(record.history[self._name])
            ((_, curve),) = self._frontiers.values()  # of the posterior before its alpha was changed
            if self._distance(value, curve) > _FAR:
                with suppress(UserWarning):  # where warnings are errors: what was learned matters more
                    warnings.warn(
                        f"AdaptiveAlpha: the guide's {self._name} is {value:.3g} at the end, not {self._target:.3g}. Take "
                        "more steps, or a larger gain if alpha was still moving in one direction.",
                        stacklevel=2,
                    )

    def next_alpha(
        self, step: int, num_steps: int, history: Mapping[str, Sequence[float]], posterior: Posterior
    ) -> float:
        """See `svi.callbacks.alphas.AlphaSchedule.next_alpha`."""
        curve = self._frontier_of(posterior)
        if step == 0:
            return self._start(curve, posterior)
        first, alpha = float(history["alpha"][0]), float(history["alpha"][-1])
        from_prior = self._of_prior(curve)
        value = _moving_mean(history[self._name])
        if not np.isfinite(value):  # a draw of likelihood 0: its reward says nothing
            return alpha
        ratio = (value - from_prior) / (self._target - from_prior)
        error = float(np.clip(np.log(max(ratio, 1e-9)), -_LARGEST_ERROR, _LARGEST_ERROR))
        has_arrived = abs(error) < _NEAR and step >= _LEAST * num_steps
        if alpha == first and not has_arrived and step < _FREE * num_steps:
            return first
        return float(alpha * np.exp(self.gain / num_steps * error / self._slope(curve, first)))

    def has_settled(
        self, step: int, num_steps: int, history: Mapping[str, Sequence[float]], posterior: Posterior
    ) -> bool:
        """Return whether the guide has come all the way to the target but 5 %, after the steps without a move of alpha."""
        distance = self._distance(_moving_mean(history[self._name]), self._frontier_of(posterior))
        return step >= _FREE * num_steps and distance <= _HELD

    @property
    def model_tokens(self) -> int:
        """Tokens that the prior drew and read for the frontier; the training counts them."""
        return sum(curve.cost.model_tokens for _, curve in self._frontiers.values())

    @property
    def _name(self) -> str:
        return "kl" if self.kl is not None else "reward"

    @property
    def _target(self) -> float:
        target = self.reward if self.kl is None else self.kl
        assert target is not None, "one of the two was given"
        return float(target)

    def _distance(self, value: float, curve: Frontier) -> float:
        """Return how far from the target a KL or reward is, relative to the prior's: a constant in the reward is no matter."""
        return abs(value - self._target) / abs(self._target - self._of_prior(curve))

    def _of_prior(self, curve: Frontier) -> float:
        """Return what KL, or mean reward, the prior has."""
        return 0.0 if self.kl is not None else float(curve.curves_at(np.array([0.0]))[0].reward[0])

    def _frontier_of(self, posterior: Posterior) -> Frontier:
        """Return the frontier of the prior's draws; the same draws in each process."""
        known = self._frontiers.get(id(posterior))
        if known is None:
            each = max(2, -(-self.num_draws // posterior.num_prompts))
            known = posterior, frontier(posterior, num_draws=each, seed=self.seed)
            self._frontiers = {id(posterior): known}
        return known[1]

    def _start(self, curve: Frontier, posterior: Posterior) -> float:
        """Return the alpha that the frontier gives for the target; beyond its cut, by its slope there in logarithms."""
        from_prior = self._of_prior(curve)
        if self.reward is not None:
            bounds = posterior.likelihood.bounds
            high = np.inf if bounds is None else bounds[1]
            if not from_prior < self.reward < high:
                raise BayesKLRLError(
                    f"No alpha gives a mean reward of {self.reward:.6g}: the prior's is {from_prior:.6g}, and rewards are at "
                    f"most {high:.6g}. Ask for one in between."
                )
        elif self._target >= _largest_kl(curve, posterior):
            raise BayesKLRLError(
                f"No alpha gives a KL of {self._target:.6g} nats: the prior has the highest possible reward so often that "
                f"keeping only such completions costs {_largest_kl(curve, posterior):.4g} nats. Ask for less."
            )
        with suppress(BayesKLRLError):  # the draws do not reach as far
            return curve.alpha_for(**{self._name: self._target})
        if not 0 < curve.cut < np.inf:
            return posterior.alpha
        there = float(getattr(curve.curves_at(np.array([1 / curve.cut]))[0], self._name)[0]) - from_prior
        further = max(((self._target - from_prior) / there) ** (-1 / self._slope(curve, curve.cut)), _FURTHEST)
        return float(curve.cut * further)

    def _slope(self, curve: Frontier, alpha: float) -> float:
        """Return the slope of the frontier's KL (or reward) at an alpha, or at its cut, in logarithms, against 1 / alpha."""
        inverse = np.array([_BEFORE, 1.0]) / max(alpha, curve.cut if np.isfinite(curve.cut) else 0.0)
        before, there = getattr(curve.curves_at(inverse)[0], self._name) - self._of_prior(curve)
        slope = np.log(there / before) / np.log(1 / _BEFORE) if there > before > 0 else 1.0
        return float(np.clip(slope, *_SLOPES))


def _largest_kl(curve: Frontier, posterior: Posterior) -> float:
    """Return the KL in the limit alpha -> 0, -log P0(r = its declared bound); inf where that is seen too rarely to say."""
    bounds = posterior.likelihood.bounds
    if bounds is None:
        return np.inf
    seen = (curve.pool.reward >= bounds[1]).mean(axis=1)
    return float(-np.log(seen).mean()) if (seen * curve.pool.num_draws >= _SEEN).all() else np.inf


def _moving_mean(values: Sequence[float]) -> float:
    """Return the exponentially weighted mean of the newest values."""
    newest = np.asarray(values[-40:], dtype=np.float64)
    weights = _KEPT ** np.arange(len(newest))[::-1]
    return float(weights @ newest / weights.sum())
