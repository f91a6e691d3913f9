"""A mixture of language models: exact in scoring, sampling and every prefix, and a proposal that forgets no mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior, z_score

WEIGHTS = [0.5, 0.3, 0.2]


def components(posterior: bk.Posterior, num: int = 3, noise: float = 1.5) -> list[bk.NgramLM]:
    return [full_table(posterior.prior, 3, noise=noise, seed=s) for s in range(num)]  # type: ignore[arg-type]


def log_prob(lm: bk.LanguageModel, truth: Truth) -> np.ndarray:
    """log p(x | c) of every completion, (P, M), by the model's own scoring."""
    posterior = truth.posterior
    prompts = [list(ids) for ids in posterior.prompt_ids]
    as_prior = bk.Posterior(lm, posterior.likelihood, prompts=prompts, max_new_tokens=posterior.max_new_tokens)
    return as_prior.log_prior(truth.sequences)


def mixed(models: Any, weights: Any, truth: Truth) -> np.ndarray:
    """log sum_s w_s p_s(x), from the definition."""
    with np.errstate(divide="ignore"):
        return np.log(sum(w * np.exp(log_prob(model, truth)) for w, model in zip(weights, models, strict=True)))


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(random_posterior(3, num_tokens=4, prompts=((0,), (1, 2))))


def test_scoring_is_the_mixture_of_completions(truth: Truth) -> None:
    models = components(truth.posterior)
    lm = bk.MixtureLM(models, WEIGHTS)
    found = log_prob(lm, truth)
    np.testing.assert_allclose(found, mixed(models, WEIGHTS, truth), rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, atol=1e-12)


def test_every_prefix_has_the_mixtures_own_next_token(truth: Truth) -> None:
    """p(a | x_<t) by stepping is the quotient of the enumerated mixture's prefix masses, not the average of the models'."""
    models = components(truth.posterior)
    lm = bk.MixtureLM(models, WEIGHTS)
    mass = np.exp(mixed(models, WEIGHTS, truth))[1]
    tokens, lengths = truth.sequences.tokens[1], truth.sequences.lengths[1]
    largest = 0.0
    for prefix in ([], [0], [0, 1], [1, 1], [2, 0, 0]):
        t = len(prefix)
        begins = (tokens[:, :t] == prefix).all(axis=1) & (lengths > t)
        expected = np.array([mass[begins & (tokens[:, t] == a)].sum() for a in range(4)]) / mass[begins].sum()
        state = lm.prefill([truth.posterior.prompt_ids[1]])
        for token in prefix:
            state = lm.append(state, np.array([token]))
        found = np.exp(lm.next_log_probs(state))[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        rows = [model.prefill([[*truth.posterior.prompt_ids[1], *prefix]]) for model in models]
        averaged = sum(w * np.exp(m.next_log_probs(row))[0] for w, m, row in zip(WEIGHTS, models, rows, strict=True))
        largest = max(largest, float(np.abs(averaged - expected).max()))
    assert largest > 0.05  # the test bites


def test_draws_follow_what_is_scored(truth: Truth) -> None:
    lm = bk.MixtureLM(components(truth.posterior), WEIGHTS)
    decoding = decode((lm,), truth.posterior.prompt_ids, 4000, 4, np.random.default_rng(0))
    expected = np.exp(log_prob(lm, truth))
    drawn = decoding.sequences().tokens
    for p in range(2):
        assert chi_square_p(counts(truth, drawn[p]), expected[p]) > 0.001
    scored = bk.Posterior(lm, truth.posterior.likelihood, prompts=[[0], [1, 2]], max_new_tokens=4).log_prior(
        decoding.sequences()
    )
    np.testing.assert_allclose(decoding.log_probs[0].reshape(2, -1), scored, rtol=0, atol=1e-10)


def test_it_keeps_the_contract(truth: Truth) -> None:
    lm = bk.MixtureLM(components(truth.posterior), WEIGHTS)
    posterior = bk.Posterior(lm, truth.posterior.likelihood, prompts=[[0], [1, 2]], max_new_tokens=4)
    bk.check_posterior(posterior)
    # states are values, and rows may be repeated and dropped before and after somebody asked
    state = lm.append(lm.prefill([[0], [1, 2]]), np.array([1, 0]))
    first = lm.next_log_probs(state)
    twice = lm.select(state, np.array([1, 1, 0]))
    np.testing.assert_array_equal(lm.next_log_probs(twice), first[[1, 1, 0]])
    after = lm.append(twice, np.array([0, 1, 2]))
    again = lm.append(
        lm.append(lm.select(lm.prefill([[0], [1, 2]]), np.array([1, 1, 0])), np.array([0, 0, 1])), [0, 1, 2]
    )
    np.testing.assert_allclose(lm.next_log_probs(after), lm.next_log_probs(again), atol=1e-14)
    np.testing.assert_array_equal(lm.next_log_probs(state), first)


def test_as_a_proposal_it_is_unbiased(truth: Truth) -> None:
    posterior = truth.posterior
    lm = bk.MixtureLM(components(posterior), WEIGHTS)
    for algorithm in (bk.ImportanceSampling(50, proposal=lm), bk.SMC(50, proposal=lm)):
        runs = np.array([algorithm.run(posterior, seed=seed).log_evidence for seed in range(120)])
        for p in range(2):
            assert abs(z_score(np.exp(runs[:, p]), float(np.exp(truth.log_evidence[p])))) < 3.5


def test_as_a_prior_it_is_conditioned(truth: Truth) -> None:
    models = components(truth.posterior)
    posterior = bk.Posterior(
        bk.MixtureLM(models, WEIGHTS), truth.posterior.likelihood, prompts=[[0], [1, 2]], max_new_tokens=4
    )
    expected = np.log(np.exp(mixed(models, WEIGHTS, truth) + truth.reward / posterior.alpha).sum(axis=1))
    np.testing.assert_allclose(bk.Exact().run(posterior, seed=0).log_evidence, expected, atol=1e-12)
    # with a mixture for a prior and itself as the proposal, log-weights are exactly r / alpha
    draws = bk.ImportanceSampling(40).run(posterior, seed=1)
    np.testing.assert_array_equal(draws.log_weights, draws.reward / posterior.alpha)


def test_it_is_certified_as_a_policy(truth: Truth) -> None:
    lm = bk.MixtureLM(components(truth.posterior, noise=0.5), WEIGHTS)
    certificate = bk.certify(truth.posterior, lm, seed=0)
    kl = truth.kl(lm)
    assert ((certificate.reverse_kl[:, 0] <= kl + 1e-9) & (kl <= certificate.reverse_kl[:, 1] + 1e-9)).all()


def test_a_mixture_is_nearer_to_the_posterior_than_its_models_are_on_average(truth: Truth) -> None:
    """By exactly the mutual information between the model and what it writes."""
    models = components(truth.posterior)
    mean_kl = sum(w * truth.kl(model) for w, model in zip(WEIGHTS, models, strict=True))
    log_q = mixed(models, WEIGHTS, truth)
    information = sum(
        w * (np.exp(log_prob(m, truth)) * (log_prob(m, truth) - log_q)).sum(axis=1)
        for w, m in zip(WEIGHTS, models, strict=True)
    )
    np.testing.assert_allclose(truth.kl(bk.MixtureLM(models, WEIGHTS)), mean_kl - information, atol=1e-10)
    assert (information > 0.05).all()


# --- the defensive mixture ----------------------------------------------------------------------------------


def test_a_defensive_mixture_bounds_the_weights_and_finds_the_forgotten_mode() -> None:
    """w = p0 phi / ((1 - eps) q + eps p0) <= phi / eps, for the worst q."""
    posterior, eps = random_posterior(4, num_tokens=3), 0.05
    truth = Truth(posterior)
    forgets = np.array([-40.0, 0.0, 0.0, 0.0]) + posterior.prior.log_probs  # type: ignore[attr-defined]
    q = bk.NgramLM(forgets - np.log(np.exp(forgets).sum(axis=-1, keepdims=True)), eos_token_id=3)
    lm = bk.MixtureLM([q, posterior.prior], [1 - eps, eps])
    log_w = truth.log_prior + truth.reward / posterior.alpha - log_prob(lm, truth)
    bound = truth.reward / posterior.alpha - np.log(eps)
    assert (log_w <= bound + 1e-12).all()
    assert (log_w > bound - 0.01).any()  # and no better bound holds
    lost = truth.p[0][(truth.sequences.tokens[0] == 0).any(axis=1)].sum()
    assert lost > 0.2
    honest = np.array([bk.ImportanceSampling(400, lm).run(posterior, seed=s).log_evidence[0] for s in range(100)])
    assert abs(z_score(np.exp(honest), float(np.exp(truth.log_evidence[0])))) < 3.5
    blind = bk.ImportanceSampling(4000, q).run(posterior, seed=0)
    assert blind.log_evidence[0] == pytest.approx(truth.log_evidence[0] + np.log1p(-lost), abs=0.1)


# --- where probabilities are 0, other backends, refusals ------------------------------------------------------


def test_a_model_that_cannot_have_written_it_has_no_say() -> None:
    with np.errstate(divide="ignore"):
        only_0 = bk.NgramLM(np.log([1.0, 0.0]), eos_token_id=None)
        only_1 = bk.NgramLM(np.log([0.0, 1.0]), eos_token_id=None)
    lm = bk.MixtureLM([only_0, only_1])
    assert not lm.full_support
    nothing = bk.TokenReward(lambda tokens, lengths: np.zeros(len(tokens)), alpha=1.0)
    posterior = bk.Posterior(lm, nothing, max_new_tokens=3)
    x = [[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0]]
    np.testing.assert_allclose(posterior.log_prior(x), [[np.log(0.5), np.log(0.5), -np.inf, -np.inf]])
    draws = bk.ImportanceSampling(100).run(posterior, seed=0)
    assert (draws.tokens.min(axis=2) == draws.tokens.max(axis=2)).all()
    state = lm.append(lm.append(lm.prefill([[]]), np.array([0])), np.array([1]))  # impossible
    assert np.isfinite(np.exp(lm.next_log_probs(state))).all()
    assert bk.MixtureLM([only_0, bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)]).full_support


def test_transformers_and_tables_mix() -> None:
    pytest.importorskip("transformers")
    from tests.helpers.tiny_models import tiny_gpt2, tiny_tokenizer

    tokenizer = tiny_tokenizer(5)
    models = [
        bk.TorchLM(tiny_gpt2(seed=0), tokenizer),
        bk.NgramLM.fit([[1, 2, 0], [3, 0]], order=2, eos_token_id=0, vocab_size=5),
    ]
    lm = bk.MixtureLM(models, [2.0, 6.0])
    np.testing.assert_allclose(lm.weights, [0.25, 0.75])
    assert lm.tokenizer is tokenizer
    assert lm.context_length == 32
    assert lm.decode([[1, 2, 0]]) == models[0].decode([[1, 2, 0]])
    assert not lm.accepts_empty_prompt
    assert lm.bos_token_id == 0
    reward = bk.TokenReward(lambda tokens, lengths: 1.0 * (tokens == 1).sum(axis=1), alpha=1.0)
    posterior = bk.Posterior(models[0], reward, prompts=[[1], [2, 3]], max_new_tokens=2)
    truth = Truth(posterior)
    np.testing.assert_allclose(log_prob(lm, truth), mixed(models, [0.25, 0.75], truth), rtol=0, atol=1e-5)
    draws = bk.ImportanceSampling(300, proposal=lm).run(posterior, seed=0)
    np.testing.assert_allclose(draws.log_proposal, log_prob_of(lm, posterior, draws), rtol=0, atol=1e-5)
    assert bk.SMC(64, proposal=lm).run(posterior, seed=0).log_evidence == pytest.approx(truth.log_evidence, abs=0.3)


def log_prob_of(lm: bk.LanguageModel, posterior: bk.Posterior, draws: bk.Draws) -> np.ndarray:
    prompts = [list(ids) for ids in posterior.prompt_ids]
    return bk.Posterior(lm, posterior.likelihood, prompts=prompts, max_new_tokens=2).log_prior(draws)


def test_what_is_no_mixture_is_refused() -> None:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    with pytest.raises(bk.BayesKLRLError, match="at least one"):
        bk.MixtureLM([])
    with pytest.raises(bk.BayesKLRLError, match="Model 1 of a mixture must be a language model"):
        bk.MixtureLM([coin, "austen"])  # type: ignore[list-item]
    for weights in ([0.5], [0.5, 0.0], [0.5, -1.0], [0.5, np.nan], [[0.5], [0.5]]):
        with pytest.raises(bk.BayesKLRLError, match="2 models needs as many positive weights"):
            bk.MixtureLM([coin, coin], weights)  # type: ignore[arg-type]
    for other in (
        bk.NgramLM(np.log([0.5, 0.25, 0.25]), eos_token_id=1),
        bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=0),
    ):
        with pytest.raises(bk.CheckpointError, match="share one vocabulary"):
            bk.MixtureLM([coin, other])
