"""Infinite distances that no draw shows, contradictory bounds, and draws of another posterior, against enumerated truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.certificate.evidence import Evidence
from bayes_klrl.analysis.certificate.intervals import kl_intervals
from bayes_klrl.analysis.certificate.open_ends import mean_on_support, without_contradiction
from bayes_klrl.draws import Cost
from tests.helpers.truth import random_posterior

PRIOR = bk.NgramLM(np.log([0.3, 0.3, 0.2, 0.2]), eos_token_id=3)
OTHER = bk.NgramLM(np.log([0.4, 0.37, 0.03, 0.2]), eos_token_id=3)
SAMPLED: dict[str, Any] = {"max_sequences": 0, "num_draws": 256, "num_runs": 12, "max_proposals": 100_000}


def four_twos(tokens: np.ndarray) -> np.ndarray:
    """The rare completion that is forbidden: four twos, 8e-7 under OTHER and 1.6e-3 under PRIOR."""
    result: np.ndarray = (tokens[:, :4] == 2).all(axis=1)
    return result


HARD = bk.TokenReward(
    lambda tokens, lengths: np.where(four_twos(tokens), -np.inf, 0.5 * (tokens == 0).sum(axis=1)),
    alpha=1.0,
    bounds=(-np.inf, 2.0),
)


def hard(likelihood: bk.Likelihood = HARD, prior: bk.LanguageModel = PRIOR, **options: Any) -> bk.Posterior:
    return bk.Posterior(prior, likelihood, max_new_tokens=4, **options)


def on_support(posterior: bk.Posterior, policy: bk.LanguageModel) -> np.ndarray:
    """KL(q_A || p*) of each prompt by a loop over all completions."""
    everything = bk.Exact().run(posterior, seed=0)
    log_q = bk.Posterior(policy, HARD, prompts=list(posterior.prompts), max_new_tokens=4).log_prior(everything)
    result = []
    for log_joint, q, log_z in zip(
        everything.log_prior + everything.log_likelihood, log_q, everything.log_evidence, strict=True
    ):
        inside = np.isfinite(log_joint) & np.isfinite(q)
        mass = np.exp(q[inside]).sum()
        result.append((np.exp(q[inside]) / mass * (q[inside] - np.log(mass) - log_joint[inside] + log_z)).sum())
    return np.array(result)


def test_what_the_policy_hardly_ever_draws_makes_the_distance_infinite_all_the_same(tmp_path: Path) -> None:
    """The truth is inf, and 256 draws never show it: no certificate may have a finite upper end; the KL without is bounded."""
    posterior = hard()
    exact = bk.certify(posterior, OTHER, seed=0)
    assert np.isposinf(exact.reverse_kl).all()
    truth = on_support(posterior, OTHER)
    assert np.allclose(exact.reverse_kl_on_support, truth[:, None], atol=1e-8)
    assert "infinitely far" in exact.verdict
    held = 0
    for seed in range(25):
        certificate = bk.certify(posterior, OTHER, seed=seed, **SAMPLED)
        assert certificate.grade == "A"
        assert np.isposinf(certificate.reverse_kl[:, 1]).all()
        assert np.isposinf(certificate.pooled.reverse_kl[1])
        low, high = certificate.reverse_kl_on_support[0]
        held += int(low <= truth[0] <= high)
        assert high < 1.5
    assert held >= 24  # of 25, at a failure probability of 0.05
    assert "not counting what the posterior excludes" in certificate.verdict
    assert any("below 0.012 (at 95 %)" in note and "drawn again, the KL is in" in note for note in certificate.notes)
    assert "on posterior's support" in str(certificate)
    two = bk.certify(hard(prompts=[[0], [1]]), OTHER, seed=0, **SAMPLED)
    assert str(two).count("] or inf ") == 2  # by prompt
    assert two.plot(tmp_path / "open.png").stat().st_size > 1000
    table = certificate.table()
    assert np.isfinite(table["reverse_kl_on_support_high"]).all()
    assert np.isposinf(table["reverse_kl_high"]).all()


def test_a_constraint_and_zeros_of_the_prior_exclude_as_well() -> None:
    soft = bk.TokenReward(lambda tokens, lengths: 0.5 * (tokens == 0).sum(axis=1), alpha=1.0, bounds=(0.0, 2.0))
    never = bk.AutomatonConstraint(bk.Automaton.forbids([2, 2, 2, 2], vocab_size=4))
    with np.errstate(divide="ignore"):
        zeros = bk.NgramLM(np.log([0.4, 0.4, 0.0, 0.2]), eos_token_id=3)
    for posterior in (hard(soft * never), hard(soft, zeros), hard(never)):
        rare = bk.NgramLM(np.log([0.4, 0.3999, 0.0001, 0.2]), eos_token_id=3)
        exact = bk.certify(posterior, rare, seed=0)
        assert np.isposinf(exact.reverse_kl).all()
        for seed in range(3):
            found = bk.certify(posterior, rare, seed=seed, sampling_only=True, num_draws=64)
            assert np.isposinf(found.reverse_kl[:, 1]).all()
            assert np.isfinite(found.reverse_kl_on_support).all()


def test_where_nothing_can_be_excluded_upper_ends_stay_finite() -> None:
    """Declared finite bounds, and p0 to a power, exclude nothing: an open end there would be no information."""
    soft = bk.TokenReward(lambda tokens, lengths: 0.5 * (tokens == 0).sum(axis=1), alpha=1.0, bounds=(0.0, 2.0))
    for likelihood in (soft, bk.Power(1.5)):
        found = bk.certify(hard(likelihood), OTHER, seed=0, **SAMPLED)
        assert np.isfinite(found.reverse_kl).all()
        assert np.array_equal(found.reverse_kl, found.reverse_kl_on_support)
        assert not any("policy||posterior" in note for note in found.notes)


def test_a_policy_with_zeros_is_asked_about_what_the_prior_drew() -> None:
    """One that never draws a two obeys the rule; one that lacks another token does not, and 64 draws do not tell."""
    no_twos = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens == 2).any(axis=1), -np.inf, 0.5 * (tokens == 0).any(axis=1)),
        alpha=1.0,
        bounds=(-np.inf, 0.5),
    )
    with np.errstate(divide="ignore"):
        obeys = bk.NgramLM(np.log([0.4, 0.4, 0.0, 0.2]), eos_token_id=3)
        does_not = bk.NgramLM(np.log([0.8, 0.0, 1e-5, 0.2 - 1e-5]), eos_token_id=3)
    posterior = hard(no_twos)
    truth = float(bk.certify(posterior, obeys, seed=0).reverse_kl.mean())
    held = 0
    for seed in range(10):
        found = bk.certify(posterior, obeys, seed=seed, **SAMPLED)
        held += int(found.reverse_kl[0, 0] <= truth <= found.reverse_kl[0, 1])
        assert np.isfinite(found.reverse_kl).all()
        assert any("would be infinite if" in note for note in found.notes)
        broken = bk.certify(posterior, does_not, seed=seed, **SAMPLED)
        assert np.isposinf(broken.reverse_kl[:, 1]).all()
        assert any("is infinite" in note for note in broken.notes)
    assert held >= 9


def test_a_policy_that_drew_what_is_excluded_is_bounded_without_it() -> None:
    """As the eps-relaxation trains: a few draws break the rule, so the KL is infinite; the others are worth a number."""
    posterior = hard()
    breaks = bk.NgramLM(np.log([0.2, 0.1, 0.5, 0.2]), eos_token_id=3)
    truth = on_support(posterior, breaks)[0]
    held = 0
    for seed in range(20):
        found = bk.certify(posterior, breaks, seed=seed, **SAMPLED)
        assert np.isposinf(found.reverse_kl).all()
        held += int(found.reverse_kl_on_support[0, 0] <= truth <= found.reverse_kl_on_support[0, 1])
    assert held >= 19
    assert "infinitely far" in found.verdict
    assert "without that" in found.verdict
    assert any("of its draws are excluded" in note for note in found.notes)


@pytest.mark.parametrize("share", [1.0, 0.999, 0.9, 0.3])
def test_the_mean_on_the_support_holds_as_often_as_promised(share: float) -> None:
    """E_qA[log w] + log q(A) with log w ~ N(0, 1) in A, for two prompts of which only the first may have draws outside."""
    rng, missed, missed_mean, trials = np.random.default_rng(1), 0, 0, 1000
    for _ in range(trials):
        log_weights = rng.normal(size=(2, 60))
        log_weights[0, rng.random(60) >= share] = -np.inf
        each, mean = mean_on_support(log_weights, np.array([True, False]), 0.1)
        missed += int(not each[0, 0] <= np.log(share) <= each[0, 1])
        missed_mean += int(not mean[0] <= np.log(share) / 2 <= mean[1])
        assert each[1, 0] < each[1, 1]
    limit = trials * 0.1 + 3 * np.sqrt(trials * 0.09)
    assert max(missed, missed_mean) <= limit
    assert np.isneginf(mean_on_support(np.full((1, 40), -np.inf), np.array([True]), 0.1)[0][0, 0])


# Exact draws that are none


def test_bounds_that_contradict_each_other_are_opened_and_said() -> None:
    """Completions of a the prior, vouched for as exact: upper bounds fall below lower ones, which still hold."""
    said = 0
    for seed in range(12):
        posterior = random_posterior(seed, prompts=((0,), (1,)), num_tokens=4, alpha=0.15)
        log_z = bk.Exact().run(posterior, seed=0).log_evidence
        wrong = bk.ImportanceSampling(40).run(posterior, seed=seed).sequences
        found = bk.certify(
            posterior, posterior.prior, seed=seed, exact=wrong, num_particles=2, num_runs=40, sampling_only=True
        )
        low, high = found.log_evidence_bounds.T
        assert (low <= high).all()
        assert found.pooled.log_evidence_bounds[0] <= found.pooled.log_evidence_bounds[1]
        if any("contradict" in note for note in found.notes):
            said += 1
            assert found.grade == "B"
            assert found.exact_draws is None
            assert np.isposinf(high).all()
            assert np.isposinf(found.reverse_kl[:, 1]).all()
            assert (found.forward_kl == [0.0, np.inf]).all()
            assert (low <= log_z).all()
    assert said >= 4


def test_with_draws_of_our_own_only_the_contradictory_prompt_is_opened() -> None:
    elbo, eubo = np.array([[0.0, 0.5], [0.0, 0.5]]), np.array([[2.0, 2.5], [2.0, 2.5]])
    log_z = np.array([[1.4, 1.2], [1.0, 1.5]])
    evidence = Evidence(
        kl_intervals(elbo, log_z, eubo),
        kl_intervals(elbo.mean(axis=0), log_z.mean(axis=0), eubo.mean(axis=0)),
        "A",
        0.05,
        "runs",
        None,
        (),
        Cost(),
    )
    found = without_contradiction(evidence, False)
    assert found.grade == "B"
    assert np.array_equal(found.intervals.log_evidence_bounds, [[1.4, np.inf], [1.0, 1.5]])
    assert np.array_equal(found.intervals.forward_kl, [[0.0, np.inf], [0.5, 1.5]])
    assert np.isposinf(found.pooled.log_evidence_bounds[1])
    assert "for 1 of 2 prompts: at least 1.400 by SMC, at most 1.200 by exact draws" in found.notes[0]
    agreeing = replace(evidence, intervals=kl_intervals(elbo, log_z[1:].repeat(2, axis=0), eubo))
    assert without_contradiction(agreeing, False) is agreeing


def counted(token: int) -> bk.TokenReward:
    return bk.TokenReward(lambda tokens, lengths: (tokens == token).sum(axis=1), alpha=0.5, bounds=(0, 4))


def test_exact_draws_of_another_reward_or_prior_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError("the policy was drawn from first")

    posterior = hard(counted(0))
    other_reward = bk.RejectionSampling(40).run(hard(counted(1)), seed=0)
    other_prior = bk.RejectionSampling(40).run(hard(counted(0), OTHER), seed=0)
    own = bk.RejectionSampling(40).run(posterior, seed=0)
    assert bk.certify(posterior, OTHER, seed=0, exact=own).grade == "A"
    monkeypatch.setattr("bayes_klrl.analysis.certificate.certificate.run_in_blocks", no_work)
    for draws, what in ((other_reward, "reward"), (other_prior, "prior log-prob")):
        message = (
            rf"another posterior: draw \d+ of prompt 0, with ids \[.*\], has the {what} .* this posterior .* bk\.Exact"
        )
        with pytest.raises(bk.BayesKLRLError, match=message):
            bk.certify(posterior, OTHER, seed=0, exact=draws)
        with pytest.raises(bk.BayesKLRLError, match=message):
            bk.ConditionalSMC(bk.SMC(8)).log_evidences(posterior, draws, seed=0)


def test_exact_draws_that_differ_late_are_refused_as_well() -> None:
    """A reward that differs on one rare completion, not among the first eight: all are compared when they are scored."""
    posterior = hard(counted(0))
    draws = bk.RejectionSampling(400).run(posterior, seed=0)
    rare = next(n for n in range(8, 400) if draws.reward[0, n] not in draws.reward[0, :8])
    value = draws.reward[0, rare]
    shifted = bk.TokenReward(
        lambda tokens, lengths: (tokens == 0).sum(axis=1) * ((tokens == 0).sum(axis=1) != value),
        alpha=0.5,
        bounds=(0, 4),
    )
    with pytest.raises(bk.BayesKLRLError, match=f"draw {rare} of prompt 0"):
        bk.certify(hard(shifted), OTHER, seed=0, exact=draws)


@pytest.mark.parametrize("strange", [3, None, 2.5, "ab", [3], [[0.5]]])
def test_completions_that_are_none_are_refused_by_type(strange: Any) -> None:
    posterior = hard(counted(0))
    with pytest.raises(bk.BayesKLRLError, match=r"list of (lists of )?token ids"):
        posterior.log_prior(strange)
    if strange is not None:
        with pytest.raises(bk.BayesKLRLError, match=r"list of (lists of )?token ids"):
            bk.certify(posterior, OTHER, seed=0, exact=strange)


def test_a_constant_reward_has_no_implied_alpha_and_no_draws_would_change_that() -> None:
    flat = bk.TokenReward(
        lambda tokens, lengths: np.where(four_twos(tokens), -np.inf, 0.0), alpha=1.0, bounds=(-np.inf, 0.0)
    )
    with np.errstate(divide="ignore"):
        obeys = bk.NgramLM(np.log([0.5, 0.3, 0.0, 0.2]), eos_token_id=3)
    for options in ({}, SAMPLED):
        found = bk.certify(hard(flat), obeys, seed=0, **options)
        assert np.isnan(found.implied_alpha)
        assert any("the reward is 0 wherever it is finite" in note for note in found.notes)
        assert not any("raw more" in note for note in found.notes)
