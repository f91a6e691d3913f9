"""The audit of losses: every row of theory.md 2.7 by brute force, the oracles, the verdicts, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.analysis.audit.objectives import REGULARISERS, probe, regulariser_gradients, return_gradient
from bayes_klrl.analysis.audit.training import LossGradient
from bayes_klrl.inference.exact.oracles import Enumerated, implied_inverse_alpha, nearest_myopic
from bayes_klrl.inference.svi.losses import (
    DPO,
    GRPO,
    KLPenalty,
    LeaveOneOut,
    LogVariance,
    Loss,
    LossInputs,
    RaoBlackwell,
)
from tests.helpers.truth import Truth, full_table, random_posterior

PROBLEMS = {
    "gamble": problems.audit_posterior,
    "random": lambda: random_posterior(5, num_tokens=3, alpha=0.3),
    "two EOS": lambda: random_posterior(8, num_tokens=3, eos=(1, 3), alpha=0.5, prompts=((0, 2),)),
}


def binary_posterior(alpha: float) -> bk.Posterior:
    """Success is to hold a token 0: reward 1, else 0."""
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 0).any(axis=1).astype(float), alpha=alpha)
    return bk.Posterior(bk.NgramLM(problems.gold_table(0.5), eos_token_id=3), reward, prompts="", max_new_tokens=3)


class BruteForce:
    """Objectives straight from the definitions: a dict of logits a prefix, loops over completions."""

    def __init__(self, posterior: bk.Posterior, logits: Tensor) -> None:
        self.truth = Truth(posterior)
        self.prefixes = Enumerated.of(posterior).tree.prefixes
        self.rows = {prefix: logits[s].log_softmax(0) for s, prefix in enumerate(self.prefixes)}
        prior_table = Enumerated.of(posterior).prior_table[0]
        self.prior_rows = {prefix: torch.tensor(prior_table[s]) for s, prefix in enumerate(self.prefixes)}
        self.log_q = torch.stack([self.log_prob(self.rows, x) for x in self.truth.xs])
        self.log_p = torch.tensor(self.truth.log_prior[0])
        self.reward = torch.tensor(self.truth.reward[0])

    @staticmethod
    def log_prob(rows: dict[tuple[int, ...], Tensor], x: list[int]) -> Tensor:
        return torch.stack([rows[tuple(x[:t])][token] for t, token in enumerate(x)]).sum()

    def reach(self, prefix: tuple[int, ...]) -> Tensor:
        return self.log_prob(self.rows, list(prefix)).exp() if prefix else torch.tensor(1.0, dtype=torch.float64)

    def frozen(self, kl: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """E sum_t KL_t, prefixes as constants."""
        return torch.stack([self.reach(s).detach() * kl(self.rows[s], self.prior_rows[s]) for s in self.prefixes]).sum()

    def regulariser(self, name: str) -> Tensor:
        q, p, log_ratio = self.log_q.exp(), self.log_p.exp(), self.log_q - self.log_p
        match name:
            case "zero":
                return 0 * self.log_q.sum()
            case "reverse":
                return (q * log_ratio).sum()
            case "forward":
                return -(p * log_ratio).sum()
            case "reverse - forward":
                return (q * log_ratio).sum() + (p * log_ratio).sum()
            case "k2 in reward":  # the score function of a detached k2: no KL's gradient, and a definition all the same
                return (q * (log_ratio.detach() ** 2 / 2)).sum()
            case "myopic":
                return self.frozen(lambda q, p: (q.exp() * (q - p)).sum())
            case _:
                return self.frozen(lambda q, p: (p.exp() * (p - q)).sum())

    def expected_reward(self) -> Tensor:
        return (self.log_q.exp() * self.reward).sum()


TABLE = {  # the rows of theory.md 2.7
    "k1 in loss": (KLPenalty("k1", "loss"), "zero"),
    "k2 in loss": (KLPenalty("k2", "loss"), "reverse"),
    "k3 in loss": (KLPenalty("k3", "loss"), "forward"),
    "k1 in reward": (KLPenalty("k1", "reward"), "reverse"),
    "k2 in reward": (KLPenalty("k2", "reward"), "k2 in reward"),
    "k3 in reward": (KLPenalty("k3", "reward"), "reverse - forward"),
    "rho k1 in loss": (KLPenalty("k1", "loss", ratio=True), "reverse"),
    "rho k3 in loss": (KLPenalty("k3", "loss", ratio=True), "reverse"),
    "token k2 in loss": (KLPenalty("token_k2", "loss"), "myopic"),
    "full-vocabulary token KL in loss": (KLPenalty("full", "loss"), "myopic"),
    "token rho k3 in loss": (KLPenalty("token_k3", "loss", ratio=True), "myopic"),
    "token k3 in loss": (KLPenalty("token_k3", "loss"), "forward myopic"),
    "leave one out": (LeaveOneOut(), "reverse"),
    "log variance": (LogVariance(), "reverse"),
    "Rao-Blackwell": (RaoBlackwell(), "reverse"),
}


def expected_gradient(loss: Loss, posterior: bk.Posterior, logits: Tensor, num_draws: int | None = None) -> Tensor:
    gradient = LossGradient(
        loss,
        Enumerated.of(posterior),
        alpha=posterior.alpha,
        num_draws=num_draws,
        draw_from_prior=False,
        rng=np.random.default_rng(0),
    )
    return gradient(logits)


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("name", PROBLEMS)
def test_expected_gradients_are_those_of_the_table(row: str, name: str) -> None:
    posterior = PROBLEMS[name]()
    loss, regulariser = TABLE[row]
    logits = probe(Enumerated.of(posterior))
    exact = BruteForce(posterior, logits)
    value = -exact.expected_reward() + posterior.alpha * exact.regulariser(regulariser)
    (expected,) = torch.autograd.grad(value, logits)
    error = (expected_gradient(loss, posterior, logits) - expected).abs().max()
    assert error < 1e-10
    if row == "k1 in reward":  # the rows are not all alike: the table can be told apart here
        for other in ("zero", "forward", "reverse - forward", "k2 in reward", "myopic", "forward myopic"):
            exact = BruteForce(posterior, logits)
            value = -exact.expected_reward() + posterior.alpha * exact.regulariser(other)
            assert (torch.autograd.grad(value, logits)[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k1"])
def test_the_length_normalised_row_follows_neither(estimator: str) -> None:
    posterior = problems.audit_posterior()
    problem = Enumerated.of(posterior)
    audit = bk.audit(KLPenalty(estimator, "loss" if estimator == "k2" else "reward", per_length=True))  # type: ignore[arg-type]
    assert audit.verdict == "nothing"
    assert max(cosine for cosine, _ in audit.kl_gradients.values()) < 0.999
    assert audit.policy.kl_to(problem.log_prior)[0] > 1


def test_regularisers_are_those_of_the_brute_force() -> None:
    posterior = PROBLEMS["random"]()
    problem = Enumerated.of(posterior)
    logits = probe(problem)
    names = ("reverse", "forward", "reverse - forward", "myopic", "forward myopic")
    for ours, name in zip(regulariser_gradients(problem, logits).values(), names, strict=True):
        (expected,) = torch.autograd.grad(BruteForce(posterior, logits).regulariser(name), logits)
        assert (ours - expected).abs().max() < 1e-12
    exact = BruteForce(posterior, logits)
    value = posterior.alpha * exact.regulariser("reverse") - exact.expected_reward()
    (expected,) = torch.autograd.grad(value, logits)
    assert (return_gradient(problem, logits, posterior.alpha) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_log_variance_batch_by_batch(seed: int) -> None:
    posterior = random_posterior(seed, num_tokens=3)
    logits = probe(Enumerated.of(posterior), seed=seed)
    ours = expected_gradient(LeaveOneOut(), posterior, logits, num_draws=16)
    other = expected_gradient(LogVariance(), posterior, logits, num_draws=16)
    assert ours.abs().max() > 1e-2
    assert (ours - other).abs().max() < 1e-15


def test_draws_are_as_even_as_can_be() -> None:
    """Each completion is there N q(x) times to within one, so the gradient of draws is the exact one to O(1 / N)."""
    posterior = problems.audit_posterior()
    problem = Enumerated.of(posterior)
    logits = probe(problem)
    seen: list[LossInputs] = []

    def look(batch: LossInputs) -> Tensor:
        seen.append(batch)
        return batch.log_probs.sum()

    for num in (64, 4096):
        expected_gradient(look, posterior, logits, num_draws=num)
        rows = [tuple(ids[:n]) for ids, n in zip(seen[-1].tokens.tolist(), seen[-1].mask.sum(1).tolist(), strict=True)]
        policy = problem.policy(logits.detach().log_softmax(-1).numpy()[None])
        for x, log_q in zip(problem.tree.sequences.lists(), policy.log_probs[0], strict=True):
            assert abs(rows.count(tuple(x)) - num * np.exp(log_q)) < 1
        assert rows != sorted(rows)
    exact = expected_gradient(GRPO(), posterior, logits)
    assert (expected_gradient(GRPO(), posterior, logits, num_draws=2**16) - exact).norm() < 1e-3 * exact.norm()


def test_leave_one_out_leaves_one_out() -> None:
    posterior = random_posterior(0, num_tokens=3)
    seen: list[LossInputs] = []

    def look(batch: LossInputs) -> Tensor:
        seen.append(batch)
        return batch.log_probs.sum()

    expected_gradient(look, posterior, probe(Enumerated.of(posterior)), num_draws=5)
    rewards = seen[0].rewards
    expected = [r - rewards[torch.arange(5) != n].mean() for n, r in enumerate(rewards)]
    torch.testing.assert_close(seen[0].leave_one_out(rewards), torch.stack(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("from_prior", [True, False])
def test_completions_are_of_the_policy_or_of_the_prior(from_prior: bool) -> None:
    problem = Enumerated.of(problems.audit_posterior())
    logits = probe(problem)
    seen: list[LossInputs] = []

    def look(batch: LossInputs) -> Tensor:
        seen.append(batch)
        return batch.log_probs.sum()

    LossGradient(look, problem, alpha=1.0, num_draws=None, draw_from_prior=from_prior, rng=np.random.default_rng(0))(
        logits
    )
    policy = problem.policy(logits.detach().log_softmax(-1).numpy()[None])
    drawn_by = problem.log_prior[0] if from_prior else policy.log_probs[0]
    np.testing.assert_allclose(seen[0].weights, np.exp(drawn_by), atol=1e-14)
    np.testing.assert_allclose(seen[0].old_log_probs.sum(1), drawn_by, atol=1e-12)
    np.testing.assert_allclose(seen[0].log_probs.detach().sum(1), policy.log_probs[0], atol=1e-12)


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


# --- verdicts

VERDICTS = {
    "posterior": [
        LeaveOneOut(),
        LeaveOneOut(normalize_advantages=True),
        LogVariance(),
        RaoBlackwell(),
        KLPenalty("k2", "loss"),
        KLPenalty("k3", "loss", ratio=True),
        DPO(),
    ],
    "myopic": [
        GRPO(scale_rewards=False),
        GRPO(scale_rewards=False, loss_type="dr_grpo"),
        KLPenalty("token_k2", "loss"),
        KLPenalty("full", "loss"),
    ],
    "forward myopic": [GRPO(scale_rewards=False, use_bias_correction_kl=False), KLPenalty("token_k3", "loss")],
    "posterior at another alpha": [KLPenalty("k1", "reward", scale_rewards=True)],
    "forward myopic at another alpha": [GRPO(use_bias_correction_kl=False)],
    "collapsed": [KLPenalty("k1", "loss")],
    "nothing": [
        KLPenalty("k3", "loss"),
        KLPenalty("k3", "reward"),
        KLPenalty("k2", "reward"),
        GRPO(scale_rewards=False, loss_type="grpo"),
    ],
}
SCALED = ("posterior at another alpha", "forward myopic at another alpha")


@pytest.mark.parametrize(
    "verdict, loss", [(verdict, loss) for verdict, losses in VERDICTS.items() for loss in losses], ids=str
)
def test_verdicts(verdict: str, loss: Loss) -> None:
    audit = bk.audit(loss)
    assert audit.verdict == verdict, str(audit)
    assert str(audit).startswith(verdict.upper())
    near = {"posterior": 0, "myopic": 1, "forward myopic": 2}
    if verdict in near:
        assert audit.targets[near[verdict]].kl < (1e-5 if isinstance(loss, DPO) else 1e-12)
        others = [target.kl for i, target in enumerate(audit.targets) if i != near[verdict]]
        assert min(others) > 0.1
        assert audit.settled
    if verdict in SCALED:
        fit = audit.implied[0 if verdict.startswith("posterior") else 2]
        assert fit.kl < 1e-10
        assert fit.alpha == pytest.approx(audit.alpha * (audit.reward_sd + 1e-4), rel=1e-6)
        assert "standard deviation" in audit.explanation
    if verdict == "posterior" and not isinstance(loss, DPO):
        scale = audit.gradient_norm_ratio
        assert audit.gradient_cosine == pytest.approx(1, abs=1e-12)
        assert scale == pytest.approx(1, abs=1e-12) or getattr(loss, "normalize_advantages", False)


@pytest.mark.parametrize("name", ["random", "two EOS"])
def test_verdicts_on_other_problems(name: str) -> None:
    posterior = PROBLEMS[name]()
    assert bk.audit(LeaveOneOut(), posterior).verdict == "posterior"
    grpo = bk.audit(GRPO(scale_rewards=False), posterior)
    assert (grpo.verdict, grpo.kl_to_myopic < 1e-12, grpo.kl_to_posterior > 0.01) == ("myopic", True, True)
    # here alpha x sd(p* at a) < a for every a: the smaller the spread, the smaller the alpha, and no solution inside
    scaled = bk.audit(KLPenalty(scale_rewards=True), posterior)
    assert scaled.verdict == "collapsed"
    for a in np.geomspace(1e-3, 2, 50):
        p = np.exp(Enumerated.of(posterior).log_posterior(1 / a)[0])
        reward = Enumerated.of(posterior).reward[0]
        assert posterior.alpha * np.sqrt(p @ (reward - p @ reward) ** 2) < a
    assert bk.audit(KLPenalty("k1", "loss"), posterior).verdict == "collapsed"
    assert bk.audit(KLPenalty("token_k3", "loss"), posterior).verdict == "forward myopic"


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_scaled_binary_rewards_become_hard_conditioning(alpha: float) -> None:
    posterior = binary_posterior(alpha)
    audit = bk.audit(KLPenalty(scale_rewards=True), posterior)
    assert audit.verdict == "collapsed"
    assert "conditioning" in audit.explanation
    assert audit.reward > 0.9999


def test_scaled_binary_rewards_at_a_large_alpha_have_an_interior_solution() -> None:
    audit = bk.audit(KLPenalty(scale_rewards=True), binary_posterior(3.0))
    assert audit.verdict == "posterior at another alpha"
    assert audit.implied_alpha == pytest.approx(3 * (audit.reward_sd + 1e-4), rel=1e-6)


def test_dpo_has_the_posterior_as_its_optimum() -> None:
    audit = bk.audit(DPO(), num_steps=1500)
    assert audit.settled
    assert audit.kl_to_posterior < 1e-12


# --- losses as users write them, on draws


def trl_rloo(batch: LossInputs) -> Tensor:
    """TRL's RLOOTrainer in its own words, groups of 4."""
    kl = ((batch.old_log_probs - batch.ref_log_probs) * batch.mask).sum(-1)
    rewards = (batch.rewards - batch.alpha * kl).view(-1, 4)
    advantages = (rewards - (rewards.sum(1, keepdim=True) - rewards) / 3).view(-1)
    ratio = torch.exp(batch.log_probs.sum(-1) - batch.old_log_probs.sum(-1))
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def test_a_loss_on_draws_in_groups() -> None:
    audit = bk.audit(trl_rloo)
    assert (audit.verdict, audit.num_draws, audit.loss) == ("posterior", 4096, "trl_rloo")
    assert audit.kl_to_posterior < 1e-6
    assert audit.gradient_cosine > 0.999


@pytest.mark.parametrize(
    "loss", [LeaveOneOut(), GRPO(scale_rewards=False), KLPenalty("token_k3", "loss"), KLPenalty("k1", "loss")]
)
def test_draws_and_expectations_agree(loss: Loss) -> None:
    exact, drawn = bk.audit(loss), bk.audit(loss, num_draws=4096, seed=1)
    assert exact.num_draws is None
    assert drawn.verdict == exact.verdict
    if exact.verdict != "collapsed":
        assert drawn.policy.kl_to(exact.policy.log_probs)[0] < 1e-4


@pytest.mark.parametrize("group_size", [2, 8])
def test_a_group_mean_as_baseline_is_a_hidden_alpha_when_the_kl_is_in_the_loss(group_size: int) -> None:
    """A = r - mean r shrinks the reward's gradient by (G - 1) / G and leaves the KL's: alpha becomes alpha G / (G - 1)."""
    audit = bk.audit(GRPO(scale_rewards=False, group_size=group_size), num_draws=2**13)
    assert audit.verdict == "myopic at another alpha"
    assert audit.implied[1].alpha == pytest.approx(0.4 * group_size / (group_size - 1), rel=0.01)


@pytest.mark.slow
def test_a_larger_problem_has_more_noise_and_says_so() -> None:
    posterior = problems.gold_posterior()  # 1093 completions
    audit = bk.audit(GRPO(scale_rewards=False, group_size=8), posterior)
    assert audit.verdict == "myopic at another alpha"
    assert audit.implied[1].alpha == pytest.approx(posterior.alpha * 8 / 7, rel=0.01)
    assert 1e-4 < audit.noise < 5e-3
    assert bk.audit(GRPO(scale_rewards=False, group_size=8)).noise < 1e-4


def test_the_same_seed_gives_the_same_audit() -> None:
    first, second, other = (bk.audit(trl_rloo, num_steps=40, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.policy.table, second.policy.table)
    assert (first.policy.table != other.policy.table).any()


def test_the_scale_of_a_loss_does_not_matter() -> None:
    for scale in (1e-4, 1e4):
        audit = bk.audit(lambda batch, scale=scale: scale * trl_rloo(batch))
        assert audit.verdict == "posterior"


# --- mutations: each is a mistake that people make, and none passes as the posterior


def without_eos(batch: LossInputs) -> Tensor:
    """The last token's log-ratio is left out of the KL, as `ids != pad` does when pad == eos."""
    last = torch.nn.functional.one_hot(batch.mask.sum(1) - 1, batch.mask.shape[1]).bool()
    kl = ((batch.old_log_probs - batch.ref_log_probs) * ~last).sum(1)
    returns = batch.rewards - batch.alpha * kl
    return -((returns - returns.mean()) * batch.log_probs.sum(1)).mean()


def turned_round(batch: LossInputs) -> Tensor:
    returns = -batch.rewards - batch.alpha * (batch.old_log_probs - batch.ref_log_probs).sum(1)
    return -((returns - returns.mean()) * batch.log_probs.sum(1)).mean()


def standardised(batch: LossInputs) -> Tensor:
    rewards = (batch.rewards - batch.rewards.mean()) / batch.rewards.std()
    returns = rewards - batch.alpha * (batch.old_log_probs - batch.ref_log_probs).sum(1)
    return -((returns - returns.mean()) * batch.log_probs.sum(1)).mean()


def no_signal(batch: LossInputs) -> Tensor:
    return 0 * batch.log_probs.sum()


def only_kl(batch: LossInputs) -> Tensor:
    return (batch.log_probs.exp() * (batch.log_probs - batch.ref_log_probs)).sum(1).mean()


def beta_of_its_own(batch: LossInputs) -> Tensor:
    returns = batch.rewards - 0.25 * (batch.old_log_probs - batch.ref_log_probs).sum(1)
    return -((returns - returns.mean()) * batch.log_probs.sum(1)).mean()


def ascending(batch: LossInputs) -> Tensor:
    return ((batch.rewards - batch.rewards.mean()) * batch.log_probs.sum(1)).mean()


def test_mutations() -> None:
    assert bk.audit(without_eos).verdict == "nothing"
    wrong_sign = bk.audit(turned_round)
    assert (wrong_sign.verdict, "turned round" in wrong_sign.explanation) == ("posterior at another alpha", True)
    assert wrong_sign.implied_alpha == pytest.approx(-0.4, rel=1e-3)
    scaled = bk.audit(standardised)
    assert scaled.verdict == "posterior at another alpha"
    assert scaled.implied_alpha == pytest.approx(0.4 * scaled.reward_sd, rel=0.01)
    assert bk.audit(no_signal).verdict == "prior"
    own = bk.audit(beta_of_its_own)
    assert (own.verdict, own.kl_gradients["KL(q||p0)"][1]) == ("posterior at another alpha", 0.0)
    assert own.implied_alpha == pytest.approx(0.25, rel=1e-3)
    down = bk.audit(ascending)
    assert (down.verdict, "worst reward" in down.explanation) == ("collapsed", True)


def test_k1_in_the_loss_has_no_gradient_and_k3_in_the_reward_has_another() -> None:
    k1 = bk.audit(KLPenalty("k1", "loss"))
    assert k1.kl_gradients["KL(q||p0)"][1] < 1e-12
    k3 = bk.audit(KLPenalty("k3", "reward"))
    assert k3.kl_gradients["KL(q||p0) - KL(p0||q)"] == (pytest.approx(1), pytest.approx(1))
    assert not k3.settled
    assert list(k3.kl_gradients) == list(REGULARISERS)


# --- bad input


def diverges_later(batch: LossInputs) -> Tensor:
    """Finite at the prior only: the audit ends where it stops being a number."""
    distance = (batch.log_probs - batch.ref_log_probs).sum(1).detach().abs().max()
    value = -(batch.rewards * batch.log_probs.sum(1)).mean()
    return value * (torch.nan if 0.5 < distance < 1.0 else 1.0)


@pytest.mark.parametrize(
    "loss, message",
    [
        (3, "function of LossInputs"),
        (lambda batch: 0.5, "must return a torch scalar; it returned 0.5"),
        (lambda batch: batch.log_probs, r"a tensor of shape \(4096, 3\). Average it over"),
        (lambda batch: batch.rewards.mean(), "does not depend on the policy"),
        (lambda batch: batch.log_probs.detach().mean(), "does not depend on the policy"),
        (lambda batch: batch.log_probs.mean() * torch.nan, "The loss is nan"),
        (lambda batch: batch.log_probs.sum(1).square().sqrt().mean() / (batch.log_probs.sum() * 0), "not finite"),
        (lambda batch: batch.logits.mean(), "The loss raised AttributeError"),
        (DPO(), "Take a smaller problem or num_draws"),
        (GRPO(group_size=5), "Groups of 5 do not divide a batch of 4096"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.audit(loss, num_draws=6000 if isinstance(loss, DPO) else None)


def test_a_loss_that_stops_being_a_number_ends_the_training() -> None:
    audit = bk.audit(diverges_later)
    assert (audit.verdict, audit.settled) == ("nothing", False)


def breaks_at_its_optimum(batch: LossInputs) -> Tensor:
    """Whitened returns without an epsilon: 0 / 0 at the posterior, where all returns are equal."""
    returns = batch.rewards - batch.alpha * (batch.old_log_probs - batch.ref_log_probs).sum(1)
    spread = torch.where(returns.std() > 0.01, returns.std(), 0.0)
    return -((returns - returns.mean()) / spread * batch.log_probs.sum(1)).mean()


def test_what_did_not_settle_has_not_converged() -> None:
    audit = bk.audit(breaks_at_its_optimum)
    assert audit.kl_to_posterior < 1e-3
    assert (audit.verdict, audit.ending) == ("nothing", "the loss was not finite any more")
    assert audit.ending in audit.explanation
    short = bk.audit(LeaveOneOut(), num_steps=5)
    assert (short.verdict, short.settled, "num_steps" in short.explanation) == ("nothing", False, True)


def impossible(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.where(tokens[:, 0] == 1, -np.inf, 1.0)


@pytest.mark.parametrize(
    "posterior, message",
    [
        (lambda: problems.gold_posterior(max_new_tokens=12), "at most 20,000 completions; this one has 7.97e"),
        (lambda: random_posterior(1, num_tokens=2, prompts=((0,), (1,))), "of one prompt"),
        (lambda: 7, "must be a bk.Posterior"),
        (
            lambda: bk.Posterior(
                bk.NgramLM(problems.gold_table(0.0), eos_token_id=3),
                bk.TokenReward(impossible, alpha=1.0),
                max_new_tokens=2,
            ),
            "Relax the constraint",
        ),
        (
            lambda: bk.Posterior(
                bk.NgramLM(np.log(np.array([0.5, 0.5, 0.0]) + 1e-400), eos_token_id=1),
                bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0),
                max_new_tokens=2,
            ),
            "probability 0",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_problems_that_cannot_be_audited_are_refused(posterior: Callable[[], Any], message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.audit(LeaveOneOut(), posterior())


@pytest.mark.parametrize("options", [{"num_draws": 1}, {"num_steps": 0}, {"tolerance": 0.0}, {"seed": -1}], ids=str)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(bk.BayesKLRLError, match=next(iter(options))):
        bk.audit(LeaveOneOut(), **options)


def test_bad_settings_of_losses_are_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match="loss_type"):
        GRPO(loss_type="bnpo")  # type: ignore[arg-type]
    with pytest.raises(bk.BayesKLRLError, match="estimator"):
        KLPenalty("k4")  # type: ignore[arg-type]
    with pytest.raises(bk.BayesKLRLError, match="place"):
        KLPenalty("k1", "elsewhere")  # type: ignore[arg-type]
    with pytest.raises(bk.BayesKLRLError, match="alpha"):
        bk.myopic_policy(problems.audit_posterior(), alpha=-1.0)


def test_an_ngram_prior_of_a_longer_order_is_the_same_problem() -> None:
    """The tree sees the prior's numbers, not its form."""
    posterior = PROBLEMS["random"]()
    longer = bk.Posterior(full_table(posterior.prior, 3), posterior.likelihood, max_new_tokens=3)
    np.testing.assert_allclose(bk.myopic_policy(longer).log_probs, bk.myopic_policy(posterior).log_probs, atol=1e-12)


def test_trls_own_words_for_scaling_are_taken_and_others_refused() -> None:
    """A string that is merely truthy would switch scaling on without a word."""
    scaled, unscaled = (bk.audit(GRPO(scale_rewards=word)).verdict for word in ("group", "none"))
    assert scaled == bk.audit(GRPO()).verdict
    assert unscaled == bk.audit(GRPO(scale_rewards=False)).verdict == "myopic"
    with pytest.raises(bk.BayesKLRLError, match="scale_rewards must be"):
        GRPO(scale_rewards="batch")  # type: ignore[arg-type]
