"""Twists and twisted proposals against enumeration: exactness with the optimal twist, unbiasedness with any other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.arrays import to_host
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.models.decoding import Decoding, decode
from bayes_klrl.models.twists.simple import ConstantTwist, completed_log_psi, next_log_psi
from tests.helpers.backends import crossed, on, precision
from tests.helpers.truth import Truth, random_posterior, z_score
from tests.helpers.user_models import RecurrentLM
from tests.inference.smc.test_smc import repeated


class Optimal:
    """The optimal twist, looked up, with or without one step of look-ahead of its own."""

    def __init__(self, posterior: bk.Posterior) -> None:
        self.look_up = Truth(posterior).twist()

    def __call__(self, posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return np.asarray(self.look_up(posterior, prompt_index, prefixes))


class WithLookAhead(Optimal):
    def next_log_psi(
        self, posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray, prior_rows: Any
    ) -> np.ndarray:
        values = np.empty((len(prefixes), posterior.prior.vocab_size))
        for token in range(values.shape[1]):
            extended = np.column_stack([prefixes, np.full(len(prefixes), token)])
            values[:, token] = completed_log_psi(self, posterior, prompt_index, extended)
        return values


def wrong_twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    return 0.8 + 0.5 * (prefixes == 1).sum(axis=1) - 0.4 * (prefixes[:, -1:] == 0).sum(axis=1)


def perturbed(posterior: bk.Posterior) -> Any:
    """The first prompt's optimal twist made wrong: flattened, shifted, and in love with token 1."""
    optimal = Optimal(posterior)

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        log_psi = optimal(posterior, 0 * prompt_index, prefixes)
        return 0.6 * log_psi + 0.3 + 0.4 * (prefixes == 1).sum(axis=1) - 0.3 * (prefixes[:, -1:] == 0).sum(axis=1)

    return twist


PROBLEMS = {
    "lopsided": {"seed": 11, "num_tokens": 4},
    "early EOS": {"seed": 12, "num_tokens": 5, "vocab_size": 3, "eos": (2,), "eos_logit": 1.0},
    "no EOS, two prompts": {"seed": 13, "num_tokens": 4, "eos": (), "prompts": ((0,), (1, 2))},
}


# --- the optimal twist --------------------------------------------------------------------------------------


@crossed(problem=PROBLEMS, kind=[Optimal, WithLookAhead])
def test_one_particle_is_enough_with_the_optimal_twist(backend: str, problem: str, kind: type[Optimal]) -> None:
    posterior = on(backend, random_posterior(**PROBLEMS[problem]))
    truth = Truth(posterior)
    for num_particles in (1, 7):
        draws = bk.SMC(num_particles, twist=kind(posterior), proposal="twisted").run(posterior, seed=0)
        expected = np.repeat(truth.log_evidence[:, None], num_particles, axis=1)
        np.testing.assert_allclose(draws.log_weights, expected, rtol=0, atol=precision(backend, 1e-10))
        np.testing.assert_allclose(draws.log_evidence, truth.log_evidence, rtol=0, atol=precision(backend, 1e-10))


@crossed(problem=PROBLEMS)
def test_the_prior_steered_by_the_optimal_twist_is_the_posterior(backend: str, problem: str) -> None:
    posterior = on(backend, random_posterior(**PROBLEMS[problem]))
    truth = Truth(posterior)
    lm = bk.TwistedLM(posterior, Optimal(posterior))
    scored = bk.Posterior(
        lm,
        posterior.likelihood,
        prompts=[list(ids) for ids in posterior.prompt_ids],
        max_new_tokens=posterior.max_new_tokens,
    ).log_prior(truth.sequences)
    np.testing.assert_allclose(scored, truth.log_posterior, rtol=0, atol=precision(backend, 1e-10))
    draws = bk.ImportanceSampling(30, proposal=lm).run(posterior, seed=0)
    np.testing.assert_allclose(
        draws.log_weights, np.repeat(truth.log_evidence[:, None], 30, axis=1), rtol=0, atol=precision(backend, 1e-10)
    )


def test_the_optimal_twist_with_the_prior_as_proposal_still_varies() -> None:
    posterior = random_posterior(11, num_tokens=4)
    truth = Truth(posterior)
    optimal = Optimal(posterior)

    def twist(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return optimal(posterior, 0 * prompt_index, prefixes)

    draws = bk.SMC(8, twist=twist).run(repeated(posterior, 200), seed=0)
    assert abs(z_score(np.exp(draws.log_evidence - truth.log_evidence[0]), 1.0)) < 3
    assert draws.log_evidence.std() > 0.05


# --- any twist is unbiased ------------------------------------------------------------------------------------

PROPOSALS: dict[str, dict[str, Any]] = {
    "whole vocabulary": {},
    "defensive": {"epsilon": 0.3},
    "top 1": {"top_k": 1, "epsilon": 0.7},
    "top 2": {"top_k": 2, "epsilon": 0.2},
}


@pytest.mark.slow
@crossed(problem=["lopsided", "early EOS"], options=PROPOSALS)
def test_wrong_twists_leave_the_evidence_unbiased(backend: str, problem: str, options: str) -> None:
    posterior = on(backend, random_posterior(**PROBLEMS[problem]))
    truth = Truth(posterior).log_evidence[0]
    many = repeated(posterior, 1500)  # weights are skewed: with 300 runs one in eighty z-scores exceeds 3
    twist = perturbed(posterior)
    proposal = bk.TwistedLM(many, twist, **PROPOSALS[options])
    for algorithm in (bk.SMC(6, proposal=proposal, twist=twist), bk.ImportanceSampling(6, proposal=proposal)):
        draws = algorithm.run(many, seed=2)
        assert abs(z_score(np.exp(draws.log_evidence - truth), 1.0)) < 3
        assert draws.log_evidence.std() > 0.05


def test_without_epsilon_the_weight_does_not_depend_on_the_token(backend: str) -> None:
    posterior = on(backend, random_posterior(11, num_tokens=4, eos=()))
    many = repeated(posterior, 2)
    proposal = bk.TwistedLM(many, wrong_twist)
    decoding = Decoding((proposal, many.prior), many.prompt_ids, 20, 4)
    decoding.step(np.random.default_rng(0).random(40))
    log_psi = wrong_twist(many, decoding.prompt_index, decoding.tokens[:, :1])
    increments = decoding.log_probs[1] + log_psi - decoding.log_probs[0]
    assert len(np.unique(decoding.tokens[:20, 0])) > 1
    np.testing.assert_allclose(increments[:20], increments[0], rtol=0, atol=precision(backend, 1e-12))


def test_top_k_without_a_share_of_the_prior_is_refused() -> None:
    posterior = random_posterior(11, num_tokens=4)
    with pytest.raises(bk.BayesKLRLError, match="epsilon must be positive"):
        bk.TwistedLM(posterior, wrong_twist, top_k=2, epsilon=0.0)
    bk.TwistedLM(posterior, wrong_twist, top_k=4, epsilon=0.0)  # the whole vocabulary
    for options in ({"top_k": 0}, {"epsilon": 1.5}, {"epsilon": float("nan")}):
        with pytest.raises(bk.BayesKLRLError):
            bk.TwistedLM(posterior, wrong_twist, **options)  # type: ignore[arg-type]
    with pytest.raises(bk.BayesKLRLError, match="recipe"):
        bk.TwistedLM(posterior, bk.PartialRewardTwist())  # type: ignore[arg-type]


def test_prefixes_of_twist_zero_fall_back_on_the_prior() -> None:
    def dead(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return np.where((prefixes == 1).any(axis=1), -np.inf, 0.0)

    prior = bk.NgramLM(np.log(np.full((3, 3), 1 / 3)), eos_token_id=None)
    never_1 = bk.TokenReward(lambda tokens, lengths: np.where((tokens == 1).any(axis=1), -np.inf, 0.0), alpha=1.0)
    posterior = bk.Posterior(prior, never_1, prompts=[[]], max_new_tokens=3)
    lm = bk.TwistedLM(posterior, dead)
    state = lm.append(lm.prefill([[]]), np.array([1]))
    np.testing.assert_allclose(lm.next_log_probs(state), prior.next_log_probs(np.array([[1]])))
    draws = bk.SMC(4, twist=dead, proposal=lm).run(posterior, seed=0)
    np.testing.assert_allclose(draws.log_weights, np.log(8 / 27), rtol=0, atol=1e-12)


# --- the prior is run once -----------------------------------------------------------------------------------


def test_prior_and_twisted_prior_in_lockstep_run_the_prior_once() -> None:
    prior = RecurrentLM(4, (3,), seed=1)
    reward = bk.TokenReward(lambda tokens, lengths: 1.0 * (tokens == 0).sum(axis=1), alpha=1.0)
    posterior = bk.Posterior(prior, reward, prompts=[[0]], max_new_tokens=5)
    counts = {}
    for name, models in {
        "prior": (prior, prior),
        "twisted": (bk.TwistedLM(posterior, ConstantTwist(np.zeros(1))), prior),
        "scored by both": (prior, bk.TwistedLM(posterior, ConstantTwist(np.zeros(1)))),
    }.items():
        prior.num_calls = 0
        decoded = decode(models, posterior.prompt_ids, 40, 5, np.random.default_rng(0))
        counts[name] = prior.num_calls, decoded.model_tokens
        scored = prior.token_log_probs([[0]], decoded.sequences()).sum(axis=2).ravel()
        which = 0 if name == "scored by both" else 1
        np.testing.assert_allclose(decoded.log_probs[which], scored, rtol=0, atol=1e-12)
    assert counts["prior"][0] == counts["scored by both"][0]
    assert counts["prior"] == counts["scored by both"]
    assert counts["twisted"][0] <= counts["prior"][0]


def test_sampling_and_scoring_of_a_twisted_model_agree(backend: str) -> None:
    posterior = on(backend, random_posterior(14, num_tokens=5, prompts=((0,), (1, 2))))
    lm = bk.TwistedLM(posterior, wrong_twist, top_k=3)
    decoded = decode((lm,), posterior.prompt_ids, 50, 5, np.random.default_rng(0))
    scored = to_host(lm.token_log_probs(posterior.prompt_ids, decoded.sequences())).sum(axis=2)
    np.testing.assert_allclose(decoded.log_probs[0], scored.ravel(), rtol=0, atol=precision(backend, 1e-12))
    # and it is a distribution: whoever steps past the end meets the prior
    truth = Truth(posterior)
    total = np.exp(to_host(lm.token_log_probs(posterior.prompt_ids, truth.sequences)).sum(axis=2)).sum(axis=1)
    np.testing.assert_allclose(total, 1.0, rtol=0, atol=precision(backend, 1e-12))


def test_prompts_of_another_posterior_are_refused() -> None:
    posterior = random_posterior(14, num_tokens=3, prompts=((0,), (1, 2)))
    lm = bk.TwistedLM(posterior, wrong_twist)
    np.testing.assert_array_equal(lm.prefill([[1, 2], [0], [0]]).prompt_index, [1, 0, 0])
    with pytest.raises(bk.BayesKLRLError, match=r"\[2\]"):
        lm.prefill([[2]])


def test_a_posterior_conditioned_on_its_own_twisted_prior_is_consistent() -> None:
    """Look-ahead by asking token by token is the same as a twist's own."""
    posterior = random_posterior(**PROBLEMS["lopsided"])
    prefixes = np.array([[0, 1], [1, 1], [2, 0]])
    index = np.zeros(3, dtype=np.int64)
    slow = next_log_psi(Optimal(posterior), posterior, index, prefixes)
    fast = next_log_psi(WithLookAhead(posterior), posterior, index, prefixes)
    np.testing.assert_allclose(slow, fast, rtol=0, atol=1e-12)
    candidates = np.array([[3, 0], [1, 2], [2, 2]])
    some = next_log_psi(Optimal(posterior), posterior, index, prefixes, candidates)
    np.testing.assert_allclose(some, np.take_along_axis(fast, candidates, axis=1), rtol=0, atol=1e-12)
    # an extension by EOS is complete: its psi is its likelihood
    expected = [posterior.log_likelihood([[*prefix, 3]])[0, 0] for prefix in prefixes.tolist()]
    np.testing.assert_allclose(slow[:, 3], expected, rtol=0, atol=1e-12)


# --- the partial reward ----------------------------------------------------------------------------------------


def test_partial_reward_does_not_let_the_first_to_finish_take_all() -> None:
    """theory.md 3.5 on GOLD, b = 4, K = 32: a reward so far that is raw loses a nat, on the likelihood's scale it does not."""
    posterior = repeated(problems.gold_posterior(alpha=0.25), 400)
    exact = 5.87342935
    recipe = bk.PartialRewardTwist(gamma=0.25, floor=0.01)
    fitted = recipe.fit(posterior, seed=3)
    raw = replace(fitted, log_constants=np.zeros_like(fitted.log_constants), floor=1e-9)

    def error(twist: Any) -> np.ndarray:
        return np.asarray(bk.SMC(32, twist=twist).run(posterior, seed=7).log_evidence - exact)

    naive, scaled = error(raw), error(fitted)
    assert naive.mean() < -0.35
    assert scaled.mean() > -0.15
    assert abs(z_score(np.exp(scaled), 1.0)) < 3


def test_partial_reward_is_exact_arithmetic() -> None:
    """The formula, on one prefix, by hand; the pilot's mean of psi over unfinished draws is Z-hat."""
    posterior = problems.gold_posterior(alpha=0.25)
    fitted = bk.PartialRewardTwist(gamma=0.7, floor=0.2, num_pilot=400).fit(posterior, seed=0)
    prefix = np.array([[0, 1, 1]])
    reward = 0.0 - 0.2 - 0.2 + 2.0
    partial = 0.7 * reward / 0.25 + fitted.log_constants[0, 3]
    expected = np.log(0.8 * np.exp(partial) + 0.2 * np.exp(fitted.log_evidence[0]))
    np.testing.assert_allclose(fitted(posterior, np.zeros(1, int), prefix), expected, rtol=1e-12)
    np.testing.assert_allclose(fitted(posterior, np.zeros(1, int), prefix[:, :0]), fitted.log_evidence)
    draws = bk.ImportanceSampling(4000).run(posterior, seed=5)
    unfinished = draws.lengths[0] > 3
    prefixes = draws.tokens[0, unfinished, :3]
    ratio = np.exp(fitted(posterior, np.zeros(len(prefixes), int), prefixes) - fitted.log_evidence[0])
    assert abs(ratio.mean() - 1) < 0.2


@pytest.mark.slow
def test_partial_reward_keeps_alive_what_does_not_fulfil_a_constraint_yet() -> None:
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    has_2 = bk.Constraint(lambda completion_ids: [2 in ids for ids in completion_ids])
    posterior = bk.Posterior(prior, has_2, prompts=[[]], max_new_tokens=5)
    truth = Truth(posterior).log_evidence[0]
    draws = bk.SMC(8, twist=bk.PartialRewardTwist()).run(repeated(posterior, 300), seed=0)
    assert abs(z_score(np.exp(draws.log_evidence - truth), 1.0)) < 3
    for bad in ({"floor": 0.0}, {"floor": 2.0}, {"gamma": 0.0}, {"gamma": float("nan")}, {"num_pilot": 0}):
        with pytest.raises(bk.BayesKLRLError, match=next(iter(bad))):
            bk.PartialRewardTwist(**bad)  # type: ignore[arg-type]


def test_partial_reward_helps_where_rewards_accrue() -> None:
    """P3 of theory.md 8.3: r = #2 - #1 with b = 2; importance sampling dies, the reward so far is enough."""
    prior = bk.NgramLM(problems.gold_table(-1e3), eos_token_id=3)
    dense = bk.TokenReward(lambda tokens, lengths: 1.0 * (tokens == 2).sum(1) - (tokens == 1).sum(1), alpha=0.5)
    posterior = repeated(bk.Posterior(prior, dense, prompts=[[]], max_new_tokens=10), 50)
    exact = 6.412374
    plain = bk.ImportanceSampling(128).run(posterior, seed=0).log_evidence
    greedy = bk.SMC(128, twist=bk.PartialRewardTwist()).run(posterior, seed=0).log_evidence
    assert greedy.mean() > exact - 0.2
    assert plain.mean() < exact - 1.0


# --- recipes in SMC ------------------------------------------------------------------------------------------


def test_smc_fits_a_recipe_and_says_what_that_cost(backend: str) -> None:
    posterior = on(backend, random_posterior(11, num_tokens=4))
    recipe = bk.PartialRewardTwist(num_pilot=100)
    draws = bk.SMC(16, twist=recipe).run(posterior, seed=3)
    fitted = recipe.fit(posterior, seed=3)
    same = bk.SMC(16, twist=fitted).run(posterior, seed=3)
    np.testing.assert_array_equal(draws.tokens, same.tokens)
    np.testing.assert_array_equal(draws.log_weights, same.log_weights)
    assert draws.cost.training_tokens == fitted.training.training_tokens > 0
    assert same.cost.training_tokens == 0


@pytest.mark.parametrize("twist", [bk.SVI(3), random_posterior(11).prior, "learned", float("nan")])
def test_what_is_no_twist_is_refused(twist: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="twist"):
        bk.SMC(8, twist=twist)


# --- the automaton's exact twist, and what imitates it ------------------------------------------------------------


def counter_posterior(modulo: int = 5, num_tokens: int = 20, num_runs: int = 1) -> bk.Posterior:
    """P5 of theory.md 8.5: the count of token 0 must be m - 1 modulo m at the end, b = 8."""
    prior = bk.NgramLM(problems.gold_table(-1e3), eos_token_id=3)
    machine = bk.Automaton.counts(0, modulo=modulo, vocab_size=4, eos_token_ids=3)
    last = np.arange(modulo) == modulo - 1
    reward = bk.AutomatonReward(machine, final_rewards=1.0 * last, alpha=1 / 8, bounds=(0, 1))
    return bk.Posterior(prior, reward, prompts=[[]] * num_runs, max_new_tokens=num_tokens)


@pytest.mark.parametrize("num_tokens", [20, 100])
def test_one_particle_is_exact_with_the_automatons_twist(num_tokens: int) -> None:
    posterior = counter_posterior(num_tokens=num_tokens)
    messages = backward_messages(posterior)
    draws = bk.SMC(1, twist=messages.twist(), proposal="twisted").run(posterior, seed=0)
    np.testing.assert_allclose(draws.log_evidence, {20: 6.324288, 100: 6.391903}[num_tokens], rtol=0, atol=1e-6)
    np.testing.assert_allclose(draws.log_evidence, messages.log_evidence, rtol=0, atol=1e-10)


def test_look_ahead_of_the_automatons_twist_is_the_optimal_one() -> None:
    """With EOS, rewards along the path, and two prompts: every extension against enumeration."""
    machine = bk.Automaton.contains([0, 1], vocab_size=4, eos_token_ids=3)
    reward = bk.AutomatonReward(
        machine, token_rewards=[0.0, -0.2, 0.1, 0.0], final_rewards=[0.0, 0.3, 2.0], alpha=1 / 1.5
    )
    prior = bk.NgramLM(problems.gold_table(-0.5), eos_token_id=3)
    posterior = bk.Posterior(prior, reward, prompts=[[], [1]], max_new_tokens=4)
    index, prefixes = np.array([0, 1, 1]), np.array([[0, 1], [2, 0], [0, 2]])
    fast = backward_messages(posterior).twist().next_log_psi(posterior, index, prefixes)
    np.testing.assert_allclose(fast, next_log_psi(Optimal(posterior), posterior, index, prefixes), rtol=0, atol=1e-10)
    last = backward_messages(posterior).twist().next_log_psi(posterior, index, np.column_stack([prefixes, [0, 0, 1]]))
    slow = next_log_psi(Optimal(posterior), posterior, index, np.column_stack([prefixes, [0, 0, 1]]))
    np.testing.assert_allclose(last, slow, rtol=0, atol=1e-10)


def test_a_distilled_twist_of_another_prior_is_nearly_exact() -> None:
    """A recurrent prior that no bigram is: the evidence is unbiased, and the bound far tighter than without a twist."""
    prior = RecurrentLM(4, (3,), seed=2)
    machine = bk.Automaton.counts(0, modulo=3, vocab_size=4, eos_token_ids=3)
    reward = bk.AutomatonReward(machine, final_rewards=[0.0, 0.0, 1.0], alpha=1 / 6)
    posterior = bk.Posterior(prior, reward, prompts=[[0]], max_new_tokens=5)
    truth = Truth(posterior).log_evidence[0]
    twist = bk.DistilledTwist(order=2, num_draws=1000).fit(posterior, seed=0)
    assert twist.training.training_tokens > 100
    many = repeated(posterior, 300)
    steered = bk.SMC(8, twist=twist, proposal="twisted").run(many, seed=1).log_evidence - truth
    plain = bk.SMC(8).run(many, seed=1).log_evidence - truth
    assert abs(z_score(np.exp(steered), 1.0)) < 3
    assert plain.mean() < -0.3
    assert -0.1 < steered.mean() < 0.02


def test_distillation_needs_an_automaton() -> None:
    with pytest.raises(bk.BayesKLRLError, match="LearnedTwist"):
        bk.DistilledTwist().fit(random_posterior(11), seed=0)
