"""Best-of-n as a posterior: the likelihood whose posterior is the law of the best of n prior draws (theory.md 1.14)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.likelihood import check_alpha_and_bounds
from bayes_klrl.likelihoods.prior_ranks import RankedFactor, check_reference
from bayes_klrl.typing import FloatArray

__all__ = ["BestOf"]


@dataclass(frozen=True, eq=False, repr=False)
class BestOf(RankedFactor):
    """The factor F(s(x))^(n - 1), F the distribution function of a score s under the prior given the prompt.

        r(x, c) = (n - 1) log F(s(x)),    with ties the mean over the cell:    exp r = (F(s)^n - F(s-)^n) / (n (F(s) - F(s-)))

    At alpha = 1 the posterior is the law of the best of n prior draws, with ties broken at random, and the evidence is 1 / n.
    So every algorithm draws from best-of-n, and `certify` says how far a policy is from it, which was trained to imitate it.

    Exact are: posterior and evidence under the exact F, ties included; the posterior of the F that is used, whatever the
    algorithm; and for every M the mean over reference draws of that posterior's evidence, 1 / n. F from M reference draws
    carries an error of order sqrt(n / M): log Z of the posterior that is sampled differs from -log n by a random number with
    standard deviation `log_evidence_se`, so that M should be many times n.

    A score that a network computes is rounded differently in each batch. So scores that differ by no more than rounding are
    ties, and a completion that F was made of is not scored again. What counts as rounding is measured for each prompt: a few
    completions are scored twice. For functions that give the same number twice it is 0.

    Parameters
    ----------
    n
        Number of prior draws of which the best is taken.
    fn
        The score: a function with the signature of `Reward`'s, or a `Reward`, a `TokenReward` or another factor, whose alpha
        is then of no importance. A score of -inf ranks below all others and is not excluded.
    alpha
        Units of reward per nat. Tempering and `Posterior.at_alpha` change it; 1 is best-of-n.
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
    Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy"; Gui, Garbacea and Veitch 2024, "BoNBoN
    alignment".

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, bk.BestOf(4, longer, num_reference=None), max_new_tokens=3)
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> np.exp(exact.log_evidence).round(12)  # 1 / 4
    array([0.25])
    >>> np.exp(posterior.log_joint([[1], [0, 1], [0, 0, 1], [0, 0, 0]])[0] + np.log(4)).round(4)
    array([0.0625, 0.2539, 0.3418, 0.3418])
    """

    n: int
    fn: Any
    alpha: float = field(default=1.0, kw_only=True)
    bounds: tuple[float, float] = field(default=(-np.inf, 0.0), init=False)

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_reference(self)
        check_alpha_and_bounds(self)

    def __repr__(self) -> str:
        return f"BestOf({self.n}, {self.label!r}, alpha={self.alpha:.4g}, num_reference={self.num_reference})"

    @property
    def log_evidence(self) -> float:
        """The log evidence under the exact F at alpha = 1 and with no other factor, -log n."""
        return float(-np.log(self.n))

    @property
    def log_evidence_se(self) -> float:
        """The standard deviation of log Z at alpha = 1 over reference draws, to first order in 1 / M; 0 if F is exact."""
        if self.num_reference is None:
            return 0.0
        return float((self.n - 1) / np.sqrt((2 * self.n - 1) * self.num_reference))

    def of_cells(self, lower: FloatArray, mass: FloatArray) -> FloatArray:
        """See `RankedFactor.of_cells`: the log of the mean of u^(n - 1) over each cell."""
        upper = np.minimum(lower + mass, 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(upper > 0, np.minimum(mass / upper, 1.0), 0.0)
            # (1 - (1 - share)^n) / (n share), 1 for a cell without mass
            mean = np.where(share > 0, -np.expm1(self.n * np.log1p(-share)) / (self.n * share), 1.0)
            power = (self.n - 1) * np.log(upper) if self.n > 1 else np.zeros(len(upper))
        return np.minimum(power + np.log(mean), 0.0)
