"""The gold numbers of theory.md 8 by backward messages, and when `Exact` takes them."""

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.exact.messages import backward_messages
from tests.helpers.truth import Truth, chi_square_p, counts
from tests.inference.exact.test_messages import TINY

# ---- the gold numbers of theory.md 8


@pytest.mark.parametrize(
    "b, expected",
    [
        (0.5, (0.39722716, 0.96385693, 0.67360811, 0.08470130, 0.848386)),
        (1.5, (1.65238447, 1.48690885, 0.33614944, 0.57797880, 0.444887)),
        (4.0, (5.87342935, 1.78149356, 0.03937661, 1.25254488, 0.219620)),
    ],
)
def test_gold_p1(b: float, expected: tuple[float, ...]) -> None:
    messages = backward_messages(problems.gold_posterior(alpha=1 / b))
    moments, log_evidence = messages.moments(), messages.log_evidence[0]
    measured = (log_evidence, moments.reward[0], moments.variance[0], moments.kl[0])
    np.testing.assert_allclose(measured, expected[:4], rtol=0, atol=6e-9)
    assert np.exp(moments.log_ess_ratio[0]) == pytest.approx(expected[4], abs=6e-7)
    assert moments.prior_reward[0] == pytest.approx(0.62831994, abs=6e-9)
    if b == 1.5:
        assert moments.kl_from_prior[0] == pytest.approx(0.70990457, abs=6e-9)
        assert messages.marginals().truncated[0] == pytest.approx(0.582598, abs=6e-7)
        assert np.exp(messages.log_posterior([[1, 0, 1, 2, 3]])[0, 0]) == pytest.approx(0.030193, abs=6e-7)


def test_gold_p1_prior_truncation() -> None:
    """P0(cut at 6 tokens), by messages of a reward that is 0 everywhere."""
    gold = problems.gold_posterior()
    nothing = bk.AutomatonReward(bk.Automaton([[0] * 4]), alpha=1.0)
    messages = backward_messages(bk.Posterior(gold.prior, nothing, max_new_tokens=6))
    assert messages.marginals().truncated[0] == pytest.approx(0.329323, abs=6e-7)
    assert messages.log_evidence[0] == pytest.approx(0.0, abs=1e-14)
    assert messages.moments().kl[0] == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize(
    "num_tokens, expected", [(50, (1.60499324, 1.43515051, 0.54773252)), (200, (1.60499264, 1.43515133, 0.54773436))]
)
def test_gold_p2(num_tokens: int, expected: tuple[float, ...]) -> None:
    messages = backward_messages(problems.gold_posterior(max_new_tokens=num_tokens))
    moments = messages.moments()
    np.testing.assert_allclose(
        (messages.log_evidence[0], moments.reward[0], moments.kl[0]), expected, rtol=0, atol=6e-9
    )


@pytest.mark.parametrize(
    "num_tokens, expected, ess_ratio",
    [
        (10, (6.412374, 7.615696, 8.819018), "6.4e-06"),
        (40, (24.208230, 29.989316, 35.770401), "5e-22"),
        (160, (95.391655, 119.483796, 143.575937), "2e-86"),
    ],
)
def test_gold_p3(num_tokens: int, expected: tuple[float, ...], ess_ratio: str) -> None:
    messages = backward_messages(problems.gold_dense(max_new_tokens=num_tokens))
    moments = messages.moments()
    np.testing.assert_allclose(
        (messages.log_evidence[0], moments.reward[0], moments.kl[0]), expected, rtol=0, atol=6e-7
    )
    digits = len(ess_ratio.split("e")[0].replace(".", ""))
    assert f"{np.exp(moments.log_ess_ratio[0]):.{digits - 1}e}" == ess_ratio


@pytest.mark.parametrize("num_tokens, expected", [(5, -1.7492), (20, -6.3014), (80, -24.4799), (320, -97.1937)])
def test_gold_p4(num_tokens: int, expected: float) -> None:
    messages = backward_messages(problems.gold_constraint(num_tokens))
    assert messages.log_evidence[0] == pytest.approx(expected, abs=6e-5)
    assert messages.moments().kl[0] == pytest.approx(-messages.log_evidence[0], abs=1e-12)
    assert not (messages.draw(50, 0).tokens == 2).any()


@pytest.mark.parametrize("num_tokens, expected", [(5, -1.744), (20, -5.576), (80, -6.219)])
def test_gold_p4_saturates_where_ending_is_possible(num_tokens: int, expected: float) -> None:
    messages = backward_messages(problems.gold_constraint(num_tokens, eos_logit=-6.0))
    assert messages.log_evidence[0] == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    "modulo, num_tokens, log_evidence, kl, hits",
    [
        (5, 20, 6.324288, 1.664053, None),
        (5, 100, 6.391903, 1.597377, None),
        (17, 20, 0.018909, 0.130990, "6.4e-06"),
        (17, 100, 5.360458, 2.604624, "7.1082e-02"),
    ],
)
def test_gold_p5(modulo: int, num_tokens: int, log_evidence: float, kl: float, hits: str | None) -> None:
    messages = backward_messages(problems.gold_counter(modulo, num_tokens))
    moments = messages.moments()
    assert messages.log_evidence[0] == pytest.approx(log_evidence, abs=6e-7)
    assert moments.kl[0] == pytest.approx(kl, abs=6e-7)
    if hits is not None:
        assert f"{moments.prior_reward[0]:.{len(hits) - 6}e}" == hits


def test_gold_p7_at_a_length_that_can_be_enumerated() -> None:
    small = problems.gold_hidden(max_new_tokens=6)
    exact, messages = bk.Exact().run(small, seed=0), backward_messages(small)
    np.testing.assert_allclose(messages.log_evidence, exact.log_evidence, **TINY)
    long = backward_messages(problems.gold_hidden())
    draws = long.draw(200, 0)
    matches = long.posterior.reward(draws)[0]
    assert matches.mean() > 0.99
    runs = [len(run) for x in draws.lists() for run in "".join("2" if a == 2 else "." for a in x).split(".") if run]
    assert np.mean([length % 2 == 0 for length in runs]) > 0.999


# ---- Exact


def test_exact_takes_messages_where_enumeration_cannot_go() -> None:
    posterior = problems.gold_posterior(max_new_tokens=300)
    draws, messages = bk.Exact().run(posterior, seed=0), backward_messages(posterior)
    assert draws.shape == (1, 1000)
    assert draws.method == "Exact"
    np.testing.assert_array_equal(draws.log_weights, 0.0)
    np.testing.assert_array_equal(draws.log_evidence, messages.log_evidence)
    np.testing.assert_array_equal(draws.log_evidence_se, 0.0)
    assert np.isnan([draws.ess, draws.elbo, draws.pareto_k]).all()
    np.testing.assert_allclose(draws.log_proposal, messages.log_posterior(draws), rtol=0, atol=1e-12)
    np.testing.assert_allclose(draws.log_prior + draws.log_likelihood - draws.log_proposal, messages.log_evidence[0])
    moments = messages.moments()
    z = (draws.reward.mean() - moments.reward[0]) / np.sqrt(moments.variance[0] / 1000)
    assert abs(z) < 4
    again = bk.Exact().run(posterior, seed=0)
    np.testing.assert_array_equal(draws.tokens, again.tokens)
    assert (bk.Exact().run(posterior, seed=1).tokens != draws.tokens).any()


def test_exact_draws_by_either_way_have_one_law() -> None:
    posterior = problems.gold_posterior()
    truth = Truth(posterior)
    assert bk.Exact().run(posterior, seed=0).shape == (1, 1093)  # small enough: everything, weighted
    by_messages = bk.Exact(num_draws=3000).run(posterior, seed=0)
    forced = bk.Exact(max_sequences=10).run(posterior, seed=0)
    assert by_messages.shape == (1, 3000)
    assert forced.shape == (1, 1000)
    assert chi_square_p(counts(truth, by_messages.tokens[0]), truth.p[0]) > 0.001
    np.testing.assert_allclose(
        by_messages.log_proposal[0],
        by_messages.log_prior[0] + by_messages.log_likelihood[0] - truth.log_evidence[0],
        atol=1e-12,
    )


def test_exact_says_what_would_make_messages_possible() -> None:
    prior = problems.gold_posterior().prior
    plain = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match=r"more than max_sequences.*but its likelihood is not made of bk.Auto"):
        bk.Exact().run(bk.Posterior(prior, plain, max_new_tokens=100), seed=0)
