"""Optimal policies of losses against their recursions, and as fixed points of the exact gradient."""

from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.analysis.audit.objectives import probe
from bayes_klrl.inference.exact.oracles import Enumerated, implied_inverse_alpha, nearest_myopic
from bayes_klrl.inference.svi.losses import (
    GRPO,
)
from tests.analysis.audit.test_audit import PROBLEMS, BruteForce
from tests.helpers.truth import Truth, random_posterior

# --- oracles


def recursion(posterior: bk.Posterior, alpha: float, kind: str) -> dict[tuple[int, ...], float]:
    """log q(x) of every completion by 8b's recursion, written out over prefixes."""
    truth = Truth(posterior)
    reward = {tuple(x): r for x, r in zip(truth.xs, truth.reward[0], strict=True)}
    p0 = {tuple(x): np.exp(lp) for x, lp in zip(truth.xs, truth.log_prior[0], strict=True)}
    log_q: dict[tuple[int, ...], float] = {}

    def mass(prefix: tuple[int, ...]) -> float:
        return sum(p for x, p in p0.items() if x[: len(prefix)] == prefix)

    def visit(prefix: tuple[int, ...], sofar: list[tuple[tuple[int, ...], Any]]) -> float:
        if prefix in reward:
            return reward[prefix]
        tokens = [(*prefix, a) for a in range(posterior.prior.vocab_size)]
        p = np.array([mass(s) for s in tokens]) / mass(prefix)
        values = np.array([visit(s, sofar) for s in tokens])
        q = p * np.exp((values - values.max()) / alpha)
        q /= q.sum()
        sofar += zip(tokens, q, strict=True)
        return q @ values if kind == "myopic" else alpha * np.log(p @ np.exp(values / alpha))

    steps: list[tuple[tuple[int, ...], Any]] = []
    visit((), steps)
    prob = dict(steps)
    for x in reward:
        log_q[x] = sum(np.log(prob[x[: t + 1]]) for t in range(len(x)))
    return log_q


@pytest.mark.parametrize("name", PROBLEMS)
def test_oracles_follow_their_recursions(name: str) -> None:
    posterior = PROBLEMS[name]()
    for policy, kind in ((bk.myopic_policy(posterior), "myopic"), (bk.posterior_policy(posterior), "posterior")):
        expected = recursion(posterior, posterior.alpha, kind)
        ours = dict(zip(map(tuple, policy.tree.sequences.lists()), policy.log_probs[0], strict=True))
        assert max(abs(ours[x] - expected[x]) for x in expected) < 1e-10
        assert np.exp(policy.log_probs).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_oracles_are_fixed_points_of_the_exact_gradient(name: str) -> None:
    posterior = PROBLEMS[name]()
    oracles = {
        "reverse": bk.posterior_policy(posterior),
        "myopic": bk.myopic_policy(posterior),
        "forward myopic": bk.myopic_policy(posterior, forward=True),
    }
    for oracle, policy in oracles.items():
        for objective in oracles:
            logits = torch.tensor(policy.table[0], requires_grad=True)
            exact = BruteForce(posterior, logits)
            value = posterior.alpha * exact.regulariser(objective) - exact.expected_reward()
            size = float(torch.autograd.grad(value, logits)[0].abs().max())
            assert size < 1e-10 if objective == oracle else size > 1e-3


def test_the_posterior_oracle_is_the_posterior_as_a_language_model() -> None:
    for posterior in (PROBLEMS["two EOS"](), random_posterior(2, num_tokens=3, prompts=((0,), (2,)), prompt_shift=0.5)):
        truth, policy = Truth(posterior), bk.posterior_policy(posterior)
        assert np.abs(truth.kl(policy.language_model())).max() < 1e-12
        np.testing.assert_allclose(
            policy.log_probs,
            bk.Posterior.log_prior(
                bk.Posterior(
                    policy.language_model(),
                    posterior.likelihood,
                    prompts=[list(ids) for ids in posterior.prompt_ids],
                    max_new_tokens=posterior.max_new_tokens,
                ),
                policy.sequences,
            ),
            atol=1e-12,
        )


def test_without_eos_prefixes_cannot_always_be_told_apart() -> None:
    policy = bk.myopic_policy(random_posterior(1, num_tokens=2, eos=()))
    assert np.exp(policy.log_probs).sum() == pytest.approx(1)
    with pytest.raises(bk.BayesKLRLError, match="has the same context"):
        policy.language_model()


def test_one_token_is_a_bandit_where_myopic_is_right() -> None:
    posterior = random_posterior(4, num_tokens=1, alpha=0.3)
    np.testing.assert_allclose(
        bk.myopic_policy(posterior).log_probs, bk.posterior_policy(posterior).log_probs, atol=1e-13
    )
    audit = bk.audit(GRPO(scale_rewards=False), posterior)
    assert audit.verdict == "posterior"
    assert "the myopic policy is the same" in audit.explanation


@pytest.mark.parametrize("b", [-1.5, 0.0, 0.7, 4.0])
def test_the_implied_alpha_is_the_projection(b: float) -> None:
    """Pythagoras, theory.md 1.7: E_q[r] fixes b, KL(q || p*_b) = KL(q || p0) - KL(p*_b || p0), and no b' is nearer."""
    problem = Enumerated.of(problems.audit_posterior())
    assert implied_inverse_alpha(problem, problem.log_posterior(b)[0]) == pytest.approx(b, abs=1e-9)
    policy = problem.policy(probe(problem, seed=3).detach().log_softmax(-1).numpy()[None])
    found = implied_inverse_alpha(problem, policy.log_probs[0])
    log_p = problem.log_posterior(found)
    spent = np.exp(log_p[0]) @ (log_p[0] - problem.log_prior[0])
    assert policy.kl_to(log_p)[0] == pytest.approx(policy.kl_to(problem.log_prior)[0] - spent, abs=1e-12)
    assert policy.kl_to(log_p)[0] < min(policy.kl_to(problem.log_posterior(found + d))[0] for d in (-0.05, 0.05))


@pytest.mark.parametrize("forward", [False, True])
def test_the_nearest_myopic_policy_is_found(forward: bool) -> None:
    problem = Enumerated.of(problems.audit_posterior())
    alpha, kl = nearest_myopic(problem, problem.myopic(0.237, forward=forward).log_probs[0], forward=forward)
    assert alpha == pytest.approx(0.237, rel=1e-6)
    assert abs(kl) < 1e-9


def test_the_default_problem_keeps_the_answers_apart() -> None:
    problem = Enumerated.of(problems.audit_posterior())
    star = problem.log_posterior(1 / problem.posterior.alpha)
    for forward in (False, True):
        policy = problem.myopic(problem.posterior.alpha, forward=forward)
        assert policy.kl_to(star)[0] > 1
        nearest = problem.log_posterior(implied_inverse_alpha(problem, policy.log_probs[0]))
        assert policy.kl_to(nearest)[0] > 0.9
        assert nearest_myopic(problem, star[0], forward=forward)[1] > 0.05
        assert nearest_myopic(problem, policy.log_probs[0], forward=not forward)[1] > 0.01
