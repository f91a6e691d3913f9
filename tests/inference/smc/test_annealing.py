"""Annealed SMC against enumeration: unbiased evidence, the tempered posteriors on its path, schedules, constraints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.smc import annealing as annealing_module
from bayes_klrl.inference.smc.swarm import Swarm, next_powers
from bayes_klrl.randomness import Streams
from tests.export.test_datatree import assert_same
from tests.helpers.backends import crossed, on, precision
from tests.helpers.truth import Truth, chi_square_p, counts, full_table, random_posterior, repeated, z_score

pytestmark = pytest.mark.usefixtures("large_blocks")

NUM_RUNS = 400


def lopsided() -> bk.Posterior:
    return random_posterior(11, num_tokens=4, prompts=((0,),), alpha=0.4, eos_logit=0.5)


OPTIONS: dict[str, dict[str, Any]] = {
    "pilot": {},
    "one step is importance sampling": {"schedule": (1.0,)},
    "fixed": {"schedule": (0.1, 0.3, 0.6, 1.0)},
    "always resampled": {"schedule": (0.2, 0.5, 1.0), "ess_threshold": 1.0, "resampling": "multinomial"},
    "never resampled": {"schedule": (0.2, 0.5, 1.0), "ess_threshold": 0.0, "num_moves": 2},
    "residual, cut anywhere": {"ess_threshold": 0.9, "resampling": "residual", "cut": "max_length", "num_pilot": 16},
    "proposal": {"proposal": full_table(lopsided().prior, 3, noise=0.6, seed=2), "schedule": (0.3, 0.7, 1.0)},
}


@crossed(name=OPTIONS)
def test_evidence_is_unbiased(backend: str, name: str) -> None:
    posterior = on(backend, lopsided())
    truth = Truth(posterior)
    draws = bk.AnnealedSMC(8, **OPTIONS[name]).run(repeated(posterior, NUM_RUNS), seed=1)
    assert abs(z_score(np.exp(draws.log_evidence - truth.log_evidence[0]), 1.0)) < 3
    np.testing.assert_allclose(
        draws.log_evidence, np.log(np.exp(draws.log_weights).mean(axis=1)), rtol=0, atol=precision(backend, 1e-12)
    )
    np.testing.assert_allclose(
        draws.log_evidence, draws.info["path_log_evidence"][:, -1], rtol=0, atol=precision(backend, 1e-12)
    )
    np.testing.assert_allclose(
        draws.log_prior, repeated(posterior, NUM_RUNS).log_prior(draws), rtol=0, atol=precision(backend, 1e-12)
    )
    # any expectation under the weights is unbiased for Z E[f], too: of what the last moves left, here
    for f in (draws.lengths, draws.tokens[..., 0] == 1):
        weighted = (np.exp(draws.log_weights - truth.log_evidence[0]) * f).mean(axis=1)
        of_truth = truth.sequences.lengths[0] if f is draws.lengths else truth.sequences.tokens[0, :, 0] == 1
        assert abs(z_score(weighted, float(truth.p[0] @ of_truth))) < 3


def test_resampling_happens_as_asked() -> None:
    posterior = repeated(lopsided(), 50)
    for threshold, expected in ((0.0, False), (1.0, True)):
        draws = bk.AnnealedSMC(8, schedule=(0.3, 1.0), ess_threshold=threshold).run(posterior, seed=0)
        assert ((draws.ess < draws.info["path_ess"][:, -1] - 1e-9).any()) == expected
        if not expected:  # weights are those of the path alone
            np.testing.assert_allclose(draws.ess, draws.info["path_ess"][:, -1], rtol=1e-9)


def test_with_one_step_it_is_importance_sampling(backend: str) -> None:
    posterior = on(backend, lopsided())
    draws = bk.AnnealedSMC(300, schedule=(1.0,)).run(posterior, seed=3)
    plain = bk.ImportanceSampling(300).run(posterior, seed=3)
    np.testing.assert_allclose(draws.log_weights, plain.log_weights, rtol=0, atol=1e-12)
    np.testing.assert_allclose(draws.log_evidence_se, plain.log_evidence_se, rtol=1e-9)
    assert (draws.tokens != plain.tokens).any()  # the weights are from before the last move


@pytest.mark.slow
def test_draws_of_two_prompts_with_early_ends_follow_their_posteriors() -> None:
    base = random_posterior(31, num_tokens=4, eos_logit=0.7, prompts=((0,), (1,)), prompt_shift=1.0, alpha=0.5)
    many = bk.Posterior(base.prior, base.likelihood, prompts=[[0]] * 800, max_new_tokens=4)
    draws = bk.AnnealedSMC(64).run(many, seed=0).resample(1, seed=1)
    one = Truth(bk.Posterior(base.prior, base.likelihood, prompts=[[0]], max_new_tokens=4))
    assert chi_square_p(counts(one, draws.tokens[:, 0]), one.p[0]) > 0.001
    both = bk.AnnealedSMC(4000).run(base, seed=2)
    truth = Truth(base)
    assert (np.abs(both.log_evidence - truth.log_evidence) < 4 * both.log_evidence_se).all()
    schedule = both.info["schedule"]
    assert schedule.shape[0] == 2
    assert (schedule[0] != schedule[1]).any()  # each prompt has its own


# --- the path ----------------------------------------------------------------------------------------------------


def test_the_path_is_the_frontier() -> None:
    """log Z(s), E[r] and KL(p_s || p0), each with its weights, against the enumerated tempered posteriors."""
    posterior = lopsided()
    truth = Truth(posterior)
    draws = bk.AnnealedSMC(500, schedule=(0.2, 0.5, 1.0)).run(repeated(posterior, 100), seed=4)
    info = draws.info
    np.testing.assert_array_equal(info["schedule"][0], [0.0, 0.2, 0.5, 1.0])
    for j, s in enumerate(info["schedule"][0]):
        joint = np.exp(truth.log_prior[0] + s * truth.reward[0] / posterior.alpha)
        law = joint / joint.sum()
        reward = float(law @ truth.reward[0])
        kl = float(law @ (np.log(law) - truth.log_prior[0]))
        if s > 0:
            assert abs(z_score(np.exp(info["path_log_evidence"][:, j] - np.log(joint.sum())), 1.0)) < 3
            assert info["path_kl"][:, j].mean() == pytest.approx(kl, abs=0.02)
        else:
            np.testing.assert_allclose(info["path_log_evidence"][:, j], 0.0, rtol=0, atol=1e-12)
            np.testing.assert_allclose(info["path_kl"][:, j], 0.0, rtol=0, atol=1e-12)
        spread = info["path_reward"][:, j].std(ddof=1)
        assert spread < 0.1
        assert info["path_reward"][:, j].mean() == pytest.approx(reward, abs=5 * spread / 10 + 0.003)
    assert np.isnan(info["acceptance_rate"][:, 0]).all()
    assert ((0 < info["acceptance_rate"][:, 1:]) & (info["acceptance_rate"][:, 1:] <= 1)).all()


def test_the_pilot_chooses_even_steps() -> None:
    posterior = problems.gold_posterior(alpha=0.25)
    swarm = Swarm(posterior, (posterior.prior, posterior.prior), 4000, Streams.of(0))
    log_likelihood = swarm.log_likelihood[0]

    def share(step: float) -> float:
        v = np.exp(step * log_likelihood)
        return float(v.mean() ** 2 / (v**2).mean())

    (power,) = next_powers(swarm, 0.9)
    assert share(power) == pytest.approx(0.9, abs=1e-6)
    assert next_powers(swarm, 0.9, least=0.5) == [0.5]
    assert next_powers(swarm, 1e-9) == [1.0]
    coarse, fine = (bk.AnnealedSMC(8, conditional_ess=c).run(posterior, seed=0).info["schedule"] for c in (0.5, 0.99))
    assert 2 <= coarse.shape[1] < fine.shape[1]
    for schedule in (coarse, fine):
        assert (schedule[:, 0], schedule[:, -1]) == ([0.0], [1.0])
        assert (np.diff(schedule) > 0).all()


def test_a_schedule_that_would_hardly_end_does(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = problems.gold_posterior(alpha=0.25)
    sampler = bk.AnnealedSMC(16, conditional_ess=0.999)
    assert sampler.run(posterior, seed=0).info["schedule"].shape[1] > 20
    monkeypatch.setattr(annealing_module, "_MOST_STEPS", 5)
    schedule = sampler.run(posterior, seed=0).info["schedule"]
    assert schedule.shape == (1, 6)
    assert schedule[0, -1] == 1.0


def test_the_pilot_has_a_stream_of_its_own() -> None:
    """The schedule that a pilot chose, given, leads to the same particles."""
    posterior = lopsided()
    by_pilot = bk.AnnealedSMC(50).run(posterior, seed=7)
    given = bk.AnnealedSMC(50, schedule=tuple(by_pilot.info["schedule"][0, 1:])).run(posterior, seed=7)
    np.testing.assert_array_equal(by_pilot.tokens, given.tokens)
    np.testing.assert_array_equal(by_pilot.log_weights, given.log_weights)
    assert given.model_tokens < by_pilot.model_tokens


# --- constraints -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_constraints_are_part_of_the_base_measure() -> None:
    def holds(completion_ids: list[list[int]]) -> list[bool]:
        return [ids[0] != 0 and len(ids) > 1 for ids in completion_ids]

    base = lopsided()
    posterior = bk.Posterior(base.prior, base.likelihood * bk.Constraint(holds), prompts=[[0]], max_new_tokens=4)
    truth = Truth(posterior)
    log_mass = np.log(np.exp(truth.log_prior[0])[np.isfinite(truth.reward[0])].sum())
    for options in ({}, {"schedule": (0.4, 1.0), "ess_threshold": 1.0}, {"schedule": (0.4, 1.0), "ess_threshold": 0.0}):
        draws = bk.AnnealedSMC(64, **options).run(repeated(posterior, NUM_RUNS // 2), seed=5)
        assert abs(z_score(np.exp(draws.log_evidence - truth.log_evidence[0]), 1.0)) < 3
        first = draws.info["path_log_evidence"][:, 0]
        assert abs(z_score(np.exp(first - log_mass), 1.0)) < 3
        assert np.isfinite(draws.reward[np.isfinite(draws.log_weights)]).all()
        assert np.isfinite(draws.info["path_reward"]).all()
        np.testing.assert_allclose(draws.info["path_kl"][:, 0], -first, rtol=0, atol=1e-12)
        picked = draws.resample(1, seed=0)
        assert chi_square_p(counts(truth, picked.tokens[:, 0]), truth.p[0]) > 0.001


def test_all_particles_dead_is_an_error_that_carries_them() -> None:
    never = bk.TokenReward(lambda tokens, lengths: np.full(len(tokens), -np.inf), alpha=1.0)
    posterior = bk.Posterior(lopsided().prior, never, prompts=[[0], [1]], max_new_tokens=3)
    with pytest.raises(bk.BudgetError, match="None of the 8 draws of prompt 0") as caught:
        bk.AnnealedSMC(8).run(posterior, seed=0)
    assert caught.value.draws is not None
    assert caught.value.draws.shape == (2, 8)
    assert np.isnan(caught.value.draws.info["path_reward"]).all()


# --- what is recorded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"ess_threshold": 0.0}, {}, {"resampling": "multinomial", "ess_threshold": 0.8}])
def test_standard_error_is_calibrated(options: dict[str, Any]) -> None:
    posterior = repeated(lopsided(), NUM_RUNS)
    draws = bk.AnnealedSMC(100, schedule=(0.1, 0.25, 0.5, 1.0), **options).run(posterior, seed=6)
    spread = draws.log_evidence.std(ddof=1)
    claimed = np.sqrt((draws.log_evidence_se**2).mean())
    assert 0.75 < claimed / spread < 1.25


def test_a_file_holds_the_path(tmp_path: Path) -> None:
    draws = bk.AnnealedSMC(20).run(repeated(lopsided(), 2), seed=0)
    assert_same(draws, bk.Draws.load(draws.save(tmp_path / "annealed.nc")))


def test_options_that_cannot_be() -> None:
    for options, says in (
        ({"schedule": ()}, "increase from above 0 to exactly 1"),
        ({"schedule": (0.5,)}, "increase"),
        ({"schedule": (0.0, 1.0)}, "increase"),
        ({"schedule": (0.5, 0.5, 1.0)}, "increase"),
        ({"schedule": (0.5, np.nan, 1.0)}, "increase"),
        ({"schedule": "pilot"}, "got 'pilot'"),
        ({"schedule": 3}, "got 3"),
        ({"conditional_ess": 1.0}, "between 0 and 1; got 1.0"),
        ({"conditional_ess": -0.1}, "conditional_ess must be a number from 0 to 1"),
        ({"num_moves": 0}, "num_moves must be an integer"),
        ({"num_pilot": 0}, "num_pilot must be an integer"),
        ({"cut": 3}, "Unknown rule for cuts 3"),
        ({"resampling": "best"}, "Unknown resampling"),
    ):
        with pytest.raises(bk.BayesKLRLError, match=says):
            bk.AnnealedSMC(8, **options)
    with pytest.raises(bk.BayesKLRLError, match="num_particles"):
        bk.AnnealedSMC(0)
