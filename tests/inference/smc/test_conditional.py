"""Conditional SMC against enumeration: E[Z / Z-hat] = 1, the bounds it gives, and what is no bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.arrays import to_host
from bayes_klrl.inference.smc import runs as runs_module
from bayes_klrl.inference.smc.smc import ConstantTwist
from bayes_klrl.models.decoding import Decoding
from bayes_klrl.resampling import conditional_multinomial
from tests.helpers.backends import crossed, on, precision
from tests.helpers.truth import Truth, chi_square_p, full_table, random_posterior, repeated, z_score

pytestmark = pytest.mark.usefixtures("large_blocks")

NUM_RUNS = 2000


def exact_draws(truth: Truth, num_runs: int, seed: int) -> bk.Sequences:
    """Independent draws of the enumerated posterior, (P, M, T)."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.choice(len(p), size=num_runs, p=p / p.sum()) for p in truth.p])
    rows = np.arange(len(chosen))[:, None]
    return bk.Sequences(truth.sequences.tokens[rows, chosen], truth.sequences.lengths[rows, chosen])


def crude_twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    return 0.8 * (prefixes == 1).sum(axis=1) - 0.3 * prefixes.shape[1] + 2.0 * prompt_index


def two_prompts() -> bk.Posterior:
    return random_posterior(13, num_tokens=4, prompts=((0,), (1, 2)), prompt_shift=0.7, eos_logit=0.7)


OPTIONS: dict[str, dict[str, Any]] = {
    "own constant": {},
    "always resampled, own constant": {"ess_threshold": 1.0},
    "always resampled, crude twist": {"ess_threshold": 1.0, "twist": crude_twist},
    "never resampled": {"ess_threshold": 0.0},
    "proposal": {"twist": crude_twist, "proposal": full_table(two_prompts().prior, 3, noise=0.5, seed=3)},
    "constant": {"twist": 1.5, "ess_threshold": 0.8},
}


@pytest.mark.slow
@crossed(name=OPTIONS, num_particles=[2, 6])
def test_the_inverse_evidence_is_unbiased(backend: str, name: str, num_particles: int) -> None:
    """And E log Z-hat >= log Z, by which the lower bound of plain SMC with the same twist becomes a bracket."""
    posterior = on(backend, two_prompts())
    truth = Truth(posterior)
    smc, _ = bk.SMC(num_particles, **OPTIONS[name]).prepared(posterior, seed=5)
    retained = exact_draws(truth, NUM_RUNS, seed=6)
    upper = bk.ConditionalSMC(smc).log_evidences(posterior, retained, seed=7).log_evidence
    lower = smc.log_evidences(posterior, NUM_RUNS, seed=8).log_evidence
    assert upper.shape == lower.shape == (2, NUM_RUNS)
    for p, log_evidence in enumerate(truth.log_evidence):
        assert abs(z_score(np.exp(log_evidence - upper[p]), 1.0)) < 3
        assert abs(z_score(np.exp(lower[p] - log_evidence), 1.0)) < 3
        assert z_score(upper[p], log_evidence) > 3
        assert z_score(lower[p], log_evidence) < -3
        for delta in (0.5, 0.1):  # Markov: a violation by log(1 / delta) has probability delta at most
            assert (upper[p] + np.log(1 / delta) < log_evidence).mean() <= delta
            assert (lower[p] - np.log(1 / delta) > log_evidence).mean() <= delta


def test_gold_with_early_ends_and_fixed_lengths(backend: str) -> None:
    no_eos = on(backend, random_posterior(5, eos=(), num_tokens=4))
    for posterior in (on(backend, problems.gold_posterior(alpha=0.25)), no_eos):
        truth = Truth(posterior)
        retained = exact_draws(truth, NUM_RUNS, seed=1)
        runs = bk.ConditionalSMC(bk.SMC(8)).log_evidences(posterior, retained, seed=2)
        assert abs(z_score(np.exp(truth.log_evidence[0] - runs.log_evidence[0]), 1.0)) < 3


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [2, 8])
def test_where_particles_may_die_the_inverse_is_short_by_the_probability_that_they_live(num_particles: int) -> None:
    """E[Z / Z-hat] = P(Z-hat > 0) of plain runs, which is at most 1: a bound that says less, and no wrong one."""
    soft = two_prompts()
    odd = bk.TokenReward(lambda tokens, lengths: np.where((tokens == 1).sum(axis=1) % 2, 0.0, -np.inf), alpha=1.0)
    posterior = bk.Posterior(soft.prior, soft.likelihood * odd, prompts=[[0]], max_new_tokens=4)
    truth = Truth(posterior)
    smc = bk.SMC(num_particles, resampling="multinomial", ess_threshold=0.9)
    upper = (
        bk.ConditionalSMC(smc).log_evidences(posterior, exact_draws(truth, NUM_RUNS, seed=6), seed=7).log_evidence[0]
    )
    lives = np.isfinite(smc.log_evidences(posterior, NUM_RUNS, seed=8).log_evidence[0])
    inverse = np.exp(truth.log_evidence[0] - upper)
    assert 0.2 < lives.mean() < 0.99
    assert abs(z_score(inverse - lives, 0.0)) < 3
    assert z_score(inverse, 1.0) < -3


@pytest.mark.slow
def test_the_product_of_runs_gives_the_bounds_that_certificates_use() -> None:
    """mean log Z-hat +- log(1 / delta) / M of M runs: violated in at most a share delta of certificates."""
    posterior = problems.gold_posterior(alpha=0.25)
    truth = Truth(posterior)
    smc, _ = bk.SMC(16).prepared(posterior, seed=0)
    upper = bk.ConditionalSMC(smc).log_evidences(posterior, exact_draws(truth, 4000, seed=1), seed=2).log_evidence
    lower = smc.log_evidences(posterior, 4000, seed=3).log_evidence
    for delta in (0.5, 0.1):
        high = upper.reshape(200, 20).mean(axis=1) + np.log(1 / delta) / 20
        low = lower.reshape(200, 20).mean(axis=1) - np.log(1 / delta) / 20
        assert (high < truth.log_evidence).mean() <= delta
        assert (low > truth.log_evidence).mean() <= delta
        assert (high - low).mean() < 2


@pytest.mark.slow
def test_conditioned_on_the_output_of_smc_it_is_no_bound() -> None:
    """theory.md 3.10: K = 2, particle 0 from a population of 2: log Z-hat falls below log Z on average."""
    base = problems.gold_posterior(alpha=0.25)
    truth = Truth(base)
    many = repeated(base, NUM_RUNS)
    smc = bk.SMC(2, twist=ConstantTwist(np.full(NUM_RUNS, truth.log_evidence[0])), ess_threshold=0.0)
    inexact = smc.run(many, seed=1).resample(1, seed=2)
    wrong = bk.ConditionalSMC(smc).run(many, inexact.sequences, seed=3).log_evidence
    right = bk.ConditionalSMC(smc).run(many, bk.RejectionSampling(1).run(many, seed=4), seed=3).log_evidence
    assert z_score(wrong, truth.log_evidence[0]) < -3
    assert z_score(right, truth.log_evidence[0]) > 3
    assert z_score(np.exp(truth.log_evidence[0] - wrong), 1.0) > 3
    assert abs(z_score(np.exp(truth.log_evidence[0] - right), 1.0)) < 3


def test_with_the_optimal_twist_and_its_proposal_both_bounds_are_exact(backend: str) -> None:
    posterior = on(backend, random_posterior(6, num_tokens=4, prompts=((0,), (1,))))
    truth = Truth(posterior)
    smc = bk.SMC(3, twist=truth.twist(), proposal=truth.policy(), ess_threshold=1.0)
    upper = bk.ConditionalSMC(smc).log_evidences(posterior, exact_draws(truth, 5, seed=0), seed=1).log_evidence
    lower = smc.log_evidences(posterior, 5, seed=1).log_evidence
    for runs in (upper, lower):
        np.testing.assert_allclose(
            runs, np.repeat(truth.log_evidence[:, None], 5, axis=1), rtol=0, atol=precision(backend, 1e-9)
        )


# --- what is retained, and what is recorded --------------------------------------------------------------------


def test_particle_0_is_the_retained_completion_with_the_weight_it_should_have(backend: str) -> None:
    posterior = on(backend, two_prompts())
    retained = exact_draws(Truth(posterior), 1, seed=3)
    proposal = OPTIONS["proposal"]["proposal"]
    for threshold in (0.0, 1.0):
        smc = bk.SMC(6, proposal=proposal, twist=crude_twist, ess_threshold=threshold)
        draws = bk.ConditionalSMC(smc).run(posterior, retained, seed=4)
        np.testing.assert_array_equal(draws.tokens[:, :1], retained.tokens)
        np.testing.assert_array_equal(draws.lengths[:, :1], retained.lengths)
        np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=precision(backend, 1e-12))
        np.testing.assert_array_equal(draws.reward, posterior.reward(draws))
        assert (draws.info["ancestors"][..., 0] == 0).all()
        np.testing.assert_allclose(
            draws.log_evidence, np.log(np.exp(draws.log_weights).mean(axis=1)), rtol=0, atol=precision(backend, 1e-12)
        )
        assert np.isnan(draws.log_evidence_se).all()
    often = bk.ConditionalSMC(bk.SMC(6, proposal=proposal, twist=crude_twist, ess_threshold=1.0))
    for seed in range(5, 15):
        assert (often.run(posterior, retained, seed=seed).info["ancestors"][..., 0] == 0).all()
    # unresampled, all weights are importance weights, the retained one's too
    draws = bk.ConditionalSMC(bk.SMC(6, proposal=proposal, ess_threshold=0.0)).run(posterior, retained, seed=4)
    expected = draws.log_prior + draws.log_likelihood - draws.log_proposal
    np.testing.assert_allclose(draws.log_weights, expected, rtol=0, atol=precision(backend, 1e-12))


@pytest.mark.parametrize("max_rows", [1, 100, 10**6])
def test_runs_are_those_of_as_many_prompts(max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """M runs of one prompt have the law of one run of M prompts, however they are decoded together."""
    posterior = random_posterior(11, num_tokens=4, prompts=((0,), (1,)))
    monkeypatch.setattr(runs_module, "_MAX_ROWS", max_rows)
    truth = Truth(posterior)
    num_runs = 60 if max_rows == 1 else 1000
    smc = bk.SMC(5, ess_threshold=0.9, twist=0.5)
    runs = smc.log_evidences(posterior, num_runs, seed=1)
    for p in range(2):
        assert abs(z_score(np.exp(runs.log_evidence[p] - truth.log_evidence[p]), 1.0)) < 3
    assert runs.cost.model_tokens > 0
    assert np.unique(runs.log_evidence.round(12)).size > num_runs
    # and runs that share a decoding are independent: correlation of neighbours
    centred = np.exp(runs.log_evidence - truth.log_evidence[:, None]) - 1
    neighbours = centred[:, 1:] * centred[:, :-1]
    assert abs(z_score(neighbours.ravel(), 0.0)) < 3


def test_a_prepared_sampler_is_not_prepared_again() -> None:
    posterior = two_prompts()
    smc = bk.SMC(8, proposal="twisted")
    ready, cost = smc.prepared(posterior, seed=0)
    again, nothing = ready.prepared(posterior, seed=1)
    assert cost.model_tokens > 0
    assert nothing.model_tokens == 0
    assert again == ready
    assert again.twist is ready.twist
    direct, prepared = smc.run(posterior, seed=0), ready.run(posterior, seed=0)
    np.testing.assert_array_equal(direct.log_weights, prepared.log_weights)
    assert direct.model_tokens == prepared.model_tokens + cost.model_tokens


def test_one_seed_one_result(backend: str) -> None:
    posterior = on(backend, two_prompts())
    retained = exact_draws(Truth(posterior), 4, seed=0)
    sampler = bk.ConditionalSMC(bk.SMC(8))
    one, same, other = (sampler.log_evidences(posterior, retained, seed=s).log_evidence for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_what_cannot_be_retained() -> None:
    posterior = two_prompts()
    truth = Truth(posterior)
    sampler = bk.ConditionalSMC(bk.SMC(8))
    with pytest.raises(bk.BayesKLRLError, match="retains one completion per prompt; got 3"):
        sampler.run(posterior, exact_draws(truth, 3, seed=0), seed=0)
    inexact = bk.ImportanceSampling(4).run(posterior, seed=0)
    for draws in (inexact, inexact.resample(4, seed=0), bk.Exact().run(posterior, seed=0)):
        with pytest.raises(bk.BayesKLRLError, match=f"Draws of {draws.method}, weighted or resampled, are not exact"):
            sampler.log_evidences(posterior, draws, seed=0)
    sampler.log_evidences(posterior, bk.Exact(num_draws=3).run(posterior, seed=0), seed=0)
    with pytest.raises(bk.BayesKLRLError, match=r"takes a bk.SMC"):
        bk.ConditionalSMC(8)
    with pytest.raises(bk.BayesKLRLError, match="prefix, not an outcome"):
        sampler.run(posterior, bk.Sequences(np.ones((2, 1, 2), dtype=int), np.full((2, 1), 2)), seed=0)
    with pytest.raises(bk.BayesKLRLError, match="num_runs must be an integer"):
        bk.SMC(8).log_evidences(posterior, 0, seed=0)
    impossible = bk.Posterior(
        posterior.prior,
        posterior.likelihood * bk.Constraint(lambda completion_ids: [ids[0] != 0 for ids in completion_ids]),
        prompts=[[0], [1, 2]],
        max_new_tokens=4,
    )
    zeros = bk.Sequences(np.zeros((2, 1, 4), dtype=int), np.full((2, 1), 4))
    with pytest.raises(bk.SupportError, match=r"Retained completion 0 of prompt 0 .* has weight 0"):
        sampler.run(impossible, zeros, seed=0)


# --- its parts -------------------------------------------------------------------------------------------------


def test_conditional_multinomial_keeps_particle_0_and_draws_the_others() -> None:
    weights, rng = np.array([0.1, 0.0, 0.6, 0.3]), np.random.default_rng(0)
    ancestors = np.array([conditional_multinomial(weights, rng) for _ in range(4000)])
    assert (ancestors[:, 0] == 0).all()
    offspring = np.array([np.bincount(row[1:], minlength=4) for row in ancestors])
    assert (offspring[:, 1] == 0).all()
    for n in (0, 2, 3):
        assert abs(z_score(offspring[:, n] * 1.0, 3 * weights[n])) < 3.5
    # independently of one another: an even scheme has these means, too, but not this law, and its bound is none
    outcomes = [(i, j, 3 - i - j) for i in range(4) for j in range(4 - i)]
    law = stats.multinomial.pmf(outcomes, 3, weights[[0, 2, 3]])
    seen = [(offspring[:, [0, 2, 3]] == outcome).all(axis=1).sum() for outcome in outcomes]
    assert chi_square_p(np.array(seen), law) > 0.001
    np.testing.assert_array_equal(conditional_multinomial(np.ones(1), rng), [0])


def test_given_tokens_are_scored_as_drawn_ones(backend: str) -> None:
    posterior = on(backend, two_prompts())
    retained = exact_draws(Truth(posterior), 6, seed=1)
    rng = np.random.default_rng(0)
    models = [OPTIONS["proposal"]["proposal"], posterior.prior]
    loop = Decoding(models, posterior.prompt_ids, 6, 4)
    given = retained.tokens.reshape(12, 4)
    free = np.arange(12) % 3 == 0
    while not loop.done:
        forced = np.where(free, -1, given[:, loop.step_count])
        loop.step(rng.random(12), forced)
    np.testing.assert_array_equal(loop.tokens[~free], given[~free])
    np.testing.assert_array_equal(loop.lengths[~free], retained.lengths.ravel()[~free])
    assert (loop.tokens[free] != given[free]).any()
    for k, model in enumerate(models):
        scored = to_host(model.token_log_probs(posterior.prompt_ids, loop.sequences())).sum(axis=2).ravel()
        np.testing.assert_allclose(loop.log_probs[k], scored, rtol=0, atol=precision(backend, 1e-12))
