"""Korbak, Perez and Buckley (2022) and Korbak et al. (2022): the equivalences between RL and inference, to rounding.

    J(q) = E_q[r] - alpha KL(q || p0) = alpha log Z - alpha KL(q || p*)        for every q: the optimum is the posterior
    grad J = -alpha grad KL(q || p*)                                           RL with a KL penalty is variational inference
    E_q[(p* / q - 1) grad log q] = -grad KL(p* || q)                           DPG, with the baseline 1
    alpha = 0: all probability on argmax r                                     reward maximisation collapses

The first three are checked at random tables of next tokens after every prefix of the gamble of theory.md 8.12, by
automatic differentiation. `bk.audit` trains such a table by exact gradients with and without the penalty. Korbak et
al. add a baseline to DPG (GDC++ against GDC): its gradient's variance is exact here, and `bk.SVI` trains tiny GPT-2
models with and without it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import bayes_klrl as bk
from bayes_klrl.inference.exact.oracles import Enumerated
from bayes_klrl.inference.svi.losses import LeaveOneOut
from bayes_klrl.problems import audit_posterior, gpt2_task, rare_feature
from bayes_klrl.randomness import generator
from bayes_klrl.typing import Array
from benchmarks.papers.record import Claim, Paper, Table, interval
from benchmarks.papers.truth import EnumeratedTruth, entropy, kl

__all__ = ["PlainDPG", "RewardOnly", "TablePolicy", "identities", "study"]

_ROUNDING = 1e-10


class TablePolicy:
    """A table of logits after every prefix of an enumerated problem, differentiable: any policy at all.

    Parameters
    ----------
    problem
        The enumerated problem, of one prompt.
    logits
        Shape (S, V); they become a leaf.
    """

    def __init__(self, problem: Enumerated, logits: Tensor) -> None:
        tree = problem.tree
        self.logits = logits.detach().clone().requires_grad_()
        table = self.logits.log_softmax(dim=1)[torch.as_tensor(tree.states), torch.as_tensor(tree.tokens)]
        self.log_q = torch.where(torch.as_tensor(tree.mask), table, 0.0).sum(dim=1)  # (M,)

    def grad(self, value: Tensor) -> Tensor:
        """Return the gradient of a scalar in the logits, (S, V)."""
        (gradient,) = torch.autograd.grad(value, self.logits, retain_graph=True)
        return gradient

    def score_mean(self, weights: Tensor) -> Tensor:
        """Return E_q[weight grad log q], weights (M,) without gradient: the gradient that draws of q estimate."""
        return self.grad((self.log_q.detach().exp() * weights.detach() * self.log_q).sum())

    def score_variance(self, weights: Tensor) -> float:
        """Return the trace of the covariance of weight(x) grad log q(x) under q."""
        scores = torch.stack([self.grad(each).ravel() for each in self.log_q])  # (M, S V)
        terms, q = weights.detach()[:, None] * scores, self.log_q.detach().exp()
        mean = q @ terms
        return float((q @ (terms - mean).square()).sum())


def identities(problem: Enumerated, logits: Tensor) -> dict[str, float]:
    """Return the largest relative error of each identity at one policy."""
    policy, alpha = TablePolicy(problem, logits), problem.posterior.alpha
    log_p0, reward = torch.as_tensor(problem.log_prior[0]), torch.as_tensor(problem.reward[0])
    log_z = (log_p0 + reward / alpha).logsumexp(dim=0)
    log_p, log_q = log_p0 + reward / alpha - log_z, policy.log_q
    q, p = log_q.exp(), log_p.exp()
    objective = (q * reward).sum() - alpha * (q * (log_q - log_p0)).sum()
    reverse, forward = (q * (log_q - log_p)).sum(), (p * (log_p - log_q)).sum()
    ratio = (log_p - log_q).exp()
    return_of_draws = reward - alpha * (log_q - log_p0)
    pairs = {
        "J(q) = alpha log Z - alpha KL(q || p*)": (objective, alpha * (log_z - reverse)),
        "grad J = -alpha grad KL(q || p*)": (policy.grad(objective), -alpha * policy.grad(reverse)),
        "policy gradient of r - alpha k1 = grad J": (policy.score_mean(return_of_draws), policy.grad(objective)),
        "DPG: E_q[p*/q grad log q] = -grad KL(p* || q)": (policy.score_mean(ratio), -policy.grad(forward)),
        "DPG with baseline 1: the same": (policy.score_mean(ratio - 1), -policy.grad(forward)),
    }
    return {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, (a, b) in pairs.items()}


class RewardOnly:
    """The policy gradient of the reward, without any KL: a loss for `bk.audit`."""

    exact: ClassVar[bool] = True

    def __call__(self, batch: bk.LossInputs) -> Tensor:
        """Return the loss."""
        return -batch.mean(batch.leave_one_out(batch.rewards) * batch.log_probs.sum(dim=1))


class PlainDPG:
    """DPG without the baseline: weights N w_n / sum_m w_m. `bk.ForwardKL` subtracts 1 from them."""

    zero_likelihood: ClassVar[bool] = True

    def weights(self, log_weights: Array, log_evidence: Array, xp: Any) -> Array:
        """See `bayes_klrl.inference.svi.objectives.Objective.weights`."""
        return bk.ForwardKL().weights(log_weights, log_evidence, xp) + 1.0


def study(*, num_seeds: int = 5, tiny: bool = False) -> Paper:
    """Return the study."""
    problem = Enumerated.of(audit_posterior())
    errors = _errors(problem, num_seeds, 2 if tiny else 20)
    rounding = Table(
        f"Largest relative error at {num_seeds * (2 if tiny else 20)} random policies",
        ("identity", "error"),
        tuple((name, f"{error:.0e}") for name, error in errors.items()),
    )
    collapse, ends = _collapse(tiny=tiny)
    variance, ratio = _variance(problem)
    training, ahead = _baseline(num_seeds, (3, 32) if tiny else (40, 256), tiny=tiny)
    moment, is_met = _moment()
    return Paper(
        "korbak2022",
        "Korbak, Perez and Buckley 2022, RL with KL penalties is better viewed as Bayesian inference; Korbak et al. 2022, On "
        "reinforcement learning and distribution matching",
        "The gamble (40 completions) by automatic differentiation, P8, and tiny GPT-2 models trained by SVI.",
        (
            Claim(
                "the KL-regularised return is alpha times the ELBO: its gradient is -alpha grad KL(q || p*), its optimum p*",
                "reproduced" if max(errors.values()) < _ROUNDING and ends["penalty"] < 1e-6 else "not reproduced",
                f"to rounding ({max(errors.values()):.0e}); trained by exact gradients the table ends {ends['penalty']:.0e} "
                "nats from p*",
            ),
            Claim(
                "without the penalty, reward maximisation collapses onto the best completion",
                "reproduced" if ends["mass"] > 0.99 else "not reproduced",
                f"{ends['mass']:.4f} of the probability is on the completions of largest reward",
            ),
            Claim(
                "DPG descends the forward KL, and a moment constraint (GDC) is met where reward maximisation overshoots",
                "reproduced" if is_met and max(errors.values()) < _ROUNDING else "not reproduced",
                "the identity holds to rounding; see the last table for the moment",
            ),
            Claim(
                "a baseline makes DPG better (GDC++ against GDC: nearer to the target on 10 of 10 tasks)",
                "reproduced" if all(ahead.values()) else "partly" if any(ahead.values()) else "not reproduced",
                f"variance without / with the baseline: {ratio[0]:.1f} at the prior, {ratio[-1]:.0f} near the posterior; with "
                f"it KL(p* || q) is lower on {sum(ahead.values())} of {len(ahead)} tasks, by more than its interval",
            ),
        ),
        (rounding, collapse, variance, training, moment),
        num_seeds,
    )


def _errors(problem: Enumerated, num_seeds: int, each: int) -> dict[str, float]:
    """Return the largest error of each identity over random policies."""
    shape, worst = problem.prior_table[0].shape, {}
    for seed in range(num_seeds):
        rng = generator(seed)
        for _ in range(each):
            found = identities(problem, torch.as_tensor(2 * rng.standard_normal(shape)))
            worst = {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
    return worst


def _collapse(*, tiny: bool) -> tuple[Table, dict[str, float]]:
    """Return where the table ends with and without a penalty, and the posteriors of smaller and smaller alpha."""
    steps = {"num_steps": 40} if tiny else {}
    with_penalty, without = bk.audit(LeaveOneOut(), **steps), bk.audit(RewardOnly(), **steps)
    truth = EnumeratedTruth.of(audit_posterior())
    best = truth.reward == truth.reward.max()
    rows = []
    for label, law in (
        ("trained with the penalty, alpha 0.4", with_penalty.policy.log_probs[0]),
        ("trained without", without.policy.log_probs[0]),
        *((f"the posterior of alpha {alpha:g}", truth.tilted(1 / alpha)) for alpha in (0.4, 0.1, 0.02)),
    ):
        numbers = (truth.mean_reward(law), float(np.exp(law)[best].sum()), entropy(law))
        rows.append((label, *(round(value, 4) for value in numbers)))
    columns = ("policy", "E_q[r]", "mass on the best", "entropy (nats)")
    ends = {"penalty": max(with_penalty.kl_to_posterior, 0.0), "mass": without.best_reward_mass}
    return Table("The gamble: with a KL penalty, and without", columns, tuple(rows)), ends


def _variance(problem: Enumerated) -> tuple[Table, list[float]]:
    """Return the exact variance of DPG's gradient from the prior to near the posterior, without and with the baseline."""
    log_p = torch.as_tensor(problem.log_posterior(1 / problem.posterior.alpha)[0])
    rows, ratios = [], []
    for share in (0.0, 0.5, 0.9, 0.99):
        tilted = problem.log_posterior(share / problem.posterior.alpha)
        policy = TablePolicy(problem, torch.as_tensor(problem.tree.conditionals(tilted)[0]))
        ratio = (log_p - policy.log_q).exp()
        plain, centred = policy.score_variance(ratio), policy.score_variance(ratio - 1)
        ratios.append(plain / centred)
        rows.append(
            (f"the posterior at {share:.0%} of b", *(float(f"{v:.4g}") for v in (plain, centred, plain / centred)))
        )
    caption = "The gamble: trace of the covariance of DPG's gradient from one draw of q, exact"
    return Table(caption, ("q", "without the baseline", "with it", "ratio"), tuple(rows)), ratios


def _baseline(num_seeds: int, size: tuple[int, int], *, tiny: bool) -> tuple[Table, dict[str, bool]]:
    """Return KL(p* || q) after training by DPG without and with the baseline."""
    rows, ahead = [], {}
    for name in ("gpt2-8x4",) if tiny else ("gpt2-8x4", "gpt2-7x5", "gpt2-8x4-sharp"):
        truth = EnumeratedTruth.of(gpt2_task(name))
        plain, centred = (
            np.array(
                [
                    truth.both_kls(bk.SVI(*size, objective=objective).fit(truth.posterior, seed=seed).guide)
                    for seed in range(num_seeds)
                ]
            )
            for objective in (PlainDPG(), "forward_kl")
        )
        gain = interval(plain[:, 1] - centred[:, 1])
        ahead[name] = gain.mean > gain.half_width
        rows.append((name, *(interval(each[:, d]) for d in (1, 0) for each in (plain, centred))))
    columns = (
        "task",
        *(f"{what}, {with_}" for what in ("KL(p* || q)", "KL(q || p*)") for with_ in ("plain", "baseline")),
    )
    return Table(f"DPG for {size[0]} steps of {size[1]} completions", columns, tuple(rows)), ahead


def _moment() -> tuple[Table, bool]:
    """Return P8: the feature's mean under the prior, the constraint's posterior, and the maximiser of the mean."""
    found = rare_feature(0.5)
    truth = EnumeratedTruth.of(found.posterior)
    feature = (truth.reward > truth.reward.min()).astype(np.float64)
    met = float(np.exp(truth.log_posterior) @ feature)
    conditioned = np.where(feature > 0, truth.log_prior, -np.inf)
    conditioned = conditioned - np.log(np.exp(conditioned).sum())
    rows = tuple(
        (label, round(float(np.exp(law) @ feature), 4), round(kl(law, truth.log_prior), 4))
        for label, law in (
            ("the prior", truth.log_prior),
            (f"moment constraint, lambda = {found.lambdas[0]:.3f}", truth.log_posterior),
            ("reward maximisation", conditioned),
        )
    )
    caption = "P8: a feature of prior mean 0.07 is wanted half of the time"
    return Table(caption, ("law", "E[f]", "KL(. || p0)"), rows), abs(met - 0.5) < 1e-8
