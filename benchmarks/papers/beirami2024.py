"""Beirami et al. (2024): log n - (n - 1) / n bounds the KL of best-of-n, and is not its value.

The prior is the GOLD bigram of theory.md 8.2 with T = 6, 1,093 completions. Three rewards of it: one without any ties,
the number of tokens 2 (seven levels), and whether 0 and right after it 1 occurs (two levels). Everything is exact
(theory.md 6.5). The paper's estimator takes eps, the prior probability of the completion that was selected, for an
atom at the top of a continuum:

    KL-hat = (1 - eps)^n (log n + (n - 1) log(1 - eps) - (n - 1) / n) + (1 - (1 - eps)^n) log((1 - (1 - eps)^n) / eps)
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.inference.sampling.order_statistics import (
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_win_rate,
)
from bayes_klrl.problems import gold_posterior
from bayes_klrl.randomness import generator
from bayes_klrl.typing import FloatArray
from benchmarks.papers.record import Claim, Paper, Table
from benchmarks.papers.truth import EnumeratedTruth, best_of_n_law

__all__ = ["STIENNON", "atom_estimate", "rewards", "study"]

_COLUMNS = ("exact KL", "formula", "exact / formula", "estimator", "estimator, level", "win rate", "n/(n+1)")
STIENNON = {128: 3.9, 256: 4.5, 512: 5.2}
"""KL of best-of-n in Table 10 of Stiennon et al. (2020), which is the formula."""


def study(*, num_seeds: int = 5, tiny: bool = False) -> Paper:  # noqa: ARG001  (as all studies have it)
    """Return the study; nothing in it is random."""
    truth = EnumeratedTruth.of(gold_posterior(max_new_tokens=4 if tiny else 6))
    ns = (2, 8) if tiny else (2, 4, 16, 64, 256, 1024)
    cases = [(name, n, _numbers(reward, n, truth.log_prior)) for name, reward in rewards(truth).items() for n in ns]
    table = Table(
        "KL(best-of-n || p0) in nats, exact; the estimator is averaged over the law of best-of-n, with eps the prior "
        "probability of the selected completion, and of its whole level",
        ("reward", "n", *_COLUMNS),
        tuple((name, n, *(round(value, 4) for value in numbers)) for name, n, numbers in cases),
    )
    formula = Table(
        "The formula against Table 10 of Stiennon et al. (2020)",
        ("n", "published", "log n - (n-1)/n"),
        tuple((n, value, round(best_of_n_kl_bound(n), 3)) for n, value in STIENNON.items()),
    )
    return Paper(
        "beirami2024",
        "Beirami et al. 2024, Theoretical guarantees on the best-of-n alignment policy",
        f"GOLD bigram prior, T = {truth.posterior.max_new_tokens}, {truth.reward.size:,} completions, exact order statistics.",
        _claims([name for name, _, _ in cases], np.array([numbers for _, _, numbers in cases])),
        (table, formula),
        1,
    )


def rewards(truth: EnumeratedTruth, seed: int = 0) -> dict[str, FloatArray]:
    """Return r(x) of every completion, shape (M,), for three rewards: without ties, of a few levels, of two levels."""
    tokens, inside = truth.sequences.tokens[0], truth.sequences.mask[0]
    pattern = ((tokens[:, :-1] == 0) & (tokens[:, 1:] == 1) & inside[:, 1:]).any(axis=1)
    twos = ((tokens == 2) & inside).sum(axis=1)
    return {
        "no ties": generator(seed).standard_normal(len(tokens)),
        "number of 2s": twos.astype(np.float64),
        "0 then 1: yes or no": pattern.astype(np.float64),
    }


def atom_estimate(eps: FloatArray, n: int) -> FloatArray:
    """Return the estimate of KL(best-of-n || p0) from the probability eps of the selected completion, in nats.

    Examples
    --------
    >>> float(atom_estimate(np.array([1e-12]), 8)[0].round(4)), round(best_of_n_kl_bound(8), 4)
    (1.2044, 1.2044)
    """
    log_rest = np.log1p(-np.minimum(eps, 1 - 1e-15))
    top = -np.expm1(n * log_rest)
    continuum = np.exp(n * log_rest) * (np.log(n) + (n - 1) * log_rest - (n - 1) / n)
    estimate: FloatArray = continuum + top * (np.log(top) - np.log(eps))
    return estimate


def _numbers(reward: FloatArray, n: int, log_prior: FloatArray) -> tuple[float, ...]:
    """Return the numbers of one row of the table, in the order of `_COLUMNS`."""
    exact, bound = float(best_of_n_kl(reward, n, log_prior)), best_of_n_kl_bound(n)
    law, prior = np.exp(best_of_n_law(reward, n, log_prior)), np.exp(log_prior)
    _, level = np.unique(reward, return_inverse=True)
    of_completion = float(law @ atom_estimate(prior, n))
    of_level = float(law @ atom_estimate(np.bincount(level, weights=prior)[level], n))
    win = float(best_of_n_win_rate(reward, n, log_prior))
    return (exact, bound, exact / bound, of_completion, of_level, win, n / (n + 1))


def _claims(names: list[str], numbers: FloatArray) -> tuple[Claim, ...]:
    """Return the verdicts on the bound, the win rate and the estimator; `numbers` has shape (cases, columns)."""
    exact, bound, _, estimate, of_level, win, limit = numbers.T
    untied = np.array([name == "no ties" for name in names])
    holds = bool((exact <= bound + 1e-12).all() and (exact < 0.99 * bound).any())
    nearer = np.abs(estimate - exact) <= np.abs(bound - exact)
    worst = float(np.abs(estimate[untied] / exact[untied] - 1).max())
    return (
        Claim(
            "log n - (n-1)/n is an upper bound on the KL and not its value",
            "reproduced" if holds else "not reproduced",
            f"exact / formula lies between {(exact / bound).min():.2f} and {(exact / bound).max():.4f} in {len(names)} cases",
        ),
        Claim(
            "the win rate against the prior is at most n/(n+1)",
            "reproduced" if (win <= limit + 1e-12).all() else "not reproduced",
            f"win rate / limit lies between {(win / limit).min():.3f} and {(win / limit).max():.4f}",
        ),
        Claim(
            "an estimator from the probability of the selected completion is nearer than the formula (rewards without ties)",
            "reproduced" if nearer[untied].all() else "not reproduced",
            f"within {worst:.2%} of the exact KL. With ties it is up to {(estimate / exact)[~untied].max():.1f} times the "
            "exact KL, since the mass of a level is not that of one completion of it; with the level's mass it is within "
            f"{np.abs(of_level / exact - 1)[~untied].max():.0%}",
        ),
    )
