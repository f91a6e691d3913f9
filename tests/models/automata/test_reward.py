"""Rewards and constraints that an automaton computes."""

from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.models.automata.reward import automaton_potential
from tests.helpers.automata import random_automaton, random_likelihood
from tests.helpers.truth import completions

# ---- likelihoods


@pytest.mark.parametrize("seed", range(4))
def test_reward_by_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    automaton = random_automaton(rng, 3, 4)
    by_state, final = rng.standard_normal((3, 4)), rng.standard_normal(3)
    final[0] = -np.inf if seed == 3 else final[0]
    likelihood = bk.AutomatonReward(automaton, token_rewards=by_state, final_rewards=final, alpha=0.7)
    posterior = bk.Posterior(
        bk.NgramLM(problems.gold_table(0.0), eos_token_id=3), likelihood, prompts=[[1]], max_new_tokens=4
    )
    xs = completions(4, [3], 4)
    for x, reward in zip(xs, posterior.reward(xs)[0], strict=True):
        state, total = automaton.start, 0.0
        for token in x:
            total += by_state[state, token]
            state = automaton.transitions[state, token]
        assert reward == pytest.approx(total + final[state], abs=1e-12)
    assert (likelihood**2.0).alpha == pytest.approx(0.35)
    np.testing.assert_allclose((posterior.log_likelihood(xs)), posterior.reward(xs) / 0.7)


def test_constraint_by_the_definition() -> None:
    no_ab = bk.AutomatonConstraint(bk.Automaton.forbids([0, 1], vocab_size=4, eos_token_ids=3))
    assert no_ab.alpha is None
    assert (no_ab**3.0) is no_ab
    posterior = bk.Posterior(bk.NgramLM(problems.gold_table(0.0), eos_token_id=3), no_ab, max_new_tokens=4)
    xs = completions(4, [3], 4)
    expected = [-np.inf if "01" in "".join(map(str, x)) else 0.0 for x in xs]
    np.testing.assert_array_equal(posterior.reward(xs)[0], expected)


@pytest.mark.parametrize("seed", range(6))
def test_potential_of_a_product_is_the_log_likelihood(seed: int) -> None:
    rng = np.random.default_rng(seed)
    likelihood = random_likelihood(rng, 4, alpha=0.3, hard=True) * random_likelihood(rng, 4, alpha=2.0)
    posterior = bk.Posterior(bk.NgramLM(problems.gold_table(0.0), eos_token_id=3), likelihood, max_new_tokens=4)
    potential = automaton_potential(likelihood)
    assert potential is not None
    xs = completions(4, [3], 4)
    for x, log_likelihood in zip(xs, posterior.log_likelihood(xs)[0], strict=True):
        state, total = 0, 0.0
        for token in x:
            total += potential.token[state, token]
            state = potential.transitions[state, token]
        assert total + potential.final[state] == pytest.approx(log_likelihood, abs=1e-12)
    other = likelihood * bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    assert automaton_potential(other) is None


def test_other_algorithms_take_them_like_any_reward() -> None:
    posterior = problems.gold_posterior()
    truth = bk.Exact().run(posterior, seed=0).log_evidence[0]
    for algorithm in (bk.ImportanceSampling(4000), bk.SMC(4000)):
        draws = algorithm.run(posterior, seed=0)
        assert abs(draws.log_evidence[0] - truth) < 4 * draws.log_evidence_se[0]


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"token_rewards": [0.0] * 3}, r"token_rewards must have shape \(4,\) or \(3, 4\); got \(3,\)"),
        ({"final_rewards": [0.0] * 4}, r"final_rewards must have shape \(3,\); got \(4,\)"),
        ({"final_rewards": [0.0, np.nan, 0.0]}, r"finite or -inf; got nan at \(1,\)"),
        ({"token_rewards": [0.0, np.inf, 0.0, 0.0]}, "finite or -inf; got inf"),
        ({"alpha": 0.0}, "alpha must be a positive finite number"),
        ({"bounds": (1, 0)}, "bounds"),
    ],
)
def test_rewards_that_are_refused(options: dict[str, Any], complaint: str) -> None:
    automaton = bk.Automaton.contains([0, 1], vocab_size=4)
    with pytest.raises(bk.BayesKLRLError, match=complaint):
        bk.AutomatonReward(automaton, **{"alpha": 1.0} | options)


def test_constraints_and_priors_that_do_not_fit() -> None:
    with pytest.raises(bk.BayesKLRLError, match="needs accepting states"):
        bk.AutomatonConstraint(bk.Automaton([[0, 0]]))
    with pytest.raises(bk.RewardError, match=r"over 3 tokens, the prior has 4.*vocab_size=4"):
        bk.Posterior(
            bk.NgramLM(problems.gold_table(0.0), eos_token_id=3),
            bk.AutomatonConstraint(bk.Automaton.forbids([1], vocab_size=3)),
            max_new_tokens=2,
        )
    declared = bk.AutomatonReward(
        bk.Automaton.counts(0, modulo=2, vocab_size=4), final_rewards=[0.0, 2.0], alpha=1.0, bounds=(0, 1)
    )
    posterior = bk.Posterior(bk.NgramLM(problems.gold_table(0.0), eos_token_id=3), declared, max_new_tokens=2)
    with pytest.raises(bk.RewardError, match="outside its declared bounds"):
        posterior.reward([[0, 3]])


LOOP: Any = [[0, 1], [1, 1]]
NONE: Any = None


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: bk.Automaton([[0, 1], [1]]), "rows of one length"),  # type: ignore[arg-type]
        (lambda: bk.Automaton(LOOP, 0, 2), r"accepting state must be one of 0\.\.1; got 2"),  # type: ignore[arg-type]
        (lambda: bk.Automaton(LOOP, 0, [1.7]), "got 1.7"),  # type: ignore[list-item]
        (lambda: bk.Automaton(LOOP, 0, ["a"]), "got 'a'"),  # type: ignore[list-item]
        (lambda: bk.Automaton(LOOP, 0, [1], ["a", "b"]), "values needs one number per state"),
        (lambda: bk.Automaton(LOOP, 0, [1], [np.nan, 1.0]), "no NaN"),
        (lambda: bk.Automaton.contains("ab", vocab_size=3), "Encode a text first"),  # type: ignore[arg-type]
        (lambda: bk.Automaton.contains(1, vocab_size=3), "must be token ids"),  # type: ignore[arg-type]
        (lambda: bk.Automaton.contains([0.5], vocab_size=3), "got 0.5 among them"),  # type: ignore[list-item]
        (lambda: bk.Automaton.contains([1], vocab_size=3, eos_token_ids=NONE), "EOS must be token ids"),
        (lambda: bk.Automaton.contains([0, 2], vocab_size=3, eos_token_ids=2), "has the EOS id 2"),
        (lambda: bk.Automaton.counts([2], modulo=2, vocab_size=3, eos_token_ids=2), "has the EOS id 2"),
        (lambda: bk.Automaton.levenshtein([0, 2], max_distance=0, vocab_size=3, eos_token_ids=2), "has the EOS id 2"),
        (lambda: bk.Automaton.regex(NONE, vocab_size=3), "The pattern must be a str"),
        (lambda: bk.Automaton.regex("a", vocab_size=3, alphabet=["a"]), "a mapping from char"),  # type: ignore[arg-type]
        (lambda: bk.Automaton.regex("a", vocab_size=3, alphabet={"a": 7}), "outside the vocabulary"),
        (lambda: bk.Automaton(LOOP).product(NONE), "another Automaton"),
        (lambda: bk.AutomatonConstraint(NONE), "bk.Automaton; got None"),
        (lambda: bk.AutomatonReward(NONE, alpha=1.0), "bk.Automaton; got None"),
        (lambda: bk.AutomatonReward(bk.Automaton(LOOP), final_rewards=["x", "y"], alpha=1.0), "array of numbers"),
    ],
)
def test_what_is_no_automaton_is_named(build: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        build()
