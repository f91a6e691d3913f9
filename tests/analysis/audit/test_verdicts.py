"""Verdicts on losses: known ones, those that users write, and mistakes that people make."""

import numpy as np
import pytest
import torch
from torch import Tensor

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.analysis.audit.objectives import REGULARISERS
from bayes_klrl.inference.exact.oracles import Enumerated
from bayes_klrl.inference.svi.loss_inputs import Loss, LossInputs
from bayes_klrl.inference.svi.losses import (
    DPO,
    GRPO,
    KLPenalty,
    LeaveOneOut,
    LogVariance,
    RaoBlackwell,
)
from tests.analysis.audit.test_audit import PROBLEMS


def binary_posterior(alpha: float) -> bk.Posterior:
    """Success is to hold a token 0: reward 1, else 0."""
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 0).any(axis=1).astype(float), alpha=alpha)
    return bk.Posterior(bk.NgramLM(problems.gold_table(0.5), eos_token_id=3), reward, prompts="", max_new_tokens=3)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", [LeaveOneOut(), GRPO(scale_rewards=False), KLPenalty("token_k3", "loss"), KLPenalty("k1", "loss")]
)
def test_draws_and_expectations_agree(loss: Loss) -> None:
    exact, drawn = bk.audit(loss), bk.audit(loss, num_draws=4096, seed=1)
    assert exact.num_draws is None
    assert drawn.verdict == exact.verdict
    if exact.verdict != "collapsed":
        assert drawn.policy.kl_to(exact.policy.log_probs)[0] < 1e-4


@pytest.mark.slow
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


def beta_of_its_own(batch: LossInputs) -> Tensor:
    returns = batch.rewards - 0.25 * (batch.old_log_probs - batch.ref_log_probs).sum(1)
    return -((returns - returns.mean()) * batch.log_probs.sum(1)).mean()


def ascending(batch: LossInputs) -> Tensor:
    return ((batch.rewards - batch.rewards.mean()) * batch.log_probs.sum(1)).mean()


@pytest.mark.slow
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
