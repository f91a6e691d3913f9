"""The path of posteriors from the prior to the greedy policy, estimated from one pool of draws.

With b = 1 / alpha, p*_b(x) = p0(x) exp(b r(x)) / Z(b) and draws x_n ~ q of weight u_n = p0(x_n) / q(x_n) (1 for the prior's):

    log Z(b) = log mean u exp(b r)    R(b) = E_p*_b[r] = d log Z / db    K(b) = KL(p*_b || p0) = b R(b) - log Z(b)

and the draws are worth ESS(b) = N Z(b)^2 / Z(2b) of p*_b for the prior's (theory.md 1.6). Standard errors come from influence
functions (theory.md 7.3): with w_n = u_n exp(b r_n) / Z(b), so that mean w = 1, they are

    log Z: w - 1    R: w (r - R)    K: b w (r - R) - (w - 1)    ESS: ESS [2 (w - 1) - (w^2 / mean w^2 - 1)]

and se^2 = sum f^2 / (N (N - 1)). A reward of -inf belongs to the base measure, as a `Constraint` does: whatever b is, such
a completion has weight 0, so that b -> 0 is the constrained prior, log Z(0) = log p0(A), and b < 0 is legal. KL is always to
the unconstrained p0.

N draws know K up to a point: the plug-in is log N - H(W), at most log N whatever the truth, so K needs a cap
(theory.md 7.5). Kish's ESS is at most exp(H(W)), so ESS >= 100 alone keeps K below log N - log 100 = log N - 4.6.

Draws say nothing of rewards that none of them has. A mass of 3 / N stays unseen with probability exp(-3) = 5 %; were it all at
an edge h of the declared bounds, it would add p (e - 1), with p = 3 / N and e = exp(b h) / Z(b), to Z in units of Z. Where
that moves an estimate by more than half of its interval, the interval is not valid. Without declared bounds nobody can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.analysis.frontier.curves import NORMAL_QUANTILE, QUANTITIES, Curves
from bayes_klrl.errors import BayesKLRLError, SupportError
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import check_log_weights, logmeanexp

__all__ = ["MIN_ESS", "MIN_INFLUENTIAL", "UNSEEN_DRAWS", "RewardPool", "curves", "moments"]

MIN_ESS = 100  # below it intervals cover too rarely (theory.md 7.1)
MIN_INFLUENTIAL = 50  # draws that an error estimate must rest on (theory.md 7.4)
UNSEEN_DRAWS = 3.0  # expected draws that all fail to come with probability exp(-3) = 5 %
_MOST_NATS = 300.0  # of a weight over Z: more is as hopeless, and its square would overflow
_MAX_BIAS = 0.25  # of a standard error; more costs an interval over a hundredth of its 95


@dataclass(frozen=True, eq=False)
class RewardPool:
    """N independent draws for each of P prompts: their weights under the prior, and their rewards.

    Parameters
    ----------
    log_weights
        log p0(x) - log q(x) of draws from q, shape (P, N) or (N,); zeros for the prior's own draws.
    reward
        r(x), same shape; -inf for what is impossible.
    bounds
        The range (low, high) that the reward is declared to have; None: not known.

    Raises
    ------
    BayesKLRLError
        If there are fewer than two draws, the shapes differ, or NaN or +inf occurs; `SupportError` if all draws of a prompt
        are impossible.
    """

    log_weights: FloatArray
    reward: FloatArray
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        log_weights, reward = np.atleast_2d(check_log_weights(self.log_weights)), np.atleast_2d(self.reward)
        if log_weights.shape != reward.shape or reward.ndim != 2 or reward.shape[1] < 2:
            raise BayesKLRLError(
                "A pool needs log-weights and rewards of one shape (P, N) with at least N = 2 draws; got "
                f"{log_weights.shape} and {reward.shape}."
            )
        reward = reward.astype(np.float64)
        if np.isnan(reward).any() or np.isposinf(reward).any():
            raise BayesKLRLError("Rewards must be finite or -inf; the pool has NaN or +inf among them.")
        object.__setattr__(self, "log_weights", log_weights)
        object.__setattr__(self, "reward", reward)
        if not self.possible.any(axis=1).all():
            p = int((~self.possible.any(axis=1)).argmax())
            raise SupportError(
                f"None of the {reward.shape[1]:,} draws of prompt {p} is possible (finite reward, positive prior): nothing "
                "can be said of its posteriors. Draw more, or relax the constraint."
            )

    @property
    def num_draws(self) -> int:
        """N."""
        return int(self.reward.shape[1])

    @cached_property
    def possible(self) -> np.ndarray:
        """Which draws have a posterior weight at all, shape (P, N)."""
        return np.isfinite(self.reward) & np.isfinite(self.log_weights)

    @cached_property
    def log_base(self) -> FloatArray:
        """The log-weights of the base measure, -inf for the impossible, shape (P, N)."""
        return np.where(self.possible, self.log_weights, -np.inf)

    @cached_property
    def extremes(self) -> tuple[FloatArray, FloatArray]:
        """The lowest and the highest possible reward that was drawn for each prompt, (P, 1) each."""
        low = np.where(self.possible, self.reward, np.inf).min(axis=1, keepdims=True)
        high = np.where(self.possible, self.reward, -np.inf).max(axis=1, keepdims=True)
        return low, high

    def centred(self, b: float) -> tuple[FloatArray, FloatArray]:
        """Return the reward that wins as b goes on, (P, 1), and all rewards less it, (P, N), 0 for the impossible.

        Taken off, it leaves b r - log Z its digits even where b is so large that only the best draws count.
        """
        low, high = self.extremes
        centre = high if b >= 0 else low
        return centre, np.where(self.possible, self.reward, centre) - centre

    def headroom(self, b: float) -> FloatArray:
        """Return how far the declared bounds go beyond the reward that wins as b goes on, (P,).

        0: no draw could be better; below 0 for b < 0, where the lowest reward wins; NaN: no bound is declared.
        """
        low, high = self.extremes
        drawn = (high if b >= 0 else low)[:, 0]
        edge = np.nan if self.bounds is None else self.bounds[1 if b >= 0 else 0]
        if not np.isfinite(edge):
            return np.full(drawn.shape, np.nan)
        result: FloatArray = np.where(np.isclose(drawn, edge, rtol=1e-6, atol=1e-9), 0.0, edge - drawn)
        return result

    def reward_range(self) -> tuple[float, float]:
        """Return the lowest and the highest R(b) of the mean over prompts, its limits as b -> -inf and inf."""
        low, high = self.extremes
        return float(low.mean()), float(high.mean())


@dataclass(frozen=True, eq=False)
class _Sums:
    """The sums over one pool at one b, shape (P,), or at A of them, (P, A), by name.

    `squares` and `fourths` are sums over draws of the influence functions' powers, `unseen` is how far what no draw has shown
    could move the values.
    """

    value: Mapping[str, FloatArray]
    bias: Mapping[str, FloatArray]
    squares: Mapping[str, FloatArray]
    fourths: Mapping[str, FloatArray]
    unseen: Mapping[str, FloatArray]
    worst_ess: FloatArray

    @classmethod
    def stacked(cls, parts: Sequence[_Sums]) -> _Sums:
        """Return those of A inverse temperatures, one after the other on a new last axis."""

        def stack(kind: str) -> dict[str, FloatArray]:
            return {name: np.stack([getattr(part, kind)[name] for part in parts], axis=-1) for name in QUANTITIES}

        return cls(
            **{kind: stack(kind) for kind in ("value", "bias", "squares", "fourths", "unseen")},
            worst_ess=np.stack([part.worst_ess for part in parts], axis=-1),
        )

    def pooled(self) -> _Sums:
        """Return those of the mean over prompts, shape (A,): estimates and biases average, influence functions add up.

        All prompts together leave 3 / N unseen: that is counted where it weighs most.
        """
        num_prompts = len(self.worst_ess)
        return _Sums(
            value={name: array.mean(axis=0) for name, array in self.value.items()},
            bias={name: array.mean(axis=0) for name, array in self.bias.items()},
            squares={name: array.sum(axis=0) / num_prompts**2 for name, array in self.squares.items()},
            fourths={name: array.sum(axis=0) / num_prompts**4 for name, array in self.fourths.items()},
            unseen={name: array.max(axis=0) / num_prompts for name, array in self.unseen.items()},
            worst_ess=self.worst_ess.min(axis=0),
        )


def curves(pool: RewardPool, inverse_alphas: ArrayLike) -> tuple[Curves, Curves]:
    """Return the curves of the mean over prompts, arrays (A,), and those of each prompt, (P, A).

    Prompts are a fixed set: the error of the mean is that of the draws, not of having other prompts.

    Parameters
    ----------
    pool
        The draws and their rewards.
    inverse_alphas
        b = 1 / alpha, shape (A,); 0 is the (constrained) prior, negative values are legal.

    Examples
    --------
    >>> rewards = np.random.default_rng(0).standard_normal(10_000)
    >>> mean, _ = curves(RewardPool(np.zeros(10_000), rewards), [0.5])    # Gaussian: K = b^2 / 2
    >>> bool(mean.lower["kl"][0] < 0.125 < mean.upper["kl"][0]), bool(mean.valid["kl"][0])
    (True, True)
    """
    inverse_alpha = np.asarray(inverse_alphas, dtype=np.float64)
    sums = _Sums.stacked([_sums_at(pool, float(b)) for b in inverse_alpha])
    return _judged(inverse_alpha, sums.pooled(), pool.num_draws), _judged(inverse_alpha, sums, pool.num_draws)


def moments(pool: RewardPool, b: float) -> tuple[float, float, float]:
    """Return R(b), K(b) and Var_p*_b[r] = dR/db, means over prompts: what searches along the path need, and no more."""
    centre, reward = pool.centred(b)
    log_w = pool.log_base + b * reward
    log_z = logmeanexp(log_w)
    w = np.exp(log_w - log_z[:, None])
    r = (w * reward).mean(axis=1)
    variance = (w * np.square(reward - r[:, None])).mean(axis=1)
    return float((centre[:, 0] + r).mean()), float((b * r - log_z).mean()), float(variance.mean())


def _sums_at(pool: RewardPool, b: float) -> _Sums:
    """Return the sums at one inverse temperature, by the formulas at the top of this file."""
    num = pool.num_draws
    centre, reward = pool.centred(b)
    log_w = pool.log_base + b * reward
    log_z = logmeanexp(log_w)
    w = np.exp(log_w - log_z[:, None])
    square = np.square(w)
    mean_square = square.mean(axis=1, keepdims=True)
    r = (w * reward).mean(axis=1)
    ess = num / mean_square[:, 0]
    f_evidence, f_second = w - 1.0, square / mean_square - 1.0  # of log Z(b), and of log mean w^2
    f_reward = w * (reward - r[:, None])
    influence = {
        "log_evidence": f_evidence,
        "reward": f_reward,
        "kl": b * f_reward - f_evidence,
        "ess": ess[:, None] * (2 * f_evidence - f_second),
    }
    bias_evidence = -np.square(f_evidence).mean(axis=1) / (2 * num)
    bias_reward = -(w * f_reward).mean(axis=1) / num
    bias_second = -np.square(f_second).mean(axis=1) / (2 * num)
    return _Sums(
        value={
            "log_evidence": b * centre[:, 0] + log_z,
            "reward": centre[:, 0] + r,
            "kl": b * r - log_z,
            "ess": ess,
        },
        bias={
            "log_evidence": bias_evidence,
            "reward": bias_reward,
            "kl": b * bias_reward - bias_evidence,
            "ess": ess * (2 * bias_evidence - bias_second),
        },
        squares={name: np.square(f).sum(axis=1) for name, f in influence.items()},
        fourths={name: np.square(np.square(f)).sum(axis=1) for name, f in influence.items()},
        unseen=_unseen(pool, b, log_z, r, ess),
        worst_ess=ess,
    )


def _unseen(pool: RewardPool, b: float, log_z: FloatArray, r: FloatArray, ess: FloatArray) -> dict[str, FloatArray]:
    """Return how far a mass of 3 / N at the edge of the declared bounds would move each estimate, (P,); NaN without bounds.

    With p = 3 / N, the rest of the prior having 1 - p, and e the edge's weight over Z: Z' = Z (1 + p (e - 1)), R' is the mean
    of the mixture, K' = b R' - log Z', and mean w^2 changes as Z does, with e^2 in the place of e.

    Parameters
    ----------
    pool, b
        The draws and 1 / alpha.
    log_z, r, ess
        log Z and R of the rewards less the best one, and the ESS, (P,) each.
    """
    headroom = pool.headroom(b)
    mass = min(UNSEEN_DRAWS / pool.num_draws, 1.0)
    weight = np.exp(np.minimum(b * headroom - log_z, _MOST_NATS))
    grown = 1.0 + mass * (weight - 1.0)
    to_reward = mass * weight * (headroom - r) / grown
    square = (1.0 - mass) + mass * np.square(weight) * ess / pool.num_draws
    moved = {
        "log_evidence": np.log(grown),
        "reward": to_reward,
        "kl": b * to_reward - np.log(grown),
        "ess": ess * (np.square(grown) / square - 1.0),
    }
    return {name: np.where(headroom == 0, 0.0, np.abs(change)) for name, change in moved.items()}


def _judged(inverse_alpha: FloatArray, sums: _Sums, num_draws: int) -> Curves:
    """Return the estimates with their standard errors and where these can be relied on."""
    se = {name: np.sqrt(array / (num_draws * (num_draws - 1))) for name, array in sums.squares.items()}
    within = sums.worst_ess >= MIN_ESS
    valid, exposed = {}, {}
    for name in QUANTITIES:
        # No spread at all rests on no draw: a pool cannot tell a constant reward from one that it has not seen vary.
        influential = np.square(sums.squares[name]) >= MIN_INFLUENTIAL * sums.fourths[name]
        spread, unbiased = se[name] > 0, np.abs(sums.bias[name]) <= _MAX_BIAS * se[name]
        exposed[name] = sums.unseen[name] > NORMAL_QUANTILE * se[name]  # never of NaN
        valid[name] = within & influential & spread & unbiased & ~exposed[name]
    v = sums.value
    return Curves(
        inverse_alpha,
        v["log_evidence"],
        v["reward"],
        v["kl"],
        v["ess"],
        se=se,
        within=within,
        valid=valid,
        exposed=exposed,
    )
