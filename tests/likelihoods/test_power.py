"""The prior to a power by enumeration, and its twist: exact for independent tokens, unbiased for all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.likelihoods.power import Power
from bayes_klrl.models.twists.simple import next_log_psi
from tests.helpers.backends import ngram_of, prior_on
from tests.helpers.truth import Truth, random_posterior, z_score
from tests.likelihoods.common import NUM_TOKENS, PRIOR, PROMPTS, every, posterior_of


def power_law(exponent: float, sequences: bk.Sequences) -> tuple[np.ndarray, np.ndarray]:
    """p0^a / sum p0^a and log sum p0^a, (P, N) and (P,)."""
    mass = np.exp(exponent * every(PRIOR, sequences))
    total = mass.sum(axis=1, keepdims=True)
    return mass / total, np.log(total[:, 0])


def without_eos() -> bk.NgramLM:
    """The prior of the tests with its EOS as a token like any other."""
    return bk.NgramLM(PRIOR.log_probs, eos_token_id=None)


def colder(prior: bk.LanguageModel, exponent: float) -> bk.NgramLM:
    """Local temperature: each next-token distribution to the power, normalised."""
    table = exponent * ngram_of(getattr(prior, "lm", prior)).log_probs
    return bk.NgramLM(table - np.logaddexp.reduce(table, axis=-1, keepdims=True), eos_token_id=prior.eos_token_ids)


class Counting:
    """A model that counts the tokens it reads; the names that it does not know are those of the model."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.appended, self.scored = lm, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def append(self, state: Any, tokens: np.ndarray) -> Any:
        self.appended += len(tokens)
        return self.lm.append(state, tokens)

    def token_log_probs(self, prompts: Any, sequences: bk.Sequences) -> Any:
        self.scored += int(sequences.lengths.sum())
        return self.lm.token_log_probs(prompts, sequences)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.5, 1.0, 2.0, 4])
def test_the_posterior_is_the_power_of_the_prior(exponent: float) -> None:
    truth = Truth(posterior_of(bk.Power(exponent)))
    p, log_evidence = power_law(exponent, truth.sequences)
    np.testing.assert_allclose(truth.p, p, atol=1e-12)
    np.testing.assert_allclose(truth.log_evidence, log_evidence, atol=1e-10)
    if exponent == 0:
        np.testing.assert_allclose(np.exp(truth.log_evidence), len(truth.xs))


def test_powers_multiply_and_temper_to_powers() -> None:
    sequences = Truth(posterior_of(bk.Power(1.0))).sequences
    for likelihood, exponent in (
        (bk.Power(2.0) * bk.Power(1.5), 2.5),
        (bk.Power(3.0) ** 0.25, 1.5),
        (bk.Power(0.5) ** 2, 0.0),
        (bk.Power(2.0, alpha=0.5), 3.0),
    ):
        np.testing.assert_allclose(Truth(posterior_of(likelihood)).p, power_law(exponent, sequences)[0], atol=1e-12)
    np.testing.assert_allclose(
        Truth(posterior_of(bk.Power(2.0)).at_alpha(4.0)).p, power_law(1.25, sequences)[0], atol=1e-12
    )
    assert Power(3.0, alpha=4.0).power == 1.5


@pytest.mark.parametrize("exponent", [0.5, 3.0])
def test_one_particle_is_exact_if_tokens_are_independent(exponent: float) -> None:
    """sum_v p0(v)^a is the same after every prefix: the twist is optimal and the twisted proposal is the posterior."""
    prior = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=None)
    posterior = posterior_of(bk.Power(exponent), prior)
    draws = bk.SMC(2, proposal="twisted", twist=bk.Power(exponent).twist()).run(posterior, seed=0)
    log_evidence = NUM_TOKENS * np.log((np.array([0.5, 0.3, 0.2]) ** exponent).sum())
    np.testing.assert_allclose(draws.log_evidence, log_evidence, atol=1e-12)
    np.testing.assert_allclose(draws.log_weights, draws.log_weights[:, :1].repeat(2, axis=1), atol=1e-12)


def test_local_temperature_is_not_the_posterior_but_smc_with_it_is_unbiased() -> None:
    posterior = posterior_of(bk.Power(3.0))
    truth = Truth(posterior)
    twist = bk.Power(3.0).twist().fit(posterior, seed=5)
    twisted = bk.TwistedLM(posterior, twist)
    assert (truth.kl(twisted) > 0.005).all()
    runs = bk.SMC(16, proposal=twisted, twist=twist).log_evidences(posterior, 400, seed=1).log_evidence
    plain = bk.SMC(16, twist=0.0).log_evidences(posterior, 400, seed=1).log_evidence
    for p in range(2):
        assert abs(z_score(np.exp(runs[p]), float(np.exp(truth.log_evidence[p])))) < 4
        assert runs[p].std() < 0.7 * plain[p].std()
    draws = bk.SMC(4000, proposal="twisted", twist=bk.Power(3.0).twist()).run(posterior, seed=0)
    np.testing.assert_allclose(draws.log_evidence, truth.log_evidence, atol=0.05)


@pytest.mark.parametrize("likelihood", [bk.Power(2.0), bk.Power(3.0) ** 0.5])
def test_one_pass_gives_the_twist_of_every_extension(likelihood: Any) -> None:
    posterior = posterior_of(likelihood)
    twist = likelihood.twist().fit(posterior, seed=0)
    prior = posterior.prior
    for prefixes in (np.zeros((2, 0), dtype=np.int64), np.array([[0, 1], [2, 2]]), np.array([[0, 1, 1], [2, 2, 0]])):
        index = np.arange(2)
        state = prior.prefill([(*PROMPTS[p], *prefixes[p]) for p in range(2)])
        fast = twist.next_log_psi(posterior, index, prefixes, (state, index))
        slow = next_log_psi(twist.__call__, posterior, index, prefixes)
        so_far = (slow - fast)[:, :1]  # (power - 1) log p0 of the prefix, which all its extensions share
        np.testing.assert_allclose(fast + so_far, slow, atol=1e-12)
        if not prefixes.shape[1]:
            np.testing.assert_allclose(so_far, 0.0, atol=1e-12)
        np.testing.assert_allclose(next_log_psi(twist, posterior, index, prefixes), slow)


def test_a_product_keeps_its_other_factors_in_the_twisted_proposal() -> None:
    no_two = bk.TokenReward(lambda tokens, lengths: np.where((tokens == 2).any(axis=1), -3.0, 0.5), alpha=1.0)
    posterior = posterior_of(bk.Power(2.0) * no_two)
    truth = Truth(posterior)
    mass = np.exp(2 * every(PRIOR, truth.sequences) + no_two.fn(truth.sequences.tokens[0], None)[None])
    np.testing.assert_allclose(truth.p, mass / mass.sum(axis=1, keepdims=True), atol=1e-12)
    draws = bk.SMC(3000, proposal="twisted", twist=bk.Power(2.0).twist()).run(posterior, seed=0)
    np.testing.assert_allclose(draws.log_evidence, truth.log_evidence, atol=0.08)
    # a complete extension has its whole likelihood as twist
    twist, index = bk.Power(2.0).twist().fit(posterior, seed=0), np.arange(2)
    for prefixes in (np.array([[0, 1], [2, 2]]), np.array([[0, 1, 1], [2, 2, 0]])):
        state = posterior.prior.prefill([(*PROMPTS[p], *prefixes[p]) for p in range(2)])
        fast = twist.next_log_psi(posterior, index, prefixes, (state, index))
        slow = next_log_psi(twist.__call__, posterior, index, prefixes)
        np.testing.assert_allclose(fast - fast[:, :1], slow - slow[:, :1], atol=1e-12)
        rows = np.pad(prefixes, ((0, 0), (0, 4 - prefixes.shape[1])), constant_values=3)
        whole = posterior.reward_of_rows(rows, np.full(2, prefixes.shape[1] + 1), index)
        np.testing.assert_allclose(slow[:, 3], whole, atol=1e-12)


@pytest.mark.parametrize("backend", ["ngram", "torch"], indirect=True)
@pytest.mark.parametrize("exponent", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("pilot", ["prior", "colder"])
@pytest.mark.parametrize("factor", ["power", "power and reward"])
def test_the_evidence_is_unbiased_with_the_twist(
    backend: str, exponent: float, ends: bool, pilot: str, factor: str
) -> None:
    prior = PRIOR if ends else without_eos()
    lm, cold = (prior_on(backend, each) for each in (prior, colder(prior, exponent)))
    power = bk.Power(exponent)
    twos = bk.TokenReward(lambda tokens, lengths: (tokens == 2).sum(axis=1), alpha=0.7)
    posterior = posterior_of(power if factor == "power" else power * twos, lm)
    log_evidence = Truth(posterior).log_evidence
    twist = power.twist(proposal=None if pilot == "prior" else cold).fit(posterior, seed=1)
    for proposal in ("twisted", cold):
        runs = bk.SMC(6, proposal=proposal, twist=twist).log_evidences(posterior, 300, seed=2).log_evidence
        for p in range(2):
            assert abs(z_score(np.exp(runs[p] - log_evidence[p]), 1.0)) < 4


@pytest.mark.parametrize("exponent", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("pilot", ["prior", "colder"])
@pytest.mark.parametrize("factor", ["power", "power and reward"])
def test_the_constants_give_twist_and_likelihood_one_mean(exponent: float, pilot: str, factor: str) -> None:
    """c_t E_p0[p0(x_1:t)^(a - 1); longer than t] = E_p0[likelihood; longer than t], enumerated, whatever the pilot's model."""
    power = bk.Power(exponent)
    twos = bk.TokenReward(lambda tokens, lengths: (tokens == 2).sum(axis=1), alpha=0.7)
    posterior = posterior_of(power if factor == "power" else power * twos)
    proposal = None if pilot == "prior" else colder(PRIOR, exponent)
    found = power.twist(num_pilot=40_000, proposal=proposal).fit(posterior, seed=3).log_constants
    truth = Truth(posterior)
    p0, likelihood = np.exp(truth.log_prior), np.exp(posterior.log_likelihood(truth.sequences))
    each = PRIOR.token_log_probs(posterior.prompt_ids, truth.sequences)
    for t in range(NUM_TOKENS):
        longer = truth.sequences.lengths > t
        twist = (longer * p0 * np.exp((exponent - 1) * each[..., :t].sum(axis=2))).sum(axis=1)
        np.testing.assert_allclose(found[:, t], np.log((longer * p0 * likelihood).sum(axis=1) / twist), atol=0.06)


@pytest.mark.parametrize("backend", ["ngram", "torch"], indirect=True)
@pytest.mark.parametrize("proposal", ["prior", "colder"])
def test_the_draws_are_those_of_a_twist_that_scores_every_prefix(backend: str, proposal: str) -> None:
    posterior = posterior_of(bk.Power(3.0), prior_on(backend, PRIOR))
    twist = bk.Power(3.0).twist().fit(posterior, seed=0)

    def scored(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return twist(posterior, prompt_index, prefixes)

    lm = None if proposal == "prior" else prior_on(backend, colder(PRIOR, 3.0))
    fast, slow = (bk.SMC(64, proposal=lm, twist=each).run(posterior, seed=4) for each in (twist, scored))
    np.testing.assert_array_equal(fast.tokens, slow.tokens)
    np.testing.assert_allclose(fast.log_weights, slow.log_weights, atol=1e-4)


def test_runs_in_threads_and_on_other_prompts_leave_no_trace() -> None:
    posterior = posterior_of(bk.Power(3.0))
    other = posterior_of(bk.Power(3.0), prompts=[PROMPTS[1]])
    twist = bk.Power(3.0).twist().fit(posterior, seed=0)

    def run(seed: int) -> bk.Draws:
        return bk.SMC(32, proposal="twisted", twist=twist).run((posterior, other)[seed % 2], seed=seed)

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(8)))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.log_weights, b.log_weights)


@pytest.mark.parametrize("proposal", ["twisted", "colder"])
def test_every_token_is_read_once_however_long_completions_are(proposal: str) -> None:
    """With distinct prefixes a particle's tokens go through the prior once in decoding, and once more for its likelihood."""
    for num_tokens in (10, 40):
        prior = Counting(without_eos())
        posterior = posterior_of(bk.Power(1.5), prior, max_new_tokens=num_tokens)
        twist = bk.Power(1.5).twist().fit(posterior, seed=0)
        read, scored = prior.appended, prior.scored
        smc = bk.SMC(16, proposal=proposal if proposal == "twisted" else colder(prior, 1.5), twist=twist)
        draws = smc.run(posterior, seed=0)
        num = draws.lengths.size * num_tokens
        assert prior.appended - read <= num
        assert prior.scored - scored == num
        assert draws.cost.model_tokens <= 2 * num + 4


def test_what_the_prior_cannot_draw_stays_impossible() -> None:
    with np.errstate(divide="ignore"):
        prior = bk.NgramLM(np.log([0.3, 0.3, 0.0, 0.4]), eos_token_id=3)
    for exponent in (0.0, 0.5, 1.0, 2.0):
        posterior = posterior_of(bk.Power(exponent), prior, prompts=[0])
        assert np.isneginf(posterior.reward([[2, 3]])).all()
        assert np.isfinite(posterior.reward([[1, 3]])).all()
        twisted = bk.SMC(200, proposal="twisted", twist=bk.Power(exponent).twist()).run(posterior, seed=0)
        exact = bk.Exact().run(posterior, seed=0)
        np.testing.assert_allclose(twisted.log_evidence, exact.log_evidence, atol=0.4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, "2", None, True])
def test_the_exponent_is_finite(wrong: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"exponent must be a finite number; got"):
        bk.Power(wrong)


def test_alpha_and_pilot_are_checked() -> None:
    with pytest.raises(bk.BayesKLRLError, match="alpha must be a positive"):
        bk.Power(2.0, alpha=0.0)
    with pytest.raises(bk.BayesKLRLError, match="num_pilot"):
        bk.Power(2.0).twist(num_pilot=0)
    with pytest.raises(bk.CheckpointError, match="proposal of the twist's pilot has 4 tokens and EOS"):
        bk.Power(2.0).twist(proposal=without_eos()).fit(posterior_of(bk.Power(2.0)), seed=0)


def test_a_twist_is_of_its_prompts() -> None:
    twist = bk.Power(2.0).twist().fit(posterior_of(bk.Power(2.0)), seed=0)
    with pytest.raises(bk.BayesKLRLError, match="fitted on other prompts"):
        twist(posterior_of(bk.Power(2.0), prompts=[[2]]), np.zeros(1, dtype=np.int64), np.zeros((1, 0), dtype=np.int64))


def test_the_default_bounds_allow_rejection() -> None:
    posterior = random_posterior(3)
    sharp = bk.Posterior(posterior.prior, bk.Power(1.5), max_new_tokens=3)
    assert sharp.likelihood.bounds == (-np.inf, 0.0)
    assert bk.RejectionSampling(50).run(sharp, seed=0).shape == (1, 50)
    assert bk.Power(0.5).bounds is None
