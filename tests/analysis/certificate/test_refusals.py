"""What a certificate refuses, and what it says of draws that do not suffice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.analysis.certificate.test_certificate import contains
from tests.helpers.truth import random_posterior

# Bad input

SMALL = random_posterior(0, num_tokens=3)
PRIOR = SMALL.prior


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_draws": 5}, "num_draws must be an integer of at least 32"),
        ({"num_particles": 1}, "num_particles"),
        ({"num_runs": 1}, "num_runs"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"failure_probability": 0.7}, "failure_probability"),
        ({"max_proposals": 0}, "max_proposals"),
        ({"seed": -1}, "seed"),
        ({"twist": np.nan}, "twist"),
        ({"policy": 3}, "The policy must be a language model"),
        ({"policy": "no/such/folder"}, "no folder"),
        ({"policy": bk.SVI(3)}, "fit it first"),
        ({"policy": bk.NgramLM(np.log(np.full((5, 5), 0.2)), eos_token_id=3)}, "share one vocabulary"),
        ({"policy": bk.NgramLM(np.log(np.full((4, 4), 0.25)), eos_token_id=1)}, "share one vocabulary"),
        ({"feature": lambda tokens, lengths: [1]}, "returned 1 labels"),
        ({"feature": lambda tokens, lengths: [[1]] * len(tokens)}, "returned the label"),
        ({"feature": lambda tokens, lengths: tokens[:, 99]}, "failed with IndexError"),
        ({"feature": lambda tokens, lengths: np.random.default_rng(0).random(len(tokens))}, "different values"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    arguments = {"policy": PRIOR, "seed": 0, **options}
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.certify(SMALL, **arguments)


def test_a_folder_that_is_no_policy_and_one_with_another_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match="is not a model"):
        bk.certify(SMALL, tmp_path, seed=0)
    letters = bk.NgramLM.fit(["ab", "ba"], order=2)
    others = bk.NgramLM.fit(["xy", "yx"], order=2)
    posterior = bk.Posterior(
        letters, bk.Reward(lambda texts: [t.count("a") for t in texts], alpha=1.0), max_new_tokens=3
    )
    with pytest.raises(bk.CheckpointError, match="tokenizer is not the prior's"):
        bk.certify(posterior, others, seed=0)
    letters.save_pretrained(tmp_path / "mine")
    assert bk.certify(posterior, tmp_path / "mine", seed=0).grade == "A"


def test_exact_draws_of_ones_own_must_be_possible() -> None:
    impossible = bk.Posterior(
        PRIOR, bk.TokenReward(lambda tokens, lengths: np.where(lengths > 1, 0.0, -np.inf), alpha=1.0), max_new_tokens=3
    )
    with pytest.raises(bk.SupportError, match="posterior probability 0"):
        bk.certify(impossible, PRIOR, seed=0, exact=bk.Sequences.from_lists([[3]], max_new_tokens=3, pad_token=3))


def test_a_mass_that_underflows_makes_the_forward_kl_infinite_all_the_same() -> None:
    """At alpha 0.01 what the policy cannot draw has posterior mass exp(-1000) = 0 in floats; 0 x inf was NaN."""
    table = np.log(np.full((4, 4), 0.25))
    penalty = bk.TokenReward(lambda tokens, lengths: -10.0 * (tokens == 0).any(axis=1), alpha=0.01)
    posterior = bk.Posterior(bk.NgramLM(table, eos_token_id=3), penalty, max_new_tokens=3)
    with np.errstate(divide="ignore"):
        never_0 = bk.NgramLM(np.log(np.tile([0.0, 0.3, 0.3, 0.4], (4, 1))), eos_token_id=3)
    certificate = bk.certify(posterior, never_0, seed=0)
    assert np.isposinf(certificate.forward_kl).all()
    assert np.isfinite(certificate.reverse_kl).all()


def test_zeros_of_a_prior_do_not_excuse_those_of_a_policy() -> None:
    """Neither has full support, and the policy lacks what few exact draws show: 16 of 20 drew none of it."""
    with np.errstate(divide="ignore"):
        prior = bk.NgramLM(np.log([0.3, 0.3, 0.4, 0.0]), eos_token_id=2)
        narrower = bk.NgramLM(np.log([0.0, 0.5, 0.5, 0.0]), eos_token_id=2)
        as_wide = bk.NgramLM(np.log(np.tile([0.1, 0.4, 0.5, 0.0], (4, 1))), eos_token_id=2)
    rare = bk.TokenReward(lambda tokens, lengths: -4.0 * (tokens == 0).any(axis=1), alpha=1.0, bounds=(-4, 0))
    posterior = bk.Posterior(prior, rare, max_new_tokens=3)
    for seed in range(3):
        certificate = bk.certify(posterior, narrower, seed=seed, max_sequences=0, num_draws=64, num_runs=4)
        assert np.isposinf(certificate.forward_kl[:, 1]).all()
        assert any("no upper end" in note for note in certificate.notes)
    for policy in (as_wide, prior):
        assert np.isfinite(bk.certify(posterior, policy, seed=0, max_sequences=0).forward_kl).all()


@pytest.mark.parametrize("method", [bk.SMC(64), bk.SuffixMH(4, 16), bk.BestOfN(4, 16), bk.Exact()])
def test_draws_that_are_not_exact_are_refused_as_exact_ones(method: Any) -> None:
    draws = method.run(SMALL, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="not exact posterior draws"):
        bk.certify(SMALL, PRIOR, seed=0, exact=draws)


def test_exact_draws_of_another_posterior_are_refused() -> None:
    warmer = bk.Exact(40).run(random_posterior(0, num_tokens=3, alpha=5.0), seed=0)
    with pytest.raises(bk.BayesKLRLError, match="another posterior"):
        bk.certify(SMALL, PRIOR, seed=0, exact=warmer)
    assert bk.certify(SMALL, PRIOR, seed=0, exact=bk.Exact(40).run(SMALL, seed=0)).grade == "A"


def test_a_feature_without_any_draw_of_the_posterior_is_a_note() -> None:
    """The prior's draws all missed a constraint that the policy meets: it is no reason to lose the certificate."""
    rare = bk.NgramLM(np.log([0.999, 0.001]), eos_token_id=())
    ones = bk.TokenReward(lambda tokens, lengths: np.where((tokens == 1).all(axis=1), 1.0, -np.inf), alpha=1.0)
    posterior = bk.Posterior(rare, ones, max_new_tokens=6)
    policy = bk.NgramLM(np.log([0.01, 0.99]), eos_token_id=())
    certificate = bk.certify(
        posterior, policy, seed=0, max_sequences=0, num_draws=64, feature=lambda tokens, lengths: tokens[:, 0]
    )
    assert certificate.coverage is None
    assert any("feature" in note for note in certificate.notes)


@pytest.mark.parametrize(
    "feature, message",
    [
        (3, "A feature is a function"),
        (lambda tokens, lengths: [[1]] * len(lengths), r"the label \[1\]"),
        (lambda tokens, lengths: np.where(lengths > 1, np.nan, 1.0), "the label nan"),
        (lambda tokens, lengths: None, "failed with TypeError"),
        (lambda tokens, lengths: 1 / 0, "failed with ZeroDivisionError"),
    ],
)
def test_a_feature_that_is_none_is_refused_before_the_work(
    feature: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: Any) -> None:
        raise AssertionError("the evidence was computed first")

    monkeypatch.setattr("bayes_klrl.analysis.certificate.certificate._evidence", no_work)
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.certify(SMALL, PRIOR, seed=0, feature=feature)


def test_a_certificate_is_against_a_posterior() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"posterior must be a bk\.Posterior"):
        bk.certify(PRIOR, PRIOR, seed=0)  # type: ignore[arg-type]


def test_draws_that_all_weigh_the_same_do_not_pass_for_certainty() -> None:
    """A reward of two levels, the lower one too rare for 64 exact draws: EUBO has no spread, and misses the truth."""
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=())
    won = bk.AutomatonReward(
        bk.Automaton.contains([0], vocab_size=2), final_rewards=[0.0, 1.0], alpha=0.3, bounds=(0.0, 1.0)
    )
    posterior = bk.Posterior(coin, won, max_new_tokens=5)
    truth = bk.certify(posterior, coin, seed=0).forward_kl
    certificate = bk.certify(posterior, coin, seed=0, num_draws=64, max_sequences=0)
    assert np.ptp(certificate.forward_kl) < 1e-8  # what rounding is given, no more
    assert not contains(certificate.forward_kl, truth.mean(axis=1)).any()
    assert any("all 64 exact draws" in note for note in certificate.notes)
    assert not any("policy's draws" in note for note in certificate.notes)
