"""The oracle itself: gold numbers of theory.md 8.2, total probability, and the identity everything stands on."""

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.arrays import to_host
from bayes_klrl.inference.exact.enumeration import all_sequences, num_sequences
from tests.helpers.backends import on, precision
from tests.helpers.truth import Truth, chi_square_p, completions, counts, full_table, random_posterior

# b: log Z, E[r], Var[r], KL(p* || p0), ESS / N
GOLD = {
    0.5: (0.39722716, 0.96385693, 0.67360811, 0.08470130, 0.848386),
    1.5: (1.65238447, 1.48690885, 0.33614944, 0.57797880, 0.444887),
    4.0: (5.87342935, 1.78149356, 0.03937661, 1.25254488, 0.219620),
}


@pytest.mark.parametrize("b", GOLD)
def test_gold_numbers(backend: str, b: float) -> None:
    exact = bk.Exact().run(on(backend, problems.gold_posterior(alpha=1 / b)), seed=0)
    assert exact.shape == (1, 1093)
    mean = exact.mean(exact.reward)[0]
    variance = exact.mean((exact.reward - mean) ** 2)[0]
    kl = exact.mean(exact.log_likelihood)[0] - exact.log_evidence[0]
    measured = (exact.log_evidence[0], mean, variance, kl)
    np.testing.assert_allclose(measured, GOLD[b][:4], rtol=0, atol=precision(backend, 6e-9))
    p0 = np.exp(exact.log_prior[0])
    assert 1 / (p0 @ np.exp(2 * (exact.log_likelihood[0] - exact.log_evidence[0]))) == pytest.approx(
        GOLD[b][4], abs=precision(backend, 6e-7)
    )


def test_gold_derived_numbers(backend: str) -> None:
    exact = bk.Exact().run(on(backend, problems.gold_posterior()), seed=0)
    p0, log_p = np.exp(exact.log_prior[0]), (exact.log_prior + exact.log_likelihood - exact.log_evidence)[0]
    cut = ~exact.sequences.finished({3})[0]
    assert p0 @ exact.reward[0] == pytest.approx(0.62831994, abs=precision(backend, 5e-9))
    assert p0 @ (exact.log_prior[0] - log_p) == pytest.approx(0.70990457, abs=precision(backend, 6e-9))
    assert np.exp(log_p)[cut].sum() == pytest.approx(0.582598, abs=precision(backend, 6e-7))
    assert p0[cut].sum() == pytest.approx(0.329323, abs=precision(backend, 6e-7))
    assert exact.sequences.lists()[int(log_p.argmax())] == [1, 0, 1, 2, 3]
    assert np.exp(log_p.max()) == pytest.approx(0.030193, abs=precision(backend, 6e-7))


@pytest.mark.parametrize(
    "options",
    [
        {"eos": (3,)},
        {"eos": (0,)},
        {"eos": (1, 3)},
        {"eos": ()},
        {"prompts": ((0,), (2,), (0, 1, 2))},
        {"num_tokens": 1},
        {"order": 1},
    ],
    ids=str,
)
def test_total_probability_and_evidence(backend: str, options: dict) -> None:
    posterior = on(backend, random_posterior(3, **options))
    truth, exact = Truth(posterior), bk.Exact().run(posterior, seed=0)
    np.testing.assert_allclose(np.exp(exact.log_prior).sum(axis=1), 1.0, rtol=0, atol=precision(backend, 1e-12))
    np.testing.assert_allclose(exact.log_evidence, truth.log_evidence, rtol=0, atol=precision(backend, 1e-12))
    assert sorted(exact.sequences.lists()) == sorted(truth.xs * posterior.num_prompts)
    np.testing.assert_array_equal(exact.log_evidence_se, 0.0)


def test_without_the_eos_term_the_mass_is_far_from_one(backend: str) -> None:
    """The test above bites: forgetting EOS is the commonest mistake there is."""
    posterior = on(backend, problems.gold_posterior())
    exact = bk.Exact().run(posterior, seed=0)
    per_token = to_host(posterior.prior.token_log_probs(posterior.prompt_ids, exact.sequences))
    without_eos = np.where(exact.tokens == 3, 0.0, per_token).sum(axis=2)
    assert np.exp(without_eos).sum() > 2


@pytest.mark.parametrize("seed", range(5))
def test_regularised_return_is_the_elbo_is_log_evidence_minus_kl(backend: str, seed: int) -> None:
    """J(q) / alpha = E_q[log w] = log Z - KL(q || p*), for any q; J written as RL writes it."""
    posterior = on(backend, random_posterior(seed, num_tokens=4, alpha=0.7, prompts=((0,), (1,))))
    truth = Truth(posterior)
    guide = full_table(posterior.prior, 4, noise=1.0, seed=seed)
    log_q = bk.Posterior(guide, posterior.likelihood, prompts=[[0], [1]], max_new_tokens=4).log_prior(truth.sequences)
    q = np.exp(log_q)
    kl_to_prior = (q * (log_q - truth.log_prior)).sum(axis=1)
    regularised_return = (q * truth.reward).sum(axis=1) - posterior.alpha * kl_to_prior
    elbo = (q * (posterior.log_joint(truth.sequences) - log_q)).sum(axis=1)
    np.testing.assert_allclose(regularised_return / posterior.alpha, elbo, rtol=0, atol=precision(backend, 1e-12))
    np.testing.assert_allclose(elbo, truth.log_evidence - truth.kl(guide), rtol=0, atol=precision(backend, 1e-12))
    assert (truth.kl(guide) > 0.01).all()
    np.testing.assert_allclose(truth.kl(truth.policy()), 0.0, rtol=0, atol=precision(backend, 1e-12))


def test_order_is_the_same_for_all_prompts(backend: str) -> None:
    posterior = on(backend, random_posterior(1, prompts=((0,), (1, 2), (2, 0, 1))))
    exact = bk.Exact().run(posterior, seed=0)
    assert (exact.tokens == exact.tokens[:1]).all()
    assert (exact.lengths == exact.lengths[:1]).all()
    np.testing.assert_allclose(exact.log_proposal, -np.log(exact.shape[1]))
    np.testing.assert_array_equal(exact.log_weights, exact.log_prior - exact.log_proposal + exact.log_likelihood)
    for p, prompt in enumerate(([0], [1, 2], [2, 0, 1])):
        alone = bk.Exact().run(
            bk.Posterior(posterior.prior, posterior.likelihood, prompts=[prompt], max_new_tokens=5), seed=0
        )
        np.testing.assert_allclose(alone.log_prior[0], exact.log_prior[p], atol=precision(backend, 1e-13))


def test_impossible_completions_keep_their_rows() -> None:
    with np.errstate(divide="ignore"):
        prior = bk.NgramLM(np.log([0.5, 0.0, 0.5]), eos_token_id=2)
    no_repeat = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens[:, 0] == 0) & (tokens[:, 1] == 0), -np.inf, 1.0), alpha=1.0
    )
    exact = bk.Exact().run(bk.Posterior(prior, no_repeat, max_new_tokens=2), seed=0)
    assert exact.shape == (1, 7)
    by_name = dict(zip(map(tuple, exact.sequences.lists()), exact.log_weights[0], strict=True))
    assert {x for x, w in by_name.items() if w > -np.inf} == {(2,), (0, 2)}
    assert exact.log_evidence[0] == pytest.approx(1 + np.log(0.75))
    drawn = bk.Exact(num_draws=200).run(bk.Posterior(prior, no_repeat, max_new_tokens=2), seed=0)
    assert {tuple(x) for x in drawn.sequences.lists()} == {(2,), (0, 2)}


def test_too_many_completions_are_refused_before_any_work() -> None:
    def never(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        raise AssertionError

    prior = bk.NgramLM(problems.gold_table(0.0), eos_token_id=3)
    posterior = bk.Posterior(prior, bk.TokenReward(never, alpha=1.0), prompts=[[0], [1]], max_new_tokens=6)
    with pytest.raises(bk.BayesKLRLError, match=r"completions, more than max_sequences = 2,185.*bk\.SMC"):
        bk.Exact(max_sequences=2185).run(posterior, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="raised AssertionError"):
        bk.Exact(max_sequences=2186).run(posterior, seed=0)
    huge = bk.Posterior(prior, bk.TokenReward(never, alpha=1.0), max_new_tokens=400)
    with pytest.raises(bk.BayesKLRLError, match="completions, more than"):
        bk.Exact().run(huge, seed=0)


def test_no_posterior_at_all_is_refused() -> None:
    prior = bk.NgramLM(problems.gold_table(0.0), eos_token_id=3)
    never = bk.TokenReward(lambda tokens, lengths, prompt_index: np.where(prompt_index == 1, -np.inf, 0.0), alpha=1.0)
    posterior = bk.Posterior(prior, never, prompts=[[0], [1]], max_new_tokens=2)
    with pytest.raises(bk.SupportError, match="prompt 1"):
        bk.Exact().run(posterior, seed=0)


@pytest.mark.parametrize("vocab_size, eos, num_tokens", [(3, [2], 4), (4, [0, 2], 3), (2, [], 5), (2, [0, 1], 3)])
def test_all_sequences_against_the_definition(vocab_size: int, eos: list[int], num_tokens: int) -> None:
    listed = all_sequences(vocab_size, eos, num_tokens).lists()
    assert sorted(listed) == completions(vocab_size, eos, num_tokens)
    assert len(listed) == num_sequences(vocab_size, len(eos), num_tokens)


def test_num_draws_are_independent_posterior_draws(backend: str) -> None:
    posterior = on(backend, random_posterior(2, num_tokens=4, prompts=((0,), (1,))))
    truth, draws = Truth(posterior), bk.Exact(num_draws=4000).run(posterior, seed=5)
    assert draws.shape == (2, 4000)
    np.testing.assert_array_equal(draws.log_weights, 0.0)
    np.testing.assert_allclose(draws.log_evidence, truth.log_evidence, atol=precision(backend, 1e-12))
    np.testing.assert_allclose(
        draws.log_proposal,
        posterior.log_joint(draws) - truth.log_evidence[:, None],
        rtol=0,
        atol=precision(backend, 1e-12),
    )
    for p in range(2):
        assert chi_square_p(counts(truth, draws.tokens[p]), truth.p[p]) > 0.001
    independent = np.corrcoef(draws.reward[0], draws.reward[1])[0, 1]
    assert abs(independent) < 4 / np.sqrt(4000)
