"""Reward and KL of best-of-n for every n, estimated from one pool of draws: the rival beside the frontier.

With F the prior's cdf of the reward, estimated from the draws, and r_(1) <= r_(2) <= ... in order,

    E[max of n] = sum_i r_(i) [F(r_(i))^n - F(r_(i-1))^n].

Ties are broken at random, so that the KL to the prior is that between reward levels (Beirami et al. 2024),

    KL = sum_levels q log(q / p),   p = F(level) - F^-(level),   q = F(level)^n - F^-(level)^n,

which is log n - (n - 1) / n for a reward without ties, and less with them (theory.md 6.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.analysis.frontier.path import RewardPool
from bayes_klrl.checks import check_count
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import normalised

__all__ = ["BestOfNCurve", "best_of_n_curve"]

_DRAWS_PER_CANDIDATE = 50  # N / n below which the estimate would rest on a handful of top draws


@dataclass(frozen=True, eq=False)
class BestOfNCurve:
    """Best-of-n at B values of n, means over prompts.

    Parameters
    ----------
    n
        The number of candidates, shape (B,).
    reward, reward_se
        E[max of n] and its standard error, shape (B,); -inf if some draw is impossible, since all n may be.
    kl
        KL to the prior in nats, shape (B,).
    """

    n: IntArray
    reward: FloatArray
    reward_se: FloatArray
    kl: FloatArray


def best_of_n_curve(pool: RewardPool, ns: Sequence[int] | None = None) -> BestOfNCurve:
    """Return reward and KL of best-of-n.

    Parameters
    ----------
    pool
        The draws and their rewards.
    ns
        Values of n. None: 1, 2, 4, ... up to a fiftieth of the number of draws.

    Examples
    --------
    >>> coin = RewardPool(np.zeros(1000), np.repeat([0.0, 1.0], 500))
    >>> curve = best_of_n_curve(coin, [1, 2])
    >>> curve.reward, curve.kl.round(4)    # 1 - 1/2^n, and KL((1/4, 3/4) || (1/2, 1/2))
    (array([0.5 , 0.75]), array([0.    , 0.1308]))
    """
    if ns is None:
        ns = [2**k for k in range(int(np.log2(max(pool.num_draws / _DRAWS_PER_CANDIDATE, 1))) + 1)]
    for n in ns:
        check_count("n", n)
    points = np.array(
        [[_one_prompt(log_w, r, n) for n in ns] for log_w, r in zip(pool.log_weights, pool.reward, strict=True)]
    )  # (P, B, 3)
    reward, se, kl = np.moveaxis(points, 2, 0)
    pooled_se = np.sqrt(np.square(se).sum(axis=0)) / len(se)
    return BestOfNCurve(np.array(ns, dtype=np.int64), reward.mean(axis=0), pooled_se, kl.mean(axis=0))


def _one_prompt(log_weights: FloatArray, reward: FloatArray, n: int) -> tuple[float, float, float]:
    """Return E[max of n], its standard error and the KL to the prior for one prompt, (N,)."""
    order = np.argsort(reward, kind="stable")
    r, weights = reward[order], normalised(log_weights)[order]
    last = np.append(r[1:] != r[:-1], True)  # of its level
    up_to = np.minimum(weights.cumsum(), 1.0)
    up_to[-1] = 1.0
    levels = np.diff(up_to[last], prepend=0.0)
    best = np.diff(up_to[last] ** n, prepend=0.0)
    seen = best > 0
    kl = float((best[seen] * np.log(best[seen] / levels[seen])).sum())
    if np.isneginf(r[0]):
        return -np.inf, np.nan, kl
    # Adding mass at x moves E[max of n] by n E[max(x, max of n - 1)], less its mean.
    rival = np.diff(up_to ** (n - 1), prepend=0.0 if n > 1 else 1.0)
    beaten_by = np.append((r * rival)[::-1].cumsum()[::-1][1:], 0.0)
    response = n * (r * up_to ** (n - 1) + beaten_by)
    influence = len(r) * weights * (response - weights @ response)
    se = float(np.sqrt(np.square(influence).sum() / (len(r) * (len(r) - 1))))
    return float(best @ r[last]), se, kl
