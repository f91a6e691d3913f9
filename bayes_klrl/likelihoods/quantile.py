"""The prior's quantile of a score as a reward: its evidence is known at any scale (theory.md 1.14).

Under the prior, F(s(x)) of a continuous score is uniform on [0, 1], whatever the model, the score and the prompt. So the law
of the reward, the evidence and the frontier are those of one exponential distribution on [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayes_klrl.likelihood import check_alpha_and_bounds
from bayes_klrl.likelihoods.prior_ranks import RankedFactor, check_reference
from bayes_klrl.typing import FloatArray

__all__ = ["QuantileReward"]


@dataclass(frozen=True, eq=False, repr=False)
class QuantileReward(RankedFactor):
    """The factor exp(F(s(x)) / alpha), F the distribution function of a score s under the prior given the prompt.

        r(x, c) = (F(s(x)-) + F(s(x))) / 2, the mid-rank,    log Z = log(alpha (e^(1 / alpha) - 1)) if s is continuous

    The reward is in [0, 1], alpha means the same for every score and prompt, and no monotone change of the score changes it.

    Exact are: the formula of log Z for a continuous score and the exact F; the posterior of the F that is used, whatever the
    algorithm. F from M reference draws carries an error of order 1 / sqrt(M): log Z of the posterior that is sampled differs
    from `log_evidence` by a random number with standard deviation `log_evidence_se`, which is different for each prompt and
    the same in all runs with one seed. With ties log Z is lower than the formula, because mid-ranks are less spread out. As in
    `BestOf`, scores that differ by no more than the rounding of a network are ties.

    Parameters
    ----------
    fn
        The score: a function with the signature of `Reward`'s, or a `Reward`, a `TokenReward` or another factor, whose alpha
        is then of no importance. A score of -inf ranks below all others and is not excluded.
    alpha
        Units of reward per nat; positive and finite.
    num_reference
        M, the prior draws per prompt that F is estimated from, when the prompt's first completion is scored; `Draws.cost` does
        not count them. None: F is exact, by enumeration of at most 20,000 completions.
    seed
        The seed of the reference draws. They are independent of an algorithm's draws with the same seed.
    name
        Name in tables and error messages; None: one with that of the score.
    ranks
        The distribution functions of the prompts. `Posterior` sets them.

    Raises
    ------
    BayesKLRLError
        If an argument is wrong, or there are too many completions to enumerate.

    References
    ----------
    Matrenok, Moalla and Gulcehre 2025, "Quantile reward policy optimization".

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> value = bk.TokenReward(lambda tokens, lengths: tokens @ 2.0 ** np.arange(10), alpha=1.0)  # 1024 values, no ties
    >>> quantile = bk.QuantileReward(value, alpha=0.2, num_reference=None)
    >>> exact = bk.Exact().run(bk.Posterior(coin, quantile, max_new_tokens=10), seed=0)
    >>> float(exact.log_evidence[0].round(4)), round(quantile.log_evidence, 4)
    (3.3838, 3.3838)
    """

    fn: Any
    bounds: tuple[float, float] = field(default=(0.0, 1.0), init=False)

    def __post_init__(self) -> None:
        check_reference(self)
        check_alpha_and_bounds(self)

    def __repr__(self) -> str:
        return f"QuantileReward({self.label!r}, alpha={self.alpha:.4g}, num_reference={self.num_reference})"

    @property
    def log_evidence(self) -> float:
        """The log evidence of a continuous score under the exact F and no other factor, log(alpha (e^(1 / alpha) - 1))."""
        return _log_mean_exp_uniform(1 / self.alpha)

    @property
    def log_evidence_se(self) -> float:
        """The standard deviation of log Z over reference draws, to first order in 1 / M; 0 if F is exact."""
        if self.num_reference is None:
            return 0.0
        relative = np.exp(_log_mean_exp_uniform(2 / self.alpha) - 2 * self.log_evidence) - 1
        return float(np.sqrt(relative / self.num_reference))

    def of_cells(self, lower: FloatArray, mass: FloatArray) -> FloatArray:
        """See `RankedFactor.of_cells`: the middle of each cell."""
        return np.clip(lower + mass / 2, 0.0, 1.0)


def _log_mean_exp_uniform(b: float) -> float:
    """Return log E[exp(b U)] of a uniform U, log((e^b - 1) / b), b > 0."""
    return float(b + np.log(-np.expm1(-b)) - np.log(b))
