"""The verdict on the policy that a loss led to: a posterior, a myopic policy, a collapse, or nothing known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.analysis.audit.training import MOVING, SETTLED
from bayes_klrl.inference.exact.oracles import Enumerated, implied_inverse_alpha, nearest_myopic
from bayes_klrl.models.prefix_policy import PrefixPolicy
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import logsumexp

__all__ = ["Findings", "Target", "is_best"]

_COLLAPSED_MASS = 0.999


@dataclass(frozen=True)
class Target:
    """A distribution that a policy may have converged to, and the policy's distance to it.

    Parameters
    ----------
    name
        "posterior", "myopic" or "forward myopic".
    alpha
        The alpha of the target.
    kl
        KL(policy || target), in nats.
    """

    name: str
    alpha: float
    kl: float


class Findings:
    """The distances of a trained policy to all targets, and the verdict that follows.

    Parameters
    ----------
    problem
        The enumerated problem, with one prompt.
    policy
        The trained policy.
    ending
        The reason why training stopped.
    tolerance
        The largest KL to a target, in nats, of a policy that counts as equal to it.
    """

    def __init__(self, problem: Enumerated, policy: PrefixPolicy, ending: str, tolerance: float) -> None:
        self._problem, self._ending, self._tolerance = problem, ending, tolerance
        self._settled = ending == SETTLED
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
            if self.mass(is_best(reward)) >= _COLLAPSED_MASS:
                return "collapsed", _collapse(self._problem, self._log_q, is_best(reward), name)
        best = min(self.implied, key=lambda target: target.kl)
        if self._settled and best.kl <= self._tolerance:
            return f"{best.name} at another alpha", _EXPLAINED[best.name] + self._about_alpha(best.alpha)
        if not self._settled:
            cure = " Give it more num_steps." if self._ending == MOVING else ""
            return (
                "nothing",
                f"It never settled: training ended because {self._ending}, so it has no optimum here.{cure}",
            )
        return "nothing", (
            "It settles on a policy that is neither a posterior nor a myopic policy, at any alpha: it optimises something "
            "else."
        )

    def _about_alpha(self, implied: float) -> str:
        """Return a sentence on an implied alpha that differs from the posterior's."""
        alpha = self._problem.posterior.alpha
        found = f" The alpha it solves for is {implied:.4g}, not {alpha:g}."
        if implied < 0:
            return found + " The sign of the reward is turned round."
        if abs(implied - alpha * self.reward_sd) <= 0.02 * implied:
            return (
                found
                + f" That is alpha x the rewards' standard deviation under it, {self.reward_sd:.3g}: scaled rewards."
            )
        return found

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


def is_best(reward: FloatArray) -> np.ndarray:
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
