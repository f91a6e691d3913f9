"""SMC against enumeration: unbiased evidence, exactness with the optimal twist, and the traps of theory.md 3.

Runs are repeated by giving the same prompt many times; see `repeated`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.inference.smc.level import most_even_level
from bayes_klrl.inference.smc.runs import RESAMPLING_STREAM
from bayes_klrl.models.memory import prompt_blocks
from bayes_klrl.randomness import Streams, prompt_keys
from bayes_klrl.resampling import RESAMPLING
from bayes_klrl.weights import effective_sample_size
from tests.helpers.backends import crossed, on, precision
from tests.helpers.truth import Truth, full_table, random_posterior, repeated, z_score

SCHEMES = sorted(RESAMPLING, reverse=True)  # systematic, the default, is the one that is crossed with backends
NUM_RUNS = 200


# --- the evidence is unbiased -------------------------------------------------------------------------------

PROBLEMS = {
    "lopsided": {"seed": 11, "num_tokens": 4},
    "early EOS": {"seed": 12, "num_tokens": 6, "vocab_size": 3, "eos": (2,), "eos_logit": 1.5},
}


@crossed(problem=PROBLEMS, scheme=SCHEMES, threshold=[0.5, 1.0, 0.0])
def test_evidence_is_unbiased(backend: str, problem: str, scheme: str, threshold: float) -> None:
    posterior = on(backend, random_posterior(**PROBLEMS[problem]))
    truth = Truth(posterior).log_evidence[0]
    smc = bk.SMC(8, resampling=scheme, ess_threshold=threshold)
    draws = smc.run(repeated(posterior, 2 * NUM_RUNS), seed=3)
    assert abs(z_score(np.exp(draws.log_evidence - truth), 1.0)) < 3
    resampled = (draws.info["ancestors"] != np.arange(8)).any()
    assert resampled == (threshold > 0)


@crossed(scheme=SCHEMES)
def test_evidence_is_unbiased_over_seeds(backend: str, scheme: str) -> None:
    """Ten copies of two different prompts per seed, a proposal that is not the prior, and a twist that is wrong."""
    posterior = on(backend, random_posterior(13, num_tokens=4, prompts=((0,), (1, 2)), prompt_shift=0.7))
    copies = 10
    truth = Truth(posterior).log_evidence
    many = bk.Posterior(posterior.prior, posterior.likelihood, prompts=[[0], [1, 2]] * copies, max_new_tokens=4)
    proposal = full_table(posterior.prior, 3, noise=0.5, seed=3)

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return 0.8 * (prefixes == 1).sum(axis=1) - 0.3 * prefixes.shape[1] + 2.0 * (prompt_index % 2)

    smc = bk.SMC(6, proposal=proposal, twist=twist, resampling=scheme)
    runs = [smc.run(many, seed=seed).log_evidence.reshape(copies, 2) for seed in range(NUM_RUNS // copies)]
    log_evidence = np.concatenate(runs)
    for p in range(2):
        assert abs(z_score(np.exp(log_evidence[:, p] - truth[p]), 1.0)) < 3


def test_evidence_is_unbiased_where_particles_die() -> None:
    """Most completions have likelihood 0, some prefixes are known to, and the prior forbids a token."""
    table = np.array([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.7, 0.3, 0.0]])
    with np.errstate(divide="ignore"):
        prior = bk.NgramLM(np.log(table), eos_token_id=2)
    reward = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens[:, :2] == 1).any(axis=1), 0.7 * lengths, -np.inf), alpha=1.0
    )
    posterior = bk.Posterior(prior, reward, max_new_tokens=4)
    truth = Truth(posterior).log_evidence[0]
    proposal = bk.NgramLM(np.log(np.full((3, 3), 1 / 3)), eos_token_id=2)

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        if prefixes.shape[1] < 2:
            return np.zeros(len(prefixes))
        return np.where((prefixes[:, :2] == 1).any(axis=1), 0.5, -np.inf)

    many = repeated(posterior, 400)
    for smc in (
        bk.SMC(64),
        bk.SMC(64, ess_threshold=1.0),
        bk.SMC(64, proposal=proposal, resampling="residual"),
        bk.SMC(64, twist=twist, resampling="multinomial"),
    ):
        draws = smc.run(many, seed=2)
        assert abs(z_score(np.exp(draws.log_evidence - truth), 1.0)) < 3
        alive = draws.log_weights > -np.inf
        assert np.isfinite(draws.reward[alive]).all()


def test_all_particles_dead_is_an_error_that_carries_them() -> None:
    prior = bk.NgramLM(problems.gold_table(0.0), eos_token_id=3)
    never = bk.TokenReward(lambda tokens, lengths: np.full(len(tokens), -np.inf), alpha=1.0)
    with pytest.raises(bk.BudgetError) as caught:
        bk.SMC(8).run(bk.Posterior(prior, never, max_new_tokens=3), seed=0)
    assert caught.value.draws.shape == (1, 8)


def test_averaging_log_evidence_would_be_a_lower_bound() -> None:
    """What the unbiasedness tests would miss if they averaged logs: E log Z-hat < log Z by about half the variance."""
    posterior = random_posterior(11, num_tokens=4)
    draws = bk.SMC(8).run(repeated(posterior, 1000), seed=3)
    assert z_score(draws.log_evidence, Truth(posterior).log_evidence[0]) < -3


# --- twists -------------------------------------------------------------------------------------------------


@crossed(options=[{}, {"prompts": ((0,), (2,)), "prompt_shift": -3.0}, {"eos": (), "prompts": ((1,),)}])
def test_optimal_twist_and_policy_make_one_particle_exact(backend: str, options: dict[str, Any]) -> None:
    posterior = on(backend, random_posterior(4, num_tokens=4, **options))
    truth = Truth(posterior)
    smc = bk.SMC(1, proposal=truth.policy(), twist=truth.twist())
    for seed in range(5):
        draws = smc.run(posterior, seed=seed)
        np.testing.assert_allclose(draws.log_evidence, truth.log_evidence, rtol=0, atol=precision(backend, 1e-10))


def test_optimal_twist_and_policy_give_equal_weights_at_every_step(backend: str) -> None:
    posterior = on(backend, problems.gold_posterior())
    truth = Truth(posterior)
    draws = bk.SMC(32, proposal=truth.policy(), twist=truth.twist(), ess_threshold=0.99).run(posterior, seed=0)
    assert (draws.info["ancestors"] == np.arange(32)).all()
    seen = draws.info["step_ess"][~np.isnan(draws.info["step_ess"])]
    np.testing.assert_allclose(seen, 32, rtol=precision(backend, 1e-9))
    np.testing.assert_allclose(draws.log_weights, 1.65238447, rtol=0, atol=precision(backend, 1e-8))


def test_optimal_twist_with_the_prior_as_proposal_still_has_variance() -> None:
    posterior = problems.gold_posterior(alpha=0.25)
    truth = Truth(posterior)
    look_up = truth.twist()

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return look_up(posterior, 0 * prompt_index, prefixes)

    draws = bk.SMC(8, twist=twist).run(repeated(posterior, 400), seed=0)
    assert abs(z_score(np.exp(draws.log_evidence - truth.log_evidence[0]), 1.0)) < 3
    assert (draws.log_evidence - truth.log_evidence[0]).std() > 0.1


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_constant_twists_are_all_one_for_fixed_lengths(threshold: float) -> None:
    """Without EOS every particle ends at T, and a constant psi cancels: same draws, same evidence."""
    posterior = random_posterior(5, eos=(), num_tokens=5)

    def run(twist: float | None) -> bk.Draws:
        return bk.SMC(64, twist=twist, ess_threshold=threshold).run(posterior, seed=4)

    first = run(0.0)
    for twist in (-7.0, 3.5, None):
        other = run(twist)
        np.testing.assert_array_equal(first.tokens, other.tokens)
        np.testing.assert_allclose(other.log_evidence, first.log_evidence, rtol=0, atol=1e-12)
        np.testing.assert_allclose(other.log_weights, first.log_weights, rtol=0, atol=1e-12)


def test_shifting_reward_and_twist_together_changes_nothing_but_the_evidence() -> None:
    base = random_posterior(6, num_tokens=5)
    shifted = bk.Posterior(
        base.prior,
        base.likelihood * bk.TokenReward(lambda tokens, lengths: np.full(len(tokens), 2.0), alpha=0.5),
        prompts=[[]],
        max_new_tokens=5,
    )
    for first, second in ((0.3, 4.3), (None, None)):
        a = bk.SMC(64, twist=first, ess_threshold=0.8).run(base, seed=8)
        b = bk.SMC(64, twist=second, ess_threshold=0.8).run(shifted, seed=8)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.log_evidence + 4.0, b.log_evidence, rtol=0, atol=1e-10)


def test_whoever_ends_first_does_not_take_the_population() -> None:
    """GOLD at b = 4, K = 32: psi = 1 beside exp(b r) loses more than a nat; the default twist does not."""
    posterior = repeated(problems.gold_posterior(alpha=0.25), 400)
    exact = 5.87342935

    def mean_error(smc: bk.SMC) -> float:
        log_evidence = smc.run(posterior, seed=7).log_evidence
        return float(log_evidence.mean() - exact)

    naive, default = mean_error(bk.SMC(32, twist=0.0)), mean_error(bk.SMC(32))
    plain = mean_error(bk.SMC(32, ess_threshold=0.0))
    assert -1.6 < naive < -0.9
    assert -0.12 < default < 0.02
    assert -0.12 < plain < 0.02
    assert mean_error(bk.SMC(32, twist=exact)) > -0.1


def test_the_default_constant_makes_weights_most_even_and_has_no_pilot() -> None:
    """Every constant between e^-20 and e^20 gives at most this ESS, whatever the weights; NaN where none matters."""
    rng = np.random.default_rng(0)
    log_ratio, log_psi = rng.normal(0.0, 2.0, (2, 50, 12))
    finished = rng.random((50, 12)) < 0.5
    finished[:, 0], finished[:, 1] = True, False
    log_psi[:, 2] = np.where(finished[:, 2], -np.inf, 0.0)
    level = most_even_level(log_ratio, np.where(finished, log_psi, np.nan), finished)

    def ess(constant: np.ndarray) -> np.ndarray:
        return effective_sample_size(log_ratio + np.where(finished, log_psi, constant[:, None]))

    others = np.stack([ess(np.full(50, constant)) for constant in np.linspace(-20, 20, 4001)])
    np.testing.assert_allclose(ess(level), others.max(axis=0), rtol=1e-4)
    assert (ess(level) >= others - 1e-12).all()
    nobody, everybody = np.zeros_like(finished), np.ones_like(finished)
    assert np.isnan(most_even_level(log_ratio, log_psi, nobody)).all()
    assert np.isnan(most_even_level(log_ratio, log_psi, everybody)).all()
    posterior = random_posterior(11, num_tokens=4)
    importance = bk.ImportanceSampling(64).run(posterior, seed=0)
    unmoved = bk.SMC(64, ess_threshold=0.0).run(posterior, seed=0)
    assert unmoved.model_tokens == importance.model_tokens
    np.testing.assert_array_equal(unmoved.tokens, importance.tokens)
    np.testing.assert_allclose(unmoved.log_weights, importance.log_weights, rtol=0, atol=1e-12)


def test_twists_that_are_no_twists_are_refused() -> None:
    posterior = random_posterior(6)
    with pytest.raises(bk.BayesKLRLError, match="shape"):
        bk.SMC(8, twist=lambda posterior, index, prefixes: np.zeros(1)).run(posterior, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="nan"):
        bk.SMC(8, twist=lambda posterior, index, prefixes: np.full(len(index), np.nan)).run(posterior, seed=0)


# --- the loop, against a loop written in the plainest way ------------------------------------------------------


def naive_smc(
    posterior: bk.Posterior,
    num_particles: int,
    twist: Any,
    threshold: float,
    seed: int,
    proposal: bk.LanguageModel,
) -> tuple[list[list[int]], np.ndarray, float]:
    """One prompt, systematic resampling, one list of tokens a particle, everything rescored from the start."""
    width, streams = posterior.max_new_tokens, Streams.of(seed)
    uniforms = iter(streams.uniforms(prompt_keys(posterior.prompt_ids), 0, num_particles, width))
    (rng,) = streams.beside(RESAMPLING_STREAM).generators(posterior.prompt_ids)
    prompt, eos = list(posterior.prompt_ids[0]), posterior.prior.eos_token_ids
    xs: list[list[int]] = [[] for _ in range(num_particles)]
    log_w = np.zeros(num_particles)
    log_z = log_psi_0 = twist(())

    def next_probs(lm: bk.LanguageModel, x: list[int]) -> np.ndarray:
        return lm.next_log_probs(lm.prefill([[*prompt, *x]]))[0]

    def finished(x: list[int]) -> bool:
        return len(x) == width or bool(x and x[-1] in eos)

    def log_psi(x: list[int]) -> float:
        if not x:
            return float(log_psi_0)
        return float(posterior.log_likelihood([x])[0, 0] if finished(x) else twist(tuple(x)))

    while not all(map(finished, xs)):
        for k, u in enumerate(next(uniforms)):
            if finished(xs[k]):
                continue
            log_q, log_p = next_probs(proposal, xs[k]), next_probs(posterior.prior, xs[k])
            token = int((np.exp(log_q).cumsum() <= u).sum())
            grown = [*xs[k], token]
            log_w[k] += log_p[token] + log_psi(grown) - log_psi(xs[k]) - log_q[token]
            xs[k] = grown
        weights = np.exp(log_w - log_w.max())
        ess = weights.sum() ** 2 / (weights**2).sum()
        if not all(map(finished, xs)) and ess < threshold * num_particles:
            positions = (np.arange(num_particles) + rng.random()) / num_particles
            cumulative = (weights / weights.sum()).cumsum()
            chosen = [int((cumulative <= position).sum()) for position in positions]
            log_z += np.log(np.exp(log_w).mean())
            xs, log_w = [list(xs[k]) for k in chosen], np.zeros(num_particles)
    return xs, log_w, log_z


@pytest.mark.parametrize("threshold", [0.3, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_smc_is_the_plain_loop(seed: int, threshold: float) -> None:
    posterior = random_posterior(20 + seed, num_tokens=5, order=3, prompts=((1, 0),))
    proposal = full_table(posterior.prior, 3, noise=0.7, seed=seed)

    def log_psi(prefix: tuple[int, ...]) -> float:
        return 0.5 + 0.4 * prefix.count(0) - 0.2 * len(prefix)

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return np.array([log_psi(tuple(prefix)) for prefix in prefixes.tolist()])

    smc = bk.SMC(24, proposal=proposal, twist=twist, ess_threshold=threshold)
    draws = smc.run(posterior, seed=seed)
    xs, log_w, log_z = naive_smc(posterior, 24, log_psi, threshold, seed, proposal)
    assert draws.sequences.lists() == xs
    np.testing.assert_allclose(draws.log_weights[0], log_w + log_z, rtol=0, atol=1e-11)
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=1e-12)
    np.testing.assert_allclose(draws.reward, posterior.reward(draws), rtol=0, atol=1e-12)


# --- what a run records ------------------------------------------------------------------------------------


def test_weights_of_an_unresampled_run_are_importance_weights(backend: str) -> None:
    posterior = on(backend, random_posterior(7, prompts=((0,), (1,))))
    proposal = full_table(posterior.prior, 2, noise=0.6)
    draws = bk.SMC(50, proposal=proposal, twist=1.7, ess_threshold=0.0).run(posterior, seed=1)
    np.testing.assert_allclose(
        draws.log_weights, draws.log_prior + draws.log_likelihood - draws.log_proposal, rtol=0, atol=1e-12
    )
    plain = bk.ImportanceSampling(50, proposal=proposal).run(posterior, seed=1)
    np.testing.assert_array_equal(plain.tokens, draws.tokens)
    np.testing.assert_allclose(plain.log_weights, draws.log_weights, rtol=0, atol=1e-12)
    np.testing.assert_allclose(plain.log_evidence_se, draws.log_evidence_se, rtol=1e-9)
    np.testing.assert_allclose(plain.ess, draws.ess, rtol=1e-9)


def test_evidence_is_the_mean_weight_and_records_have_their_shapes(backend: str) -> None:
    posterior = on(backend, random_posterior(8, num_tokens=6, prompts=((0,), (1, 2), (2,))))
    draws = bk.SMC(40, ess_threshold=0.9).run(posterior, seed=2)
    np.testing.assert_allclose(draws.log_evidence, np.log(np.exp(draws.log_weights).mean(axis=1)), rtol=0, atol=1e-12)
    ancestors, step_ess = draws.info["ancestors"], draws.info["step_ess"]
    assert ancestors.shape == (3, 6, 40)
    assert step_ess.shape == (3, 6)
    assert ((0 <= ancestors) & (ancestors < 40)).all()
    seen = step_ess[~np.isnan(step_ess)]
    assert ((1 <= seen) & (seen <= 40 + 1e-9)).all()
    # resampled exactly where the effective sample size was below the threshold and somebody was unfinished
    moved = (ancestors != np.arange(40)).any(axis=2)
    assert moved.any()
    assert not moved[np.isnan(step_ess) | (step_ess >= 0.9 * 40)].any()
    assert (draws.ess <= 40).all()
    assert (draws.ess < 40).any()
    assert np.isnan(draws.elbo).all()


@crossed(scheme=SCHEMES)
def test_never_resampled_at_the_end(backend: str, scheme: str) -> None:
    posterior = repeated(on(backend, random_posterior(9, num_tokens=4, eos_logit=1.0)), 100)
    # a seed with which no population loses its last unfinished particles, or they would be missing in `last`
    draws = bk.SMC(8, ess_threshold=1.0, resampling=scheme).run(posterior, seed=2)
    ancestors = draws.info["ancestors"]
    moved = (ancestors != np.arange(8)).any(axis=2)
    assert moved[:, :-1].any()
    assert not moved[:, -1].any()
    # once all particles of a prompt have ended, it rests, while others go on
    last = draws.lengths.max(axis=1)
    assert (last < 4).any()
    for p, end in enumerate(last):
        assert not moved[p, end:].any()
    assert (draws.log_weights.std(axis=1) > 1e-6).mean() > 0.5


def test_a_prompt_that_has_ended_rests_while_another_goes_on() -> None:
    table = np.full((4, 4), 0.25)
    table[0] = [0.4, 0.3, 0.3, 0.0]  # after the first prompt every token is an EOS
    with np.errstate(divide="ignore"):
        prior = bk.NgramLM(np.log(table), eos_token_id={0, 1, 2})
    reward = bk.TokenReward(lambda tokens, lengths: 2.0 * tokens[:, 0], alpha=1.0)
    posterior = bk.Posterior(prior, reward, prompts=[[0], [3]], max_new_tokens=3)
    draws = bk.SMC(32, ess_threshold=1.0).run(posterior, seed=0)
    moved = (draws.info["ancestors"] != np.arange(32)).any(axis=2)
    np.testing.assert_array_equal(moved, [[False, False, False], [True, True, False]])
    np.testing.assert_allclose(draws.log_weights[0], 2.0 * draws.tokens[0, :, 0], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("is_learned", [False, True])
def test_blocks_of_prompts_leave_no_trace(monkeypatch: pytest.MonkeyPatch, is_learned: bool) -> None:
    """Prompts of two lengths, two of them equal, decoded one by one, in pairs, and all at once; with retained completions."""
    bigram = random_posterior(10, num_tokens=4, alpha=0.3, eos_logit=0.5, prompts=((0,), (1,) * 80, (2,), (1, 2), (0,)))
    posterior = on("torch", bigram)
    retained = bk.Exact(3).run(bigram, seed=5).sequences
    smc = bk.SMC(6, ess_threshold=0.9)
    if is_learned:
        twist = bk.LearnedTwist(num_steps=5, num_draws=32)
        smc = dataclasses.replace(smc, twist=twist, proposal="twisted")
    seen: list[list[list[int]]] = []

    def runs(most: int) -> tuple[bk.Draws, np.ndarray, np.ndarray]:
        for limit in ("ROWS_PER_BLOCK", "_MAX_ROWS"):
            monkeypatch.setattr(f"bayes_klrl.inference.smc.runs.{limit}", most)
        seen.append([block.tolist() for block in prompt_blocks((posterior.prior,), [1, 80, 1, 2, 1], 6, 4, most)])
        above = bk.ConditionalSMC(smc).log_evidences(posterior, retained, seed=2)
        return smc.run(posterior, seed=1), smc.log_evidences(posterior, 3, seed=1).log_evidence, above.log_evidence

    whole, *evidences = runs(1000)
    assert (whole.info["ancestors"] != np.arange(6)).any()
    for most in (1, 12):
        draws, *others = runs(most)
        for name in ("tokens", "lengths", "reward"):
            np.testing.assert_array_equal(getattr(draws, name), getattr(whole, name))
        np.testing.assert_array_equal(draws.info["ancestors"], whole.info["ancestors"])
        np.testing.assert_allclose(draws.log_weights, whole.log_weights, rtol=0, atol=1e-5)
        np.testing.assert_allclose(others, evidences, rtol=0, atol=1e-5)
    assert seen == [[[1], [0, 2, 3, 4]], [[1], [0], [2], [3], [4]], [[1], [0, 2], [3, 4]]]


def test_ancestors_lead_to_the_particles(backend: str) -> None:
    """Following the ancestor table back, a particle's first token is its first ancestor's family."""
    posterior = on(backend, random_posterior(10, eos=(), num_tokens=5, alpha=0.2))

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return 1.5 * (prefixes == 1).sum(axis=1)

    draws = bk.SMC(16, twist=twist).run(posterior, seed=1)
    ancestors = draws.info["ancestors"][0]
    assert (ancestors != np.arange(16)).any()
    family = np.arange(16)
    for step in ancestors:
        family = family[step]
    mass = np.bincount(family, weights=np.exp(draws.log_weights[0] - draws.log_weights[0].max()))
    assert draws.ess[0] == pytest.approx(mass.sum() ** 2 / (mass**2).sum(), rel=1e-9)
    for group in np.unique(family):
        assert len(np.unique(draws.tokens[0, family == group, 0])) == 1


def test_finished_particles_stay_and_cost_nothing(backend: str) -> None:
    """A prior that mostly ends at once: what has ended keeps its tokens and reward through resampling."""
    posterior = on(backend, random_posterior(12, vocab_size=3, eos=(2,), num_tokens=6, eos_logit=2.0))
    draws = bk.SMC(200, ess_threshold=1.0).run(posterior, seed=0)
    ended = draws.sequences.finished({2})
    assert (draws.lengths[ended] < 6).any()
    assert (draws.lengths[~ended] == 6).all()
    padded = np.arange(6) >= draws.lengths[..., None]
    assert (draws.tokens[padded] == 2).all()
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), rtol=0, atol=precision(backend, 1e-12))
    np.testing.assert_allclose(draws.reward, posterior.reward(draws), rtol=0, atol=1e-12)
    # 200 particles through 6 steps would be 1200 tokens without sharing and dropping
    assert draws.cost.model_tokens < 150


CALIBRATION = {
    "no resampling": bk.SMC(200, ess_threshold=0.0),
    "adaptive": bk.SMC(200),
    "multinomial": bk.SMC(200, resampling="multinomial", ess_threshold=0.8),
}


@pytest.mark.parametrize("name", CALIBRATION)
def test_standard_error_is_calibrated(name: str) -> None:
    posterior = repeated(random_posterior(14, num_tokens=5, alpha=0.35), 400)
    draws = CALIBRATION[name].run(posterior, seed=5)
    spread = draws.log_evidence.std(ddof=1)
    claimed = np.sqrt((draws.log_evidence_se**2).mean())
    assert 0.75 < claimed / spread < 1.25
