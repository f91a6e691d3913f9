"""The audit of losses: every row of theory.md 2.7 by brute force, the oracles, the verdicts, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bayes_klrl as bk
from bayes_klrl import problems
from bayes_klrl.analysis.audit.objectives import probe, regulariser_gradients, return_gradient
from bayes_klrl.analysis.audit.training import LossGradient
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
from tests.helpers.truth import Truth, full_table, random_posterior

PROBLEMS = {
    "gamble": problems.audit_posterior,
    "random": lambda: random_posterior(5, num_tokens=3, alpha=0.3),
    "two EOS": lambda: random_posterior(8, num_tokens=3, eos=(1, 3), alpha=0.5, prompts=((0, 2),)),
}


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


@pytest.mark.slow
def test_trls_own_words_for_scaling_are_taken_and_others_refused() -> None:
    """A string that is merely truthy would switch scaling on without a word."""
    scaled, unscaled = (bk.audit(GRPO(scale_rewards=word)).verdict for word in ("group", "none"))
    assert scaled == bk.audit(GRPO()).verdict
    assert unscaled == bk.audit(GRPO(scale_rewards=False)).verdict == "myopic"
    with pytest.raises(bk.BayesKLRLError, match="scale_rewards must be"):
        GRPO(scale_rewards="batch")  # type: ignore[arg-type]
