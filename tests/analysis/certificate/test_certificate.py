"""Certificates against enumerated truth: intervals hold as often as promised, and what cannot be bounded is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.analysis.certificate.coverage import coverage
from bayes_klrl.inference.exact.exact_draws import exact_draws
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.inference.smc.evidence_bounds import (
    evidence_lower_bound,
    evidence_upper_bound,
    mean_lower_bound,
    mean_upper_bound,
)
from tests.helpers.backends import on, precision
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior

DELTA = 0.05


def both_kls(truth: Truth, policy: bk.LanguageModel) -> tuple[np.ndarray, np.ndarray]:
    """KL(q || p*) and KL(p* || q) of each prompt, by enumeration."""
    as_prior = bk.Posterior(
        policy,
        truth.posterior.likelihood,
        prompts=[list(ids) for ids in truth.posterior.prompt_ids],
        max_new_tokens=truth.posterior.max_new_tokens,
    )
    log_q = as_prior.log_prior(truth.sequences)
    reverse = (np.exp(log_q) * (log_q - truth.log_posterior)).sum(axis=1)
    return reverse, (truth.p * (truth.log_posterior - log_q)).sum(axis=1)


def good_policy(truth: Truth, seed: int) -> bk.NgramLM:
    """The posterior with some noise in its logits."""
    policy = truth.policy()
    return full_table(policy, policy.order, noise=0.3, seed=seed)


def dropping_policy(truth: Truth) -> bk.NgramLM:
    """The posterior with its first token's likeliest value all but gone: a lost mode."""
    policy = truth.policy()
    table = policy.log_probs.copy()
    for ids in truth.posterior.prompt_ids:
        context = tuple([truth.posterior.pad_token] * policy.order + list(ids))[-(policy.order - 1) :]
        row = table[context]
        row[row.argmax()] -= 9.0
        table[context] = row - np.log(np.exp(row).sum())
    return bk.NgramLM(table, eos_token_id=policy.eos_token_ids)


class LookedUp:
    """The optimal twist by enumeration, one token ahead as well."""

    def __init__(self, truth: Truth) -> None:
        self.truth, self.look_up = truth, truth.twist()

    def __call__(self, posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return np.asarray(self.look_up(posterior, prompt_index, prefixes))

    def next_log_psi(
        self, posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray, prior_rows: Any = None
    ) -> np.ndarray:
        vocab_size, t = posterior.prior.vocab_size, prefixes.shape[1] + 1
        longer = np.concatenate(
            [np.repeat(prefixes, vocab_size, axis=0), np.tile(np.arange(vocab_size), len(prefixes))[:, None]], axis=1
        )
        index = np.repeat(prompt_index, vocab_size)
        ended = np.isin(longer[:, -1], list(posterior.prior.eos_token_ids)) | (t == posterior.max_new_tokens)
        result = np.empty(len(longer))
        result[~ended] = self(posterior, index[~ended], longer[~ended])
        padded = np.full((int(ended.sum()), posterior.max_new_tokens), posterior.pad_token)
        padded[:, :t] = longer[ended]
        reward = posterior.reward_of_rows(padded, np.full(len(padded), t), index[ended])
        result[ended] = posterior.likelihood.log_likelihood(reward)
        return result.reshape(len(prefixes), vocab_size)


def contains(interval: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (interval[:, 0] <= values) & (values <= interval[:, 1])


# Bounds


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.5])
def test_the_bounds_fail_no_more_often_than_said_and_bite(spread: float) -> None:
    """Log-normal estimates of mean 1, and their inverses; a failure rate of delta is within what 4000 trials can show."""
    rng = np.random.default_rng(0)
    log_lower = rng.normal(-(spread**2) / 2, spread, (4000, 12))
    lower, upper = evidence_lower_bound(log_lower, DELTA), evidence_upper_bound(-log_lower, DELTA)
    assert np.allclose(lower, -upper)
    assert (lower > 0).mean() <= DELTA
    assert (
        lower.mean() > -np.log(2 / DELTA) / 12 - 0.7 * spread**2
    )  # no worse than the product of the estimates by much
    raised = log_lower + 0.3 + np.log(2 / DELTA) / 12 + spread**2  # estimates of a larger Z do rule out Z = 1
    assert (evidence_lower_bound(raised, DELTA) > 0).mean() > 0.3


def test_a_bet_of_discrete_estimates_fails_as_often_as_it_may() -> None:
    """The sharpest case: Z-hat is 0 or 2, M = 1. Betting everything wins twice the stake half of the time, never 1 / delta."""
    estimates = np.array([[-np.inf], [np.log(2.0)]])
    assert (evidence_lower_bound(estimates, DELTA) < 0).all()
    assert evidence_lower_bound(estimates, DELTA)[0] == -np.inf


def test_runs_that_died_do_not_end_the_bound() -> None:
    estimates = np.where(np.arange(40) % 2 == 0, np.log(2.0), -np.inf)[None]
    bound = float(evidence_lower_bound(estimates, DELTA)[0])
    assert -1.0 < bound < 0.0


def test_the_bound_on_the_mean_gains_from_prompts() -> None:
    estimates = np.tile(np.array([[1.0], [3.0], [5.0], [7.0]]), (1, 10))
    assert 4 - np.log(2 / DELTA) / 40 - 1e-9 <= mean_lower_bound(estimates, DELTA) < 4
    assert mean_lower_bound(estimates, DELTA) > evidence_lower_bound(estimates, DELTA).mean()
    assert 4 < mean_upper_bound(estimates, DELTA) <= 4 + np.log(2 / DELTA) / 40 + 1e-9


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0])
def test_a_bound_needs_a_probability_and_estimates(delta: float) -> None:
    with pytest.raises(bk.BayesKLRLError, match="probability of failure"):
        evidence_lower_bound(np.zeros((1, 3)), delta)
    with pytest.raises(bk.BayesKLRLError, match="at least one run"):
        evidence_lower_bound(np.zeros((1, 0)), DELTA)
    with pytest.raises(bk.BayesKLRLError, match="finite"):
        evidence_lower_bound(np.array([[np.nan]]), DELTA)


# Certificates


def test_enumerated_certificates_are_exact(backend: str) -> None:
    for seed in range(5):
        truth = Truth(on(backend, random_posterior(seed, prompts=((0,), (1,)), num_tokens=4)))
        policy = good_policy(truth, seed)
        certificate = bk.certify(truth.posterior, policy, seed=seed)
        reverse, forward = both_kls(truth, policy)
        assert certificate.grade == "A"
        assert certificate.failure_probability == 0
        for interval, values in ((certificate.reverse_kl, reverse), (certificate.forward_kl, forward)):
            assert contains(interval, values).all()
            assert np.ptp(interval, axis=1).max() < 2.01 * precision(backend, 1e-9)
        assert contains(certificate.log_evidence_bounds, truth.log_evidence).all()
        assert contains(certificate.elbo, truth.log_evidence - reverse).all()
        assert certificate.pooled.reverse_kl[0] <= reverse.mean() <= certificate.pooled["reverse_kl"][1]


@pytest.mark.slow
def test_sampled_certificates_hold_as_often_as_promised() -> None:
    """40 random problems x 3 policies, with the oracle twist: both KLs, all in one, fail with probability <= delta each."""
    widths, held, exposed = [], [], []
    for seed in range(40):
        truth = Truth(random_posterior(seed, prompts=((0,),), num_tokens=4))
        dropped = dropping_policy(truth)
        for policy in (good_policy(truth, seed), dropped, truth.posterior.prior):
            certificate = bk.certify(
                truth.posterior,
                policy,
                seed=seed,
                twist=LookedUp(truth),
                num_draws=512,
                num_runs=40,
                num_particles=16,
                sampling_only=True,
            )
            reverse, forward = both_kls(truth, policy)
            held.append(
                contains(certificate.reverse_kl, reverse)[0]
                and contains(certificate.forward_kl, forward)[0]
                and contains(certificate.log_evidence_bounds, truth.log_evidence)[0]
            )
            widths.append(np.ptp(certificate.reverse_kl[0]))
            if policy is dropped:
                exposed.append(certificate.forward_kl[0, 0])
    assert np.mean(held) >= 1 - DELTA
    assert np.median(widths) <= 0.3
    assert np.min(exposed) > 0.5  # nats, for certain: whoever lost the likeliest first token is told so


@pytest.mark.parametrize("source", ["enumeration", "rejection"])
def test_what_is_called_exact_draws_follows_the_posterior(backend: str, source: str) -> None:
    """What conditional SMC retains: weighted or SMC draws that were resampled would not pass."""
    base = on(backend, random_posterior(1, prompts=((0,),), num_tokens=4))
    assert isinstance(base.likelihood, bk.TokenReward)
    likelihood = bk.TokenReward(base.likelihood.fn, alpha=1.0, bounds=(-2, 2))
    posterior = bk.Posterior(base.prior, likelihood, prompts=[[0]], max_new_tokens=4)
    truth = Truth(posterior)
    most = {"enumeration": 1000, "rejection": 1}[source]
    found = exact_draws(posterior, 2000, 2000, seed=0, max_sequences=most, max_proposals=10**6)
    assert found.draws is not None
    assert found.source == source
    assert chi_square_p(counts(truth, found.draws.tokens[0]), truth.p[0]) > 0.001
    resampled = bk.SMC(16).run(posterior, seed=0).resample(2000, seed=0)
    assert chi_square_p(counts(truth, resampled.tokens[0]), truth.p[0]) < 1e-6  # the test bites


@pytest.mark.slow
def test_a_sampler_conditioned_on_other_than_exact_draws_would_be_found_out() -> None:
    """The mutant of theory.md 9.1: with prior draws retained as if they were exact, upper ends fall below log Z.

    They then often fall below the lower ends, too, which hold: the certificate says so and drops the upper ends.
    """
    missed = contradicted = 0
    for seed in range(20):
        truth = Truth(random_posterior(seed, prompts=((0,),), num_tokens=4, alpha=0.15))
        posterior = truth.posterior
        wrong = bk.ImportanceSampling(40).run(posterior, seed=seed).sequences
        certificate = bk.certify(
            posterior, posterior.prior, seed=seed, exact=wrong, num_runs=40, num_particles=2, sampling_only=True
        )
        missed += int(certificate.log_evidence_bounds[0, 1] < truth.log_evidence[0])
        contradicted += int(any("contradict" in note for note in certificate.notes))
        assert certificate.log_evidence_bounds[0, 0] <= truth.log_evidence[0]
    assert missed + contradicted >= 5


def test_a_certificate_by_messages_at_a_length_nobody_can_enumerate() -> None:
    posterior = problems.gold_posterior(max_new_tokens=60)
    messages = backward_messages(posterior)
    prior = posterior.prior
    assert isinstance(prior, bk.NgramLM)
    moments = messages.moments()
    certificate = bk.certify(posterior, prior, seed=0)
    assert certificate.grade == "A"
    assert "messages" in certificate.evidence_source
    assert np.allclose(certificate.log_evidence_bounds, messages.log_evidence[:, None])
    # the same sum in another order differs in its last digits, and must not fall outside
    assert contains(certificate.log_evidence_bounds, messages.log_evidence * (1 + 1e-13)).all()
    assert contains(certificate.log_evidence_bounds, messages.log_evidence * (1 - 1e-13)).all()
    assert contains(certificate.reverse_kl, moments.kl_from_prior).all()
    assert contains(certificate.forward_kl, moments.kl).all()
    perfect = bk.certify(posterior, messages.policy(), seed=0)
    assert perfect.reverse_kl[0, 1] < 1e-6
    assert perfect.forward_kl[0, 1] < 1e-6
    never_enumerated = bk.certify(posterior, prior, seed=0, max_sequences=0)
    assert np.array_equal(never_enumerated.forward_kl, certificate.forward_kl)
    sampled = bk.certify(posterior, prior, seed=0, twist=messages.twist(), sampling_only=True)
    assert contains(sampled.log_evidence_bounds, messages.log_evidence).all()
    assert np.ptp(sampled.log_evidence_bounds) < 1.0


@pytest.mark.slow
def test_implied_alpha_and_frontier_gap_are_pythagoras(backend: str) -> None:
    """The posterior at another alpha lies on the frontier, at that alpha; one with noise in it pays what enumeration says."""
    truth = Truth(on(backend, random_posterior(1, prompts=((0,),), alpha=0.5, num_tokens=4)))
    other = Truth(on(backend, random_posterior(1, prompts=((0,),), alpha=0.9, num_tokens=4)))
    certificate = bk.certify(truth.posterior, other.policy(), seed=0, num_draws=20_000, sampling_only=True)
    assert abs(certificate.implied_alpha - 0.9) < 0.05
    assert certificate.implied_alpha_interval[0] < 0.9 < certificate.implied_alpha_interval[1]
    of_prior = bk.certify(truth.posterior, truth.posterior.prior, seed=0, sampling_only=True)
    assert np.isposinf(of_prior.implied_alpha_interval[1])
    assert "the reward may be the prior's own" in str(of_prior)
    assert abs(certificate.frontier_gap) < 4 * certificate.frontier_gap_se
    assert "no more KL" in certificate.verdict
    noisy = good_policy(other, 0)
    paid = bk.certify(truth.posterior, noisy, seed=0, num_draws=20_000, sampling_only=True)
    at_implied = Truth(on(backend, random_posterior(1, prompts=((0,),), alpha=paid.implied_alpha, num_tokens=4)))
    assert abs(paid.frontier_gap - both_kls(at_implied, noisy)[0][0]) < 4 * paid.frontier_gap_se


@pytest.mark.parametrize("seed", range(4))
def test_by_enumeration_the_frontier_gap_is_exact_and_no_more_than_the_distance(seed: int) -> None:
    """The gap is the KL to the nearest posterior on the path, so that no draws of the prior may make it larger than KL(q||p*).

    32 draws of the prior used to: the verdict then said two things of which one was impossible.
    """
    truth = Truth(random_posterior(seed, prompts=((0,), (1,)), alpha=0.3, num_tokens=4))
    policy = good_policy(truth, seed)
    certificate = bk.certify(truth.posterior, policy, seed=0, num_draws=32)
    nearest = Truth(random_posterior(seed, prompts=((0,), (1,)), alpha=certificate.implied_alpha, num_tokens=4))
    assert abs(certificate.frontier_gap - np.mean(both_kls(nearest, policy)[0])) < 1e-9
    assert certificate.frontier_gap <= certificate.pooled.reverse_kl[1] + 1e-9
    assert certificate.frontier_gap_se == 0
    elbo = certificate.reward / truth.posterior.alpha - certificate.kl_prior
    assert abs(elbo - certificate.pooled.elbo.mean()) < 1e-6


def test_coverage_names_the_dropped_mode(backend: str) -> None:
    truth = Truth(on(backend, random_posterior(2, prompts=((0,),), num_tokens=4)))
    policy = dropping_policy(truth)
    certificate = bk.certify(truth.posterior, policy, seed=0, feature=lambda tokens, lengths: tokens[:, 0])
    assert certificate.coverage is not None
    first = truth.sequences.tokens[0, :, 0]
    likeliest = int(np.bincount(first, weights=truth.p[0]).argmax())
    assert certificate.coverage.dropped == (likeliest,)
    assert "but misses what the posterior has" in certificate.verdict
    assert "dropped" in str(certificate)
    honest = bk.certify(truth.posterior, truth.policy(), seed=0, feature=lambda tokens, lengths: tokens[:, 0])
    assert honest.coverage is not None
    assert honest.coverage.dropped == ()
    exact = np.bincount(first, weights=truth.p[0], minlength=4)
    for cell, mass, error in zip(honest.coverage.cells, honest.coverage.policy, honest.coverage.policy_se, strict=True):
        assert abs(mass - exact[cell]) < 4 * error


def test_coverage_weighs_the_posteriors_draws() -> None:
    """Every completion once, with its posterior weight: masses are the enumerated ones, not shares of completions."""
    truth = Truth(random_posterior(2, prompts=((0,), (1,)), num_tokens=4))
    draws = bk.ImportanceSampling(50).run(truth.posterior, seed=0)
    everything = bk.Exact().run(truth.posterior, seed=0)
    found = coverage(lambda tokens, lengths: tokens[:, 0], draws, everything, "all of them")
    first, of_draws = truth.sequences.tokens[..., 0], draws.tokens[..., 0]
    exact = np.array([(truth.p * (first == cell)).sum(axis=1).mean() for cell in found.cells])
    np.testing.assert_allclose(found.posterior, exact, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.policy, [(of_draws == cell).mean() for cell in found.cells], rtol=0, atol=1e-12)
    assert (np.diff(exact) <= 0).all()


def unbounded(posterior: bk.Posterior) -> bk.Posterior:
    """The same posterior, too long to enumerate and with no declared bounds: nothing exact can be had."""
    likelihood = posterior.likelihood
    assert isinstance(likelihood, bk.TokenReward)
    return bk.Posterior(
        posterior.prior, bk.TokenReward(likelihood.fn, alpha=likelihood.alpha), prompts=[[0]], max_new_tokens=12
    )


def test_without_exact_draws_upper_ends_are_open_and_the_grade_is_b(backend: str, tmp_path: Path) -> None:
    posterior = unbounded(on(backend, random_posterior(0)))
    certificate = bk.certify(posterior, posterior.prior, seed=0)
    assert certificate.grade == "B"
    assert np.isposinf(certificate.log_evidence_bounds[:, 1]).all()
    assert np.isposinf(certificate.reverse_kl[:, 1]).all()
    assert np.isposinf(certificate.forward_kl[:, 1]).all()
    assert np.isfinite(certificate.reverse_kl[:, 0]).all()
    assert any("declares no upper bound" in note for note in certificate.notes)
    assert "at least" in certificate.verdict
    assert "lower bound only, nats" in str(certificate)
    assert certificate.plot(tmp_path / "open.png").stat().st_size > 1000


def test_rejection_gives_what_the_upper_bound_needs_or_says_that_it_did_not() -> None:
    base = random_posterior(0)
    assert isinstance(base.likelihood, bk.TokenReward)
    likelihood = bk.TokenReward(base.likelihood.fn, alpha=2.0, bounds=(-9, 9))
    posterior = bk.Posterior(base.prior, likelihood, prompts=[[0]], max_new_tokens=12)
    certificate = bk.certify(posterior, posterior.prior, seed=0, max_proposals=100_000)
    assert certificate.grade == "A"
    assert "rejection" in certificate.evidence_source
    assert "two-sided bounds, nats" in str(certificate)
    assert np.isfinite(certificate.log_evidence_bounds).all()
    sharp = bk.Posterior(
        base.prior, bk.TokenReward(base.likelihood.fn, alpha=0.1, bounds=(-9, 90)), prompts=[[0]], max_new_tokens=12
    )
    starved = bk.certify(sharp, sharp.prior, seed=0, max_proposals=50)
    assert starved.grade == "B"
    assert any("max_proposals" in note for note in starved.notes)


def test_a_policy_that_leaves_the_posteriors_support_is_infinitely_far() -> None:
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    no_twos = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens == 2).any(axis=1), -np.inf, 0.0), alpha=1.0, bounds=(-np.inf, 0.0)
    )
    posterior = bk.Posterior(prior, no_twos, max_new_tokens=5)
    for options in ({}, {"sampling_only": True}):
        certificate = bk.certify(posterior, prior, seed=0, **options)  # type: ignore[arg-type]
        assert np.isposinf(certificate.reverse_kl).all()
        assert np.isfinite(certificate.forward_kl[:, 1]).all()
        assert "infinitely far" in certificate.verdict
        assert np.isnan(certificate.implied_alpha)


def test_a_policy_without_full_support_gets_no_upper_end_in_the_forward_direction() -> None:
    posterior = problems.gold_posterior()
    with np.errstate(divide="ignore"):
        table = np.log(np.where(np.arange(4) == 0, 0.0, np.exp(problems.gold_table(-0.5))))
    table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
    policy = bk.NgramLM(table, eos_token_id=3)
    exact = bk.certify(posterior, policy, seed=0)
    assert np.isposinf(exact.forward_kl).all()
    assert np.isfinite(exact.reverse_kl).all()
    sampled = bk.certify(posterior, policy, seed=0, sampling_only=True)
    assert np.isposinf(sampled.forward_kl[:, 1]).all()
    assert contains(sampled.reverse_kl, exact.reverse_kl.mean(axis=1)).all()


def test_the_same_seed_gives_the_same_certificate(backend: str) -> None:
    posterior = on(backend, random_posterior(0, prompts=((0,),), num_tokens=4))
    first, second, other = (bk.certify(posterior, posterior.prior, seed=seed, sampling_only=True) for seed in (0, 0, 1))
    assert np.array_equal(first.reverse_kl, second.reverse_kl)
    assert not np.array_equal(first.reverse_kl, other.reverse_kl)


@pytest.mark.slow
def test_table_and_text_show_every_prompt(tmp_path: Path) -> None:
    posterior = random_posterior(0, prompts=((0,), (1,)), num_tokens=3)
    certificate = bk.certify(posterior, posterior.prior, seed=0, feature=lambda tokens, lengths: lengths)
    table = certificate.table()
    assert list(table.index) == ["ids 0", "ids 1", "mean"]
    assert np.allclose(table.loc["mean", "reverse_kl_low"], certificate.pooled.reverse_kl[0])
    text = str(certificate)
    assert text.startswith(certificate.verdict)
    assert "    ids 0  " in text
    assert "\nexact (means over 2 prompts), nats\n" in text
    assert "grade" not in text.lower()
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120
    assert certificate.plot(tmp_path / "certificate.png").stat().st_size > 1000


@pytest.mark.parametrize("sampling_only", [False, True])
def test_the_priors_own_distance_stands_beside_the_policys(sampling_only: bool) -> None:
    """A policy that has learned nothing is as far as the prior, and the prior's distance is that of enumeration."""
    lm = bk.NgramLM(np.log([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]), eos_token_id=2)
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 0).sum(axis=1) * 1.0, alpha=0.7, bounds=(0, 3))
    posterior = bk.Posterior(lm, reward, prompts=[[0], [1]], max_new_tokens=3)
    everything = bk.Exact().run(posterior, seed=0)
    elbo = (np.exp(everything.log_prior) * everything.log_likelihood).sum(axis=1)
    truth = float((everything.log_evidence - elbo).mean())
    found = bk.certify(posterior, lm, seed=0, sampling_only=sampling_only)
    assert found.prior_kl[0] - 1e-9 <= truth <= found.prior_kl[1] + 1e-9
    if not sampling_only:
        np.testing.assert_allclose(found.prior_kl, found.pooled.reverse_kl, atol=1e-6)
    assert "of a policy that has learned nothing" in str(found)
