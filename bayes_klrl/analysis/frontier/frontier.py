"""The reward-KL frontier of a posterior over all alphas, from prior draws alone, before any training: `frontier`.

The frontier max{E_q[r] : KL(q || p0) <= K} is traced by the posteriors p*_alpha themselves, with slope dR/dK = alpha; no
policy is above it (theory.md 1.6). One pool of prior draws, weighted by exp(r / alpha), gives log Z, E[r], KL and ESS at every
alpha; `path` has the formulas and the errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.analysis.frontier.best_of_n_curve import best_of_n_curve
from bayes_klrl.analysis.frontier.curves import NORMAL_QUANTILE
from bayes_klrl.analysis.frontier.draws import default_grid, drawn_or_given, pool_cut, pool_of, unseen_cut
from bayes_klrl.analysis.frontier.extension import annealed_points
from bayes_klrl.analysis.frontier.implied_alpha import Gap, Implied, gap_at, implied, monotone_root
from bayes_klrl.analysis.frontier.path import MIN_ESS, curves
from bayes_klrl.analysis.frontier.path_points import PathPoints
from bayes_klrl.analysis.frontier.record import FrontierRecord, checked_alphas
from bayes_klrl.analysis.frontier.table import frontier_html, frontier_table, frontier_text
from bayes_klrl.checks import check_finite, check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, warn_caller
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.typing import Algorithm

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Frontier", "frontier"]

_STEP = 0.005  # of log alpha, half the width over which a slope is taken
_FAR = 2.0**40  # times the own 1 / alpha: as good as infinitely cold


@dataclass(frozen=True, eq=False, repr=False)
class Frontier(FrontierRecord):
    """log Z, E[r], KL to the prior and ESS of the posterior at every alpha, with intervals and where they end.

    The arrays `alphas`, `log_evidence`, `reward`, `kl` and `ess`, shape (A,), alphas falling, are means over the prompts,
    which are a fixed set: errors are those of the draws. `lower` and `upper` are 95 % intervals and `valid` says where these
    can be relied on, each by the quantity's name. `print` shows a table.

    Parameters
    ----------
    mean
        The curves for the mean over prompts, arrays (A,).
    per_prompt
        The curves for each prompt, arrays (P, A).
    cut
        The least alpha that the draws reach: ESS >= 100 for every prompt. KL there is below log N - 4.6, often far below.
        Numbers below it are extrapolation, of unknown error, unless an `extension` covers them: log Z and E[r] are then too
        low as a rule, and so are `gap` and `implied_alpha`. 0: no alpha is too cold for the rewards that were drawn, which
        have few levels; inf: the draws reach none. It knows nothing of rewards that no draw has.
    alpha
        The alpha of the posterior.
    best_of_n
        Reward and KL of best-of-n, from the same draws.
    pool
        The draws, as weights and rewards.
    unseen_cut
        The alpha below which completions that no draw has shown could move log Z out of its interval, were their reward as
        high as the declared bounds allow; no interval below it is `valid`, and those of E[r] and KL end sooner. 0: there is no
        such alpha, for the highest possible reward was drawn; inf: it is so at every alpha; NaN: no upper bound is declared,
        and the draws cannot tell.
    extension
        Points from another source that continue the curves below `cut`; None if there are none. `join` says how they meet
        the draws there. If they contradict these, or come from runs of fewer than 256 particles, none of their intervals is
        `valid`; where E[r] or KL goes back as alpha falls, those are not. `notes`, which are printed, say so.
    cost
        Seconds and model tokens of the draws.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> curve = bk.frontier(bk.Posterior(coin, longer, max_new_tokens=8), num_draws=4000, seed=0)
    >>> alpha = curve.alpha_for(kl=0.5)
    >>> curve.at(alpha).kl.round(3), bool(curve.cut < alpha)
    (array([0.5]), True)
    >>> curve.table().index.name
    'alpha'
    """

    def alpha_for(self, *, kl: float | None = None, reward: float | None = None, ess: float | None = None) -> float:
        """Return the alpha whose posterior has a given KL to the prior, or mean reward, or effective sample size.

        Give exactly one of the three; they are means over prompts. As alpha falls, KL and reward rise and ESS falls, so there
        is at most one answer. ESS is Kish's, of these very draws: what importance sampling with them reports at that alpha,
        for prior draws N exp(2 log Z(b) - log Z(2b)). From few draws it is too high where it is low. With several prompts it
        is their mean, while `cut` asks for 100 of every prompt. The answer is that of the rewards which were drawn; below
        `unseen_cut` others could change it. `alpha_interval` says how sure it is.

        Raises
        ------
        BayesKLRLError
            If no alpha has that value, or only one that the draws do not reach; the message gives the range that can be had.
        """
        given = {name: value for name, value in (("kl", kl), ("reward", reward), ("ess", ess)) if value is not None}
        if len(given) != 1:
            raise BayesKLRLError(f"alpha_for takes exactly one of kl=, reward= and ess=; got {given or 'none'}.")
        ((name, target),) = given.items()
        check_finite(name, target)
        b = self._solve(name, target)
        if b is None or not self._reaches(name, b):
            raise BayesKLRLError(self._unreachable(name, target, known=b is not None))
        if b * self.cut > 1 and self.notes and not self.curves_at(np.array([b]))[0].valid[name][0]:
            warn_caller(
                f"alpha = {1 / b:.4g} is taken from an extension that is not reliable there. {' '.join(self.notes)}"
            )
        return 1.0 / b

    def alpha_interval(
        self, *, kl: float | None = None, reward: float | None = None, ess: float | None = None
    ) -> tuple[float, float]:
        """Return a 95 % interval (low, high) for the alpha that `alpha_for` returns.

        By the delta method: the error of the quantity, divided by its slope along the path, is the error of log alpha. It can
        be relied on where `at(alpha).valid` of that quantity is true. NaN where an extension has no errors.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
        >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
        >>> curve = bk.frontier(bk.Posterior(coin, longer, max_new_tokens=8), num_draws=4000, seed=0)
        >>> low, high = curve.alpha_interval(kl=0.5)
        >>> low < curve.alpha_for(kl=0.5) < high
        True
        """
        alpha = self.alpha_for(kl=kl, reward=reward, ess=ess)
        name = next(name for name, value in (("kl", kl), ("reward", reward), ("ess", ess)) if value is not None)
        if np.isnan(se := float(self.at(alpha).se[name][0])):
            return float("nan"), float("nan")
        warmer, colder = (self._value(name, ratio / alpha) for ratio in (1 - _STEP, 1 + _STEP))
        slope = abs(colder - warmer) / (2 * _STEP)  # per unit of log alpha
        ratio = float(np.exp(NORMAL_QUANTILE * se / slope)) if slope > 0 else float("inf")
        return alpha / ratio, alpha * ratio

    def implied_alpha(self, reward: float, *, reward_se: float = 0.0) -> Implied:
        """Return the posterior on the path that has a policy's mean reward; see `implied_alpha.implied`.

        Below `cut` it is found on the extension, if there is one.
        """
        if self.extension is not None and np.isfinite(self.cut):
            check_finite("reward", reward)
            b = self._solve("reward", reward)
            if b is not None and b * self.cut > 1 and not self._is_past_extension(b):
                return self._implied_beyond(b, reward, reward_se)
        return implied(self.pool, reward, reward_se=reward_se)

    def gap(
        self, reward: float, kl: float, *, reward_se: float = 0.0, kl_se: float = 0.0, covariance: float = 0.0
    ) -> Gap:
        """Return how many nats a policy paid beyond what its reward costs; see `implied_alpha.gap`."""
        at = self.implied_alpha(reward, reward_se=reward_se)
        return gap_at(at, kl, kl_se=kl_se, covariance=covariance)

    def extended(self, points: PathPoints) -> Frontier:
        """Return the frontier continued below `cut` by points from another source, as far as these reach.

        Parameters
        ----------
        points
            log Z and E[r] of all P prompts, at alphas that begin at `cut` or above it; annealed SMC gives such points.
        """
        num_prompts = len(self.pool.reward)
        if len(points.reward) != num_prompts:
            raise BayesKLRLError(f"The points are of {len(points.reward)} prompts, the frontier of {num_prompts}.")
        if points.first * self.cut > 1:
            raise BayesKLRLError(
                f"The points begin at alpha = {1 / points.first:.4g}, below the cut at {self.cut:.4g}, and leave a hole. "
                "Begin at the cut or above it."
            )
        longer = replace(self, extension=points)
        mean, per_prompt = longer.curves_at(self.mean.inverse_alpha)
        return replace(longer, mean=mean, per_prompt=per_prompt)

    def table(self) -> pd.DataFrame:
        """Return a DataFrame with one row per alpha: each quantity, the ends of its interval, its validity, and `within`.

        Extrapolations, where `within` is false, have NaN for both ends.
        """
        return frontier_table(self)

    def __repr__(self) -> str:
        (num_prompts, num_draws), alphas = self.pool.reward.shape, self.alphas
        return (
            f"Frontier({alphas.size} alphas from {alphas[0]:.4g} to {alphas[-1]:.4g}, cut at {self.cut:.4g}: "
            f"{num_draws} draws x {num_prompts} prompts)"
        )

    def __str__(self) -> str:
        return frontier_text(self)

    def _repr_html_(self) -> str:
        return frontier_html(self)

    def plot(self, file: str | Path, policies: Mapping[str, Any] | None = None) -> Path:
        """Draw reward against KL with intervals, best-of-n and trained policies into a PNG, and return the file.

        Parameters
        ----------
        file
            The PNG to write.
        policies
            Trained policies by name: each a pair (KL to the prior, reward), or the `Draws` of any method with a density.
        """
        from bayes_klrl.analysis.frontier.picture import plot_frontier

        return plot_frontier(self, file, policies=policies)

    def _value(self, name: str, b: float) -> float:
        """Return a quantity, mean over prompts, at one b; NaN where an extension does not tell."""
        return float(getattr(self.curves_at(np.array([b]))[0], name)[0])

    def _solve(self, name: str, target: float) -> float | None:
        """Return the b > 0 at which a quantity has a value; past all that is known if it has it nowhere; None for b <= 0.

        Past an extension the curves fall back on the pool, whose extrapolation may lie below the extension's end: a search
        that saw both would not be one of an increasing function.
        """
        sign = -1.0 if name == "ess" else 1.0

        def excess(b: float) -> float:
            value = np.nan if self._is_past_extension(b) else self._value(name, b)
            return np.inf if np.isnan(value) else sign * (value - target)

        return monotone_root(excess, start=1.0 / self.alpha, low=0.0) if excess(0.0) < 0 else None

    def _is_past_extension(self, b: float) -> bool:
        """Return whether b lies beyond the last point of an extension."""
        return self.extension is not None and b * self.cut > 1 and b > self.extension.last

    def _reaches(self, name: str, b: float) -> bool:
        """Return whether a quantity at b is known and no extrapolation."""
        at = self.curves_at(np.array([b]))[0]
        return bool(at.within[0] and np.isfinite(getattr(at, name)[0]))

    def _implied_beyond(self, b: float, reward: float, reward_se: float) -> Implied:
        """Return the implied posterior at a b of the extension, where R is linear between points."""
        at = self.curves_at(np.array([b]))[0]
        step = 1e-6 * b
        slope = (self._value("reward", b) - self._value("reward", b - step)) / step
        log_evidence = float(at.log_evidence[0])
        return Implied(
            inverse_alpha=b,
            inverse_alpha_se=float(np.hypot(at.se["reward"][0], reward_se)) / slope,
            kl=b * reward - log_evidence,
            kl_se=float(np.hypot(at.se["log_evidence"][0], b * reward_se)),
            log_evidence=log_evidence,
            valid=bool(at.valid["reward"][0] and at.valid["log_evidence"][0]),
        )

    def _unreachable(self, name: str, target: float, *, known: bool) -> str:
        """Return the error of `alpha_for`: what was asked for, why it cannot be had, what can, and the cure."""
        label = {"kl": "A KL to the prior", "reward": "A mean reward", "ess": "An effective sample size"}[name]
        num = self.pool.num_draws
        nothing = (
            f"{num:,} draws say nothing (ESS below {MIN_ESS}{' for some prompt' if len(self.pool.reward) > 1 else ''})"
        )
        if np.isinf(self.cut):
            return f"{label} of {target:.6g} cannot be had: at every alpha {nothing}. Draw more (`num_draws`)."
        last = _FAR / self.alpha if self.cut == 0 else 1 / self.cut
        beyond = self.extension.last if self.extension is not None else 0.0
        if beyond > last and np.isfinite(self._value(name, beyond)):
            last = beyond
        limit, end = self._value(name, 0.0), self._value(name, last)
        why = f"it lies where {nothing}" if known else "no positive alpha that they know of has it"
        low, high = sorted((limit, end))
        means = " (means over prompts)" if len(self.pool.reward) > 1 else ""
        return (
            f"{label} of {target:.6g} cannot be had: {why}. What can be had is from {low:.6g} to {high:.6g}{means}; "
            f"{limit:.6g} itself, the prior's, is at alpha = inf. Ask for that, draw more (`num_draws`), or extend the "
            "frontier (`extend`)."
        )


def frontier(
    posterior: Posterior,
    *,
    num_draws: int | None = None,
    seed: int | None = None,
    alphas: ArrayLike | None = None,
    extend: PathPoints | Algorithm | None = None,
    draws: Draws | None = None,
    progress: bool = False,
    runner: Runner | None = None,
) -> Frontier:
    """Return the reward-KL frontier of a posterior over alpha, from draws of its prior.

    Constraints, and rewards of -inf, are untouched by alpha: the curve then starts at the constrained prior, with
    log Z = log p0(A) and KL = -log p0(A), for KL is to the prior itself.

    Parameters
    ----------
    posterior
        The prior and the reward. Its own alpha is part of the default grid, and marked in table and picture.
    num_draws
        N, the number of prior draws per prompt. The frontier is known as far as their ESS is 100 or more for every prompt: up
        to a KL of log N - 4.6 nats at best, and commonly one or two nats less.
    seed
        Seed for the draws.
    alphas
        The alphas to evaluate; they are sorted, falling. None: about 40 on a log grid from near the prior to past the cut.
    extend
        The continuation below the cut: points, or an algorithm that reports its path, such as `AnnealedSMC`, which is then
        run 8 times for the coldest alpha of the grid, with seeds made from `seed` (from 0 if `draws` were given). Take 256
        particles or more; runs of fewer are shown, but their intervals are not called reliable.
    draws
        Importance-sampling draws to use instead of new ones, from the prior or from a proposal such as a tuned policy
        (leave out `num_draws` and `seed`).
    progress
        Show a progress bar.
    runner
        Where the prior is drawn from: None, here; or a `ProcessRunner` or `RayRunner`, over whose workers the prompts are
        spread. The curves are the same to the bit.

    Raises
    ------
    BayesKLRLError
        If an argument cannot be right, or the likelihood has constraints only and so no alpha.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> curve = bk.frontier(bk.Posterior(coin, longer, max_new_tokens=8), num_draws=4000, seed=0)
    >>> bool(0.3 < curve.alpha_for(kl=0.5) < 3), curve.alphas.shape == curve.kl.shape
    (True, True)
    """
    check_posterior_given(posterior)
    if not (extend is None or isinstance(extend, PathPoints | Algorithm)):
        raise BayesKLRLError(f"extend must be PathPoints or an algorithm such as bk.AnnealedSMC(256); got {extend!r}.")
    if posterior.likelihood.alpha is None:
        raise BayesKLRLError(
            "A likelihood of constraints alone has no alpha: its frontier is the one point KL = -log p0(A) = -log Z. Multiply "
            "it by a bk.Reward, or estimate log Z by bk.ImportanceSampling."
        )
    if posterior.likelihood.depends_on_alpha:
        raise BayesKLRLError(
            f"The reward {posterior.likelihood.name or 'of this posterior'!r} itself changes with alpha, through every "
            "log Z_theta, so that no frontier is of one reward. Take bk.frontier of the plug-in or conservative target, or "
            "make a posterior at each alpha and ask its draws."
        )
    runner = chosen_runner(runner)
    if alphas is not None:
        checked_alphas(alphas, np.zeros(0))  # before anything is drawn
    used = drawn_or_given(posterior, draws, num_draws, seed, progress, runner)
    pool = pool_of(used, posterior.likelihood.bounds)
    grid = None if alphas is None else np.unique(checked_alphas(alphas, pool.reward))[::-1]
    cut = pool_cut(pool, posterior.alpha)
    inverse = default_grid(pool, posterior.alpha, cut) if grid is None else 1.0 / grid
    mean, per_prompt = curves(pool, inverse)
    unseen, best = unseen_cut(pool, posterior.alpha), best_of_n_curve(pool)
    result = Frontier(mean, per_prompt, cut, posterior.alpha, best, pool, unseen, cost=used.cost)
    if extend is None or isinstance(extend, PathPoints):
        return result if extend is None else result.extended(extend)
    coldest = float(result.alphas[-1])
    return result.extended(annealed_points(posterior, extend, coldest, seed=seed or 0, progress=progress))
