"""What does a trainer's loss converge to? Plug it into a table that can be any policy, and look.

    print(bk.audit(lambda batch: ...))

KL-regularised RL has one right answer, the posterior p0 exp(r / alpha) / Z, and most placements of the KL in a loss do not
have it as their optimum (THEORY 2.5): some follow the myopic policy, some solve for another alpha, some for nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.loss_objectives import cosine_and_ratio, probe, regulariser_gradients, return_gradient
from bayes_klrl.inference.loss_training import LossGradient, train
from bayes_klrl.inference.oracles import Enumerated, implied_inverse_alpha, nearest_myopic
from bayes_klrl.models.prefix_policy import PrefixPolicy
from bayes_klrl.models.torch_losses import Loss
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems import audit_posterior
from bayes_klrl.randomness import generator
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import logsumexp

__all__ = ["Audit", "Target", "audit"]

_NUM_DRAWS = 4096
_NUM_STEPS = 400
_NUM_PROBES = 8  # batches that a gradient of draws is averaged over
_COLLAPSED_MASS = 0.999


@dataclass(frozen=True)
class Target:
    """Something that a policy may have converged to.

    Parameters
    ----------
    name
        "posterior", "myopic" or "forward myopic".
    alpha
        At which it is taken.
    kl
        KL(policy || target), in nats.
    """

    name: str
    alpha: float
    kl: float


@dataclass(frozen=True, eq=False)
class Audit:
    """What a loss converged to, and how its gradient compares; printing it shows one screen, the verdict first.

    Parameters
    ----------
    verdict
        "posterior", "myopic" or "forward myopic", each also "... at another alpha"; "collapsed" (onto the best, or worst,
        reward), "prior" (nothing was learned), or "nothing" (none of these, or it never settled).
    explanation
        A sentence or two on it.
    loss
        The loss's name.
    alpha
        The posterior's, which the loss was told.
    targets, implied
        Distances to the three families, at this alpha and at the alpha that fits each best.
    kl_to_prior, forward_kl
        KL(q || p0), and KL(p* || q), which is large when the policy has dropped a part of the posterior.
    reward, reward_sd
        Mean and standard deviation of the reward under the policy.
    best_reward_mass
        The policy's probability of the largest reward.
    gradient
        At a policy away from the prior: the cosine of the loss's expected gradient with the exact gradient of -alpha x ELBO =
        -E[r] + alpha KL(q || p0), and the ratio of their lengths.
    kl_gradients
        There, the part of the loss's gradient that grows with alpha against the exact gradient of each of
        `inference.loss_objectives.REGULARISERS`: cosine and ratio of lengths. (NaN, 0) for a part that is 0 on average, or
        a loss that does not read `batch.alpha`.
    num_draws
        Draws a step; None: every completion with its probability, the exact expectation.
    num_steps, settled
        How many steps were taken, and whether the policy stopped moving.
    policy
        What it converged to: `policy.log_probs`, `policy.language_model()`.
    """

    verdict: str
    explanation: str
    loss: str
    alpha: float
    targets: tuple[Target, ...]
    implied: tuple[Target, ...]
    kl_to_prior: float
    forward_kl: float
    reward: float
    reward_sd: float
    best_reward_mass: float
    gradient: tuple[float, float]
    kl_gradients: Mapping[str, tuple[float, float]]
    num_draws: int | None
    num_steps: int
    settled: bool
    policy: PrefixPolicy

    @property
    def implied_alpha(self) -> float:
        """The alpha of the nearest posterior: R(alpha) = E_q[r] (THEORY 1.6); negative below the prior's reward."""
        return self.implied[0].alpha

    @property
    def kl_to_posterior(self) -> float:
        """KL(q || p*), in nats."""
        return self.targets[0].kl

    @property
    def kl_to_implied_posterior(self) -> float:
        """KL(q || p* at `implied_alpha`), the least over alpha."""
        return self.implied[0].kl

    @property
    def kl_to_myopic(self) -> float:
        """KL(q || `myopic_policy`)."""
        return self.targets[1].kl

    @property
    def kl_to_forward_myopic(self) -> float:
        """KL(q || `myopic_policy(forward=True)`)."""
        return self.targets[2].kl

    @property
    def gradient_cosine(self) -> float:
        """The cosine with the exact gradient of -alpha x ELBO, minus the KL-regularised return."""
        return self.gradient[0]

    @property
    def gradient_norm_ratio(self) -> float:
        """The length relative to the exact gradient of -alpha x ELBO."""
        return self.gradient[1]

    def __str__(self) -> str:
        distances = [
            f"  {at.name:<38} {at.kl:>12.4f} {best.kl:>12.4f}   (alpha {best.alpha:.4g})"
            for at, best in zip(self.targets, self.implied, strict=True)
        ]
        slopes = [_slope_row(f"its KL part, of {name}", *pair) for name, pair in self.kl_gradients.items()]
        drawn = "every completion, weighted" if self.num_draws is None else f"{self.num_draws} draws a step"
        return "\n".join(
            [
                f"{self.verdict.upper()}: {self.loss} at alpha {self.alpha:g}",
                *textwrap.wrap(self.explanation, 110),
                "",
                f"{'KL of what it converged to, in nats, to':<40} {f'alpha {self.alpha:g}':>12} {'best alpha':>12}",
                *distances,
                f"  {'prior':<38} {self.kl_to_prior:>12.4f}",
                f"E[r] {self.reward:.4f}, sd {self.reward_sd:.4f}; probability of the best reward "
                f"{self.best_reward_mass:.4f}; KL(p*||q) {self.forward_kl:.4f}",
                "",
                f"{'its gradient away from the prior, against the exact one':<56} {'cosine':>8} {'length':>9}",
                _slope_row("of -E[r] + alpha KL(q||p0)", *self.gradient),
                *slopes,
                "",
                f"{self.num_steps} steps on {drawn}; {'settled' if self.settled else 'did not settle'}.",
            ]
        )


def _slope_row(name: str, cosine: float, ratio: float) -> str:
    """Return one row of the table of gradients."""
    return f"  {name:<54} {'' if np.isnan(cosine) else f'{cosine:.4f}':>8} {ratio:>9.4f}"


def audit(
    loss: Loss,
    posterior: Posterior | None = None,
    *,
    seed: int = 0,
    num_draws: int | None = None,
    num_steps: int = _NUM_STEPS,
    tolerance: float = 1e-3,
) -> Audit:
    """Return what a trainer's loss converges to: the posterior, a posterior at another alpha, a myopic policy, or nothing.

    The loss trains a policy with free next-token distributions after every prefix, from the prior, by its gradient on
    thousands of completions a step that are spread as evenly as the policy allows (`inference.loss_training` says how and
    why), so that neither the network nor chance has a part in the answer. A few seconds.

    Parameters
    ----------
    loss
        `loss(batch) -> scalar` to be minimised; `batch` is a `LossInputs`: log-probs (N, T) of policy, old policy and
        reference, mask, rewards (N,), alpha. Reference losses are in `bayes_klrl.models.torch_losses`.
    posterior
        A problem of one prompt that can be enumerated; None: `problems.audit_posterior()`, where the answers are far apart.
    seed
        Of the draws.
    num_draws
        Completions a step; a multiple of the loss's group size if it makes groups. None: 4096, or the exact expectation if
        the loss has an attribute `exact = True`.
    num_steps
        The most steps.
    tolerance
        How near a target the policy must come, in nats.

    Raises
    ------
    BayesKLRLError
        If the loss is not one (no scalar, no gradient, not finite), or the posterior is too large to enumerate.

    Examples
    --------
    The bare policy gradient with k1 in the reward, as RLOO has it, and with k1 in the loss, whose gradient is 0 on average.

    >>> def k1_in_reward(batch):
    ...     kl = (batch.log_probs.detach() - batch.ref_log_probs).sum(1)
    ...     returns = batch.rewards - batch.alpha * kl
    ...     return -((returns - returns.mean()) * batch.log_probs.sum(1)).mean()
    >>> audit(k1_in_reward).verdict
    'posterior'
    >>> def k1_in_loss(batch):
    ...     kl = (batch.log_probs - batch.ref_log_probs).sum(1)
    ...     advantages = batch.rewards - batch.rewards.mean()
    ...     return (batch.alpha * kl - advantages * batch.log_probs.sum(1)).mean()
    >>> audit(k1_in_loss).verdict
    'collapsed'
    """
    if not callable(loss):
        raise BayesKLRLError(f"The loss is a function of LossInputs that returns a scalar; got {loss!r}.")
    check_count("num_steps", num_steps, least=4)
    check_positive("tolerance", tolerance)
    problem = _one_prompt(audit_posterior() if posterior is None else posterior)
    if num_draws is None and not getattr(loss, "exact", False):
        num_draws = _NUM_DRAWS
    if num_draws is not None:
        check_count("num_draws", num_draws, least=2)
    gradient = LossGradient(
        loss,
        problem,
        alpha=problem.posterior.alpha,
        num_draws=num_draws,
        draw_from_prior=_draws_from_prior(loss),
        rng=generator(seed),
    )
    slope, kl_slope = _slopes(gradient, seed)
    trained = train(gradient, problem.prior_table[0], num_steps=num_steps, tolerance=tolerance / 10)
    found = _Found(problem, problem.policy(trained.table[None]), trained.settled, tolerance)
    verdict, explanation = found.verdict()
    return Audit(
        verdict=verdict,
        explanation=explanation,
        loss=str(getattr(loss, "__name__", loss)),
        alpha=problem.posterior.alpha,
        targets=found.targets,
        implied=found.implied,
        kl_to_prior=found.kl_to_prior,
        forward_kl=found.forward_kl,
        reward=found.reward,
        reward_sd=found.reward_sd,
        best_reward_mass=found.mass(_is_best(problem.reward[0])),
        gradient=slope,
        kl_gradients=kl_slope,
        num_draws=num_draws,
        num_steps=trained.num_steps,
        settled=trained.settled,
        policy=found.policy,
    )


def _one_prompt(posterior: Posterior) -> Enumerated:
    """Return the enumerated problem, refusing more than one prompt and completions that cannot be drawn."""
    if not isinstance(posterior, Posterior):
        raise BayesKLRLError(f"posterior must be a bk.Posterior, or None for the built-in problem; got {posterior!r}.")
    if posterior.num_prompts != 1:
        raise BayesKLRLError(
            f"An audit is of one prompt, as a loss's groups are; this posterior has {posterior.num_prompts}. Audit them one "
            "by one."
        )
    problem = Enumerated.of(posterior)
    if np.isneginf(problem.prior_table).any():
        raise BayesKLRLError(
            "The prior gives some tokens probability 0, whose log-ratios are not numbers. Give them a small probability."
        )
    return problem


def _draws_from_prior(loss: Loss) -> bool:
    """Return whether a loss asks for completions of the prior."""
    draw_from = getattr(loss, "draw_from", "policy")
    if draw_from not in ("policy", "prior"):
        raise BayesKLRLError(f'The loss\'s attribute draw_from must be "policy" or "prior"; got {draw_from!r}.')
    return bool(draw_from == "prior")


def _slopes(gradient: LossGradient, seed: int) -> tuple[tuple[float, float], Mapping[str, tuple[float, float]]]:
    """Return how the loss's expected gradient, and its part that grows with alpha, compare with the exact ones.

    The part is the difference of the gradients at 2 alpha and at alpha, on the same draws, over alpha: a reward that is much
    larger than the KL would hide it otherwise.
    """
    problem, alpha = gradient.problem, gradient.problem.posterior.alpha
    logits = probe(problem)

    def expected(told: float) -> torch.Tensor:
        batches = gradient.told(alpha=told, rng=generator(seed, 1))
        return torch.stack([batches(logits) for _ in range(_NUM_PROBES if gradient.noisy else 1)]).mean(dim=0)

    at_alpha, at_twice = expected(alpha), expected(2 * alpha)
    exact = regulariser_gradients(problem, logits)
    kl_part = {name: cosine_and_ratio((at_twice - at_alpha) / alpha, reference) for name, reference in exact.items()}
    return cosine_and_ratio(at_alpha, return_gradient(problem, logits, alpha)), MappingProxyType(kl_part)


class _Found:
    """What a policy is, among what it may be.

    Parameters
    ----------
    problem
        Of one prompt.
    policy
        What was arrived at.
    settled
        Whether the policy stopped moving.
    tolerance
        In nats.
    """

    def __init__(self, problem: Enumerated, policy: PrefixPolicy, settled: bool, tolerance: float) -> None:
        self._problem, self._settled, self._tolerance = problem, settled, tolerance
        self.policy, self._log_q = policy, policy.log_probs[0]
        self.targets, self.implied = self._at_alpha(), self._at_best_alpha()
        self.kl_to_prior = self._kl(problem.log_prior)
        log_posterior = problem.log_posterior(1 / problem.posterior.alpha)[0]
        self.forward_kl = max(float(np.exp(log_posterior) @ (log_posterior - self._log_q)), 0.0)
        self.reward = float(np.exp(self._log_q) @ problem.reward[0])
        self.reward_sd = float(np.sqrt(np.exp(self._log_q) @ (problem.reward[0] - self.reward) ** 2))

    def mass(self, completions: np.ndarray) -> float:
        """Return the policy's probability of some completions, a boolean array (M,)."""
        return float(np.exp(self._log_q[completions]).sum())

    def verdict(self) -> tuple[str, str]:
        """Return the verdict and its explanation.

        A family at the alpha that was asked for comes before the special cases, and those before families at an alpha that
        was fitted: near a point mass every family fits with a small enough alpha.
        """
        near = [target.name for target in self.targets if self._settled and target.kl <= self._tolerance]
        if near:
            both = near[:2] == ["posterior", "myopic"]
            return near[0], _EXPLAINED[near[0]] + (_SAME_HERE if both else "")
        if self._settled and self.kl_to_prior <= self._tolerance:
            return (
                "prior",
                "It did not move from the prior: the loss has no learning signal, or its KL outweighs all reward.",
            )
        for reward, name in ((self._problem.reward[0], "best"), (-self._problem.reward[0], "worst")):
            if self.mass(_is_best(reward)) >= _COLLAPSED_MASS:
                return "collapsed", _collapse(self._problem, self._log_q, _is_best(reward), name)
        best = min(self.implied, key=lambda target: target.kl)
        if self._settled and best.kl <= self._tolerance:
            return f"{best.name} at another alpha", _EXPLAINED[best.name] + self._about_alpha(best.alpha)
        if not self._settled:
            return "nothing", (
                "It never settles: it goes on leaving completions behind, or in circles, and there is no policy that it is "
                "optimal for."
            )
        return "nothing", (
            "It settles on a policy that is neither a posterior nor a myopic policy, at any alpha: it optimises something "
            "else."
        )

    def _about_alpha(self, implied: float) -> str:
        """Return what there is to say about an alpha that is not the one asked for."""
        alpha = self._problem.posterior.alpha
        told = f" The alpha it solves for is {implied:.4g}, not {alpha:g}."
        if implied < 0:
            return told + " The sign of the reward is turned round."
        if abs(implied - alpha * self.reward_sd) <= 0.02 * implied:
            return (
                told
                + f" That is alpha x the rewards' standard deviation under it, {self.reward_sd:.3g}: scaled rewards."
            )
        return told

    def _kl(self, log_p: FloatArray) -> float:
        """Return KL(q || p), for log p of every completion, shape (1, M); rounding may not make it negative."""
        return max(float(self.policy.kl_to(log_p)[0]), 0.0)

    def _at_alpha(self) -> tuple[Target, ...]:
        """Return the distances to the three families at the posterior's alpha."""
        problem, alpha = self._problem, self._problem.posterior.alpha
        return (
            Target("posterior", alpha, self._kl(problem.log_posterior(1 / alpha))),
            Target("myopic", alpha, self._kl(problem.myopic(alpha).log_probs)),
            Target("forward myopic", alpha, self._kl(problem.myopic(alpha, forward=True).log_probs)),
        )

    def _at_best_alpha(self) -> tuple[Target, ...]:
        """Return the distances to the three families at the alpha that fits each best."""
        b = implied_inverse_alpha(self._problem, self._log_q)
        myopic, myopic_kl = nearest_myopic(self._problem, self._log_q)
        forward, forward_kl = nearest_myopic(self._problem, self._log_q, forward=True)
        return (
            Target("posterior", 1 / b if b else np.inf, self._kl(self._problem.log_posterior(b))),
            Target("myopic", myopic, max(myopic_kl, 0.0)),
            Target("forward myopic", forward, max(forward_kl, 0.0)),
        )


_SAME_HERE = (
    " On this problem the myopic policy is the same to the tolerance, so audit on the built-in problem as well."
)
_EXPLAINED = {
    "posterior": "It converges to prior x exp(reward / alpha) / evidence, the optimum of KL-regularised RL.",
    "myopic": (
        "It converges to the myopic policy: its KL counts what a token costs now and not what it makes later tokens cost, so "
        "it is not the posterior, and spends more KL at the same alpha."
    ),
    "forward myopic": (
        "It converges to the myopic policy of the forward KL of every token, KL(p0_t || q_t), as k3 in the loss has it: "
        "neither its KL nor its optimum is that of KL-regularised RL."
    ),
}


def _is_best(reward: FloatArray) -> np.ndarray:
    """Return which rewards are the largest, to rounding, shape (M,)."""
    best: np.ndarray = reward >= reward.max() - 1e-9 * max(1.0, float(np.ptp(reward)))
    return best


def _collapse(problem: Enumerated, log_q: FloatArray, best: np.ndarray, name: str) -> str:
    """Return how a policy collapsed onto the best (or worst) reward."""
    start = f"All its probability is on the {name} reward: the reward is optimised as if there were no KL."
    if best.sum() == 1:
        return start + " One completion has it, so one is left."
    conditioned = problem.log_prior[0][best] - logsumexp(problem.log_prior[0][best])
    kept = float(np.exp(conditioned) @ (conditioned - (log_q[best] - logsumexp(log_q[best]))))
    if kept < 0.05:
        return (
            start + f" Among its {best.sum()} completions the prior's proportions are kept: conditioning, alpha -> 0."
        )
    return start + f" Of its {best.sum()} completions, {np.exp(-(np.exp(log_q) * log_q).sum()):.1f} are left in effect."
