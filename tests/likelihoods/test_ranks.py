"""Quantile rewards and best-of-n as posteriors: exact with the exact F, and within its error with an estimated one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

import bayes_klrl as bk
from bayes_klrl.inference.sampling.order_statistics import best_of_n_log_probs
from bayes_klrl.likelihoods.prior_ranks import Cells
from bayes_klrl.weights import logsumexp
from tests.helpers.tiny_models import tiny_gpt2
from tests.helpers.truth import Truth, z_score
from tests.helpers.user_models import TextLM
from tests.likelihoods.common import PRIOR, length_score, posterior_of, score

DISTINCT = bk.TokenReward(score, alpha=3.0)
TIED = bk.TokenReward(length_score, alpha=3.0)
BITS = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
NUMBER = bk.TokenReward(lambda tokens, lengths: tokens @ 2.0 ** np.arange(tokens.shape[1]), alpha=1.0)
"""1024 scores of equal mass for 10 tokens: as good as continuous."""


def mid_ranks(values: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """F by its definition, ties counted half, (N,)."""
    return np.array([mass[values < v].sum() + mass[values == v].sum() / 2 for v in values])


# ---- the exact F


@pytest.mark.parametrize("n", [1, 2, 5, 64])
@pytest.mark.parametrize("fn", [DISTINCT, TIED])
def test_best_of_is_best_of_n(n: int, fn: Any) -> None:
    exact = bk.Exact().run(posterior_of(bk.BestOf(n, fn, num_reference=None)), seed=0)
    law = best_of_n_log_probs(bk.Exact().run(posterior_of(fn), seed=0), n)
    np.testing.assert_allclose(exact.log_evidence, -np.log(n), atol=1e-10)
    log_posterior = exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
    np.testing.assert_allclose(np.exp(log_posterior), np.exp(law), atol=1e-10)


@pytest.mark.parametrize("fn", [DISTINCT, TIED])
@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_quantiles_are_mid_ranks(fn: Any, alpha: float) -> None:
    truth = Truth(posterior_of(bk.QuantileReward(fn, alpha=alpha, num_reference=None)))
    scores = posterior_of(fn).reward(truth.sequences)
    for p in range(2):
        mass = np.exp(truth.log_prior[p])
        np.testing.assert_allclose(truth.reward[p], mid_ranks(scores[p], mass), atol=1e-12)
        assert np.isclose(mass @ truth.reward[p], 0.5)  # mid-ranks keep the mean, with ties too


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 30.0])
def test_the_evidence_of_a_quantile_is_known_at_any_scale(alpha: float) -> None:
    quantile = bk.QuantileReward(NUMBER, alpha=alpha, num_reference=None)
    assert np.isclose(quantile.log_evidence, np.log(quad(lambda u: np.exp(u / alpha), 0, 1)[0]), atol=1e-9)
    assert quantile.log_evidence_se == 0
    scaled = bk.TokenReward(lambda tokens, lengths: 1e30 * NUMBER.fn(tokens, lengths) - 7, alpha=1.0)
    for each in (quantile, bk.QuantileReward(scaled, alpha=alpha, num_reference=None)):
        exact = bk.Exact().run(posterior_of(each, BITS, max_new_tokens=10), seed=0)
        np.testing.assert_allclose(exact.log_evidence, quantile.log_evidence, atol=1 / (20 * alpha**2 * 1024**2))
        mean = exact.mean(exact.reward)
        np.testing.assert_allclose(mean, 1 / (1 - np.exp(-1 / alpha)) - alpha, atol=1e-4)


# ---- F from reference draws


def evidences(make: Any, num: int) -> np.ndarray:
    """log Z of the posterior that is sampled, for `num` sets of reference draws, by enumeration."""

    def posterior(seed: int) -> bk.Posterior:
        return posterior_of(make(seed), BITS, max_new_tokens=6, prompts=[[0]])

    once = Truth(posterior(0))  # completions and their prior are the same for all
    joint = [once.log_prior + posterior(seed).log_likelihood(once.sequences) for seed in range(num)]
    return logsumexp(np.concatenate(joint))


@pytest.mark.slow
@pytest.mark.parametrize("fn", [NUMBER, bk.TokenReward(lambda tokens, lengths: tokens.sum(axis=1), alpha=1.0)])
def test_the_mean_evidence_of_best_of_is_one_over_n_for_any_number_of_draws(fn: Any) -> None:
    for num_reference in (3, 50):
        log_z = evidences(lambda seed, m=num_reference: bk.BestOf(4, fn, num_reference=m, seed=seed), 150)
        assert abs(z_score(np.exp(log_z), 0.25)) < 4


@pytest.mark.slow
def test_the_error_of_f_is_the_one_that_is_stated() -> None:
    makers: tuple[Any, ...] = (
        lambda seed: bk.BestOf(4, NUMBER, num_reference=200, seed=seed),
        lambda seed: bk.QuantileReward(NUMBER, alpha=0.2, num_reference=200, seed=seed),
        lambda seed: bk.QuantileReward(NUMBER, alpha=2.0, num_reference=200, seed=seed),
    )
    for make in makers:
        log_z = evidences(make, 200)
        stated = make(0).log_evidence_se
        assert 0.8 < log_z.std() / stated < 1.2  # +- 4 standard errors of a standard deviation
        assert abs(log_z.mean() - make(0).log_evidence) < 4 * stated / np.sqrt(200) + stated**2


def test_best_of_from_draws_is_near_the_law() -> None:
    law = np.exp(best_of_n_log_probs(bk.Exact().run(posterior_of(TIED), seed=0), 3))
    estimated = Truth(posterior_of(bk.BestOf(3, TIED, num_reference=4000)))
    order = bk.Exact().run(posterior_of(TIED), seed=0)
    values = posterior_of(bk.BestOf(3, TIED, num_reference=4000)).log_joint(order.sequences)
    p = np.exp(values - estimated.log_evidence[:, None])
    assert (np.abs(p - law).sum(axis=1) / 2 < 0.03).all()
    assert np.isfinite(estimated.reward).all()


def test_reference_draws_are_their_own_and_follow_the_seed() -> None:
    def reward(**options: Any) -> np.ndarray:
        posterior = posterior_of(bk.QuantileReward(DISTINCT, alpha=1.0, num_reference=100, **options))
        return Truth(posterior).reward

    np.testing.assert_array_equal(reward(seed=0), reward(seed=0))
    assert (reward(seed=0) != reward(seed=1)).any()
    # the draws of importance sampling with the same seed are others: their ranks would be 1/202, 3/202, ... without gaps
    posterior = posterior_of(bk.QuantileReward(NUMBER, alpha=1.0, num_reference=100), BITS, max_new_tokens=10)
    drawn = bk.ImportanceSampling(100).run(posterior, seed=0).reward[0]
    assert len(np.unique(drawn)) < 90


def test_f_is_the_prompts_own_whichever_other_prompts_there_are() -> None:
    first = bk.TokenReward(lambda tokens, lengths: tokens[:, 0], alpha=1.0)
    posterior = posterior_of(bk.BestOf(3, first))
    truth = Truth(posterior)
    for prompts in ([[2], [1], [0]], [[1]]):  # another likelihood each time: nothing is shared with the first one
        p = prompts.index([1])
        fresh = Truth(posterior_of(bk.BestOf(3, first), prompts=prompts))
        np.testing.assert_array_equal(fresh.reward[p], truth.reward[1])
    assert np.abs(truth.reward[0] - truth.reward[1]).max() > 0.05  # the prior differs after the two prompts
    np.testing.assert_array_equal(Truth(posterior.select([1])).reward[0], truth.reward[1])
    again = Truth(posterior.at_alpha(2.0).select([1, 0]))
    np.testing.assert_array_equal(again.reward, truth.reward[::-1])
    np.testing.assert_allclose(again.posterior.log_likelihood(again.sequences), truth.reward[::-1] / 2)


def test_parts_of_the_prompts_and_other_alphas_score_no_reference_again() -> None:
    calls = []

    def counted(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        calls.append(len(lengths))
        return lengths

    quantile = bk.QuantileReward(bk.TokenReward(counted, alpha=1.0), alpha=1.0, num_reference=50)
    posterior = posterior_of(quantile)
    assert not calls  # nothing is drawn before the first completion is scored
    one = bk.Sequences.from_lists([[3]], max_new_tokens=4, pad_token=3)
    posterior.select([0]).reward(one)
    assert sum(calls) == 58  # 8 of them twice; the completion is one of the 50
    posterior.at_alpha(0.5).select([0]).reward(one)
    assert sum(calls) == 58
    posterior_of(bk.QuantileReward(quantile.fn, alpha=1.0, num_reference=50)).select([0]).reward(one)
    assert sum(calls) == 116


def test_scores_read_texts_and_columns() -> None:
    def matches(completions: list[str], answer: list[str]) -> list[int]:
        return [text.count(a) for text, a in zip(completions, answer, strict=True)]

    options: dict[str, Any] = {"prompts": ["1", "1"], "max_new_tokens": 3, "answer": ["1", "2"]}
    posterior = bk.Posterior(TextLM(), bk.BestOf(2, matches, num_reference=None), **options)
    reward = Truth(posterior).reward
    law = best_of_n_log_probs(
        bk.Exact().run(bk.Posterior(TextLM(), bk.Reward(matches, alpha=1.0), **options), seed=0), 2
    )
    exact = bk.Exact().run(posterior, seed=0)
    np.testing.assert_allclose(exact.log_prior + exact.reward + np.log(2), law, atol=1e-9)
    assert (reward[0] != reward[1]).any()
    with pytest.raises(bk.RewardError, match="asks for"):
        bk.Posterior(TextLM(), bk.BestOf(2, matches), prompts=["1"], max_new_tokens=3)
    with pytest.raises(bk.TextRewardError):
        posterior_of(bk.QuantileReward(lambda completions: [len(c) for c in completions], alpha=1.0))


def test_minus_infinity_ranks_lowest_and_nan_is_refused() -> None:
    excluded = bk.TokenReward(lambda tokens, lengths: np.where(lengths == 1, -np.inf, lengths), alpha=1.0)
    posterior = posterior_of(bk.QuantileReward(excluded, alpha=1.0, num_reference=None), prompts=[[0]])
    reward = posterior.reward([[3], [0, 3], [0, 0, 3]])[0]
    assert 0 < reward[0] < reward[1] < reward[2] < 1
    assert np.isclose(reward[0], np.exp(posterior.log_prior([[3]]))[0, 0] / 2)
    for bad, message in (
        (lambda tokens, lengths: np.where(lengths == 1, np.nan, 0.0), "returned nan"),
        (lambda tokens, lengths: np.full(len(lengths), np.inf), "returned inf"),
        (lambda tokens, lengths: lengths[:-1], "It must return one float per completion"),
    ):
        for factor in (
            bk.BestOf(3, bk.TokenReward(bad, alpha=1.0)),
            bk.QuantileReward(bk.TokenReward(bad, alpha=1.0), alpha=1.0),
        ):
            with pytest.raises(bk.RewardError, match=message):
                posterior_of(factor, prompts=[[0]]).reward([[3], [0, 3]])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: bk.BestOf(0, DISTINCT), "n must be an integer of at least 1; got 0"),
        (lambda: bk.BestOf(2.5, DISTINCT), "n must be an integer"),  # type: ignore[arg-type]
        (lambda: bk.BestOf(2, DISTINCT, num_reference=0), "num_reference"),
        (lambda: bk.BestOf(2, DISTINCT, seed=-1), "seed"),
        (lambda: bk.BestOf(2, 3.0), "fn must be a function"),  # type: ignore[arg-type]
        (lambda: bk.BestOf(2, DISTINCT * TIED), "got the product"),  # type: ignore[arg-type]
        (lambda: bk.BestOf(2, DISTINCT, alpha=0.0), "alpha must be a positive"),
        (lambda: bk.QuantileReward(DISTINCT, alpha=-1.0), "alpha must be a positive"),
        (lambda: bk.QuantileReward(DISTINCT, alpha=np.inf), "alpha must be a positive"),
        (lambda: bk.QuantileReward(None, alpha=1.0), "fn must be a function"),  # type: ignore[arg-type]
        (lambda: posterior_of(bk.BestOf(2, DISTINCT, num_reference=None), max_new_tokens=40), "Give a number of"),
    ],
)
def test_arguments_are_checked_before_any_work(make: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        make()


# ---- scores that networks round


def place_value(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A whole number that is different for every completion."""
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    return ((tokens + 1) * inside) @ 5 ** np.arange(tokens.shape[1])


def rounded(fn: Any) -> bk.TokenReward:
    """A score whose last digits depend on the batch that it is computed in, as those of a float32 network do."""

    def scored(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return fn(tokens, lengths) * (1 + 1e-6 * np.cos(len(lengths) + 7.0 * np.arange(len(lengths))))

    return bk.TokenReward(scored, alpha=1.0)


@pytest.mark.parametrize("num_reference", [None, 60])
@pytest.mark.parametrize("fn", [place_value, length_score])
def test_a_score_that_each_batch_rounds_differently_has_the_same_cells(fn: Any, num_reference: int | None) -> None:
    """With and without rounding, in one batch and one by one; with 60 draws some completions are no reference."""
    for make in (bk.BestOf(4, fn, num_reference=num_reference), bk.QuantileReward(fn, alpha=1.0)):
        options = {"fn": rounded(fn), "num_reference": num_reference}
        exact = Truth(posterior_of(replace(make, **(options | {"fn": bk.TokenReward(fn, alpha=1.0)}))))
        posterior = posterior_of(replace(make, **options))
        np.testing.assert_allclose(posterior.reward(exact.sequences), exact.reward, atol=1e-12)
        chosen = range(0, exact.sequences.lengths.shape[1], 9)
        for p in range(2):
            part = posterior.select([p])
            rows = [
                bk.Sequences(exact.sequences.tokens[:1, i : i + 1], exact.sequences.lengths[:1, i : i + 1])
                for i in chosen
            ]
            alone = [part.reward(row)[0, 0] for row in rows]
            np.testing.assert_allclose(alone, exact.reward[p, list(chosen)], atol=1e-12)


@pytest.mark.parametrize("make", [bk.BestOf, bk.QuantileReward])
def test_ranks_of_a_networks_score_do_not_depend_on_what_else_is_scored(make: Any) -> None:
    prior, prompts = bk.TorchLM(tiny_gpt2(), check=False), [[1], [2, 3]]

    def posterior(chosen: list[list[int]]) -> bk.Posterior:
        power = bk.Power(2.0)
        ranked = make(4, power, num_reference=None) if make is bk.BestOf else make(power, alpha=0.1, num_reference=None)
        return posterior_of(ranked, prior, prompts=chosen, max_new_tokens=3)

    exact = bk.Exact().run(posterior(prompts), seed=0)
    for p in range(2):
        alone = posterior([prompts[p]])
        np.testing.assert_allclose(
            alone.reward(bk.Sequences(exact.tokens[:1], exact.lengths[:1]))[0], exact.reward[p], atol=1e-6
        )
        few = [
            alone.reward(bk.Sequences(exact.tokens[:1, i : i + 1], exact.lengths[:1, i : i + 1]))
            for i in range(0, 80, 8)
        ]
        np.testing.assert_allclose(np.ravel(few), exact.reward[p, :80:8], atol=1e-6)
    if make is bk.BestOf:
        np.testing.assert_allclose(exact.log_evidence, -np.log(4), atol=1e-6)
        kl = -(np.exp(exact.log_prior) * exact.reward).sum(axis=1) - np.log(4)
        np.testing.assert_allclose(
            bk.certify(posterior(prompts), prior, num_draws=64, num_particles=8, num_runs=4, seed=0).reverse_kl.mean(
                axis=1
            ),
            kl,
            atol=1e-3,
        )


def test_equal_scores_alone_are_ties_where_nothing_is_rounded() -> None:
    """However small the differences are: no monotone change of a score changes its ranks."""
    scores = [
        bk.TokenReward(lambda tokens, lengths, c=c: c * NUMBER.fn(tokens, lengths), alpha=1.0) for c in (1, 2.0**-60)
    ]
    for num_reference in (None, 60):
        truth, scaled = (
            Truth(posterior_of(bk.QuantileReward(fn, alpha=1.0, num_reference=num_reference))).reward for fn in scores
        )
        np.testing.assert_array_equal(scaled, truth)


def test_levels_do_not_run_into_each_other() -> None:
    """Scores 1.5 roundings apart, in a chain, are levels of their own; those inside a rounding are one."""
    scores = np.array([-np.inf, 0.0, 4e-7, 1.5e-6, 3e-6, 5.0])
    keys = np.array([b"a", b"b", b"c", b"d", b"e", b"f"], dtype="S16")
    cells = Cells.of(keys, scores, np.full(6, 1 / 6), 0.0, 1e-6)
    np.testing.assert_allclose(cells.mass * 6, [1, 2, 1, 1, 1])
    lower, mass = cells.of_scores(np.array([-np.inf, -7.0, 5e-7, 2.0, 5 + 4e-6, 9.0]))
    np.testing.assert_allclose(lower * 6, [0, 1, 1, 5, 5, 6])
    np.testing.assert_allclose(mass * 6, [1, 0, 2, 0, 1, 0])
    assert cells.known_places(np.array([b"c", b"x"], dtype="S16")).tolist() == [1, -1]


def test_they_need_a_posterior() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"put it into a bk\.Posterior"):
        bk.BestOf(2, DISTINCT).values(None)  # type: ignore[arg-type]


def test_exact_best_of_handles_completions_of_mass_zero() -> None:
    with np.errstate(divide="ignore"):
        prior = bk.NgramLM(np.log([0.3, 0.3, 0.0, 0.4]), eos_token_id=3)
    posterior = posterior_of(bk.BestOf(3, DISTINCT, num_reference=None), prior)
    np.testing.assert_allclose(bk.Exact().run(posterior, seed=0).log_evidence, -np.log(3), atol=1e-10)
    assert PRIOR.full_support
