"""Audit of a trainer's loss: train a table that can be any policy by it, and name the policy that comes out.

    print(bk.audit(lambda batch: ...))

KL-regularised RL has one right answer, the posterior p0 exp(r / alpha) / Z, and most placements of the KL in a loss do not
have it as their optimum (theory.md 2.7): some follow the myopic policy, some solve for another alpha, some for nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from bayes_klrl.analysis.audit.objectives import cosine_and_ratio, probe, regulariser_gradients, return_gradient
from bayes_klrl.analysis.audit.training import SETTLED, LossGradient, train
from bayes_klrl.analysis.audit.verdict import Findings, Target, is_best
from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.inference.exact.oracles import Enumerated
from bayes_klrl.inference.svi.loss_inputs import Loss, draws_from_prior
from bayes_klrl.models.prefix_policy import PrefixPolicy
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems import audit_posterior
from bayes_klrl.randomness import generator

__all__ = ["Audit", "audit"]

_NUM_DRAWS = 4096
_NUM_STEPS = 400
_NUM_PROBES = 8  # batches that a gradient of draws is averaged over
_NOISY_TOLERANCE = 0.01  # nats that chance may move the policy by between two quarters of the training


@dataclass(frozen=True, eq=False)
class Audit:
    """The policy that a loss converged to, and a comparison of gradients; `print` shows one screen, the verdict first.

    Parameters
    ----------
    verdict
        "posterior", "myopic" or "forward myopic", each also "... at another alpha"; "collapsed" (onto the best, or worst,
        reward), "prior" (nothing was learned), or "nothing" (none of these, or it never settled).
    explanation
        One or two sentences on the verdict.
    loss
        The name of the loss.
    alpha
        The alpha of the posterior, which the loss got as its KL coefficient.
    targets, implied
        Distances to the three families, at this alpha and at the alpha that fits each family best.
    kl_to_prior, forward_kl
        KL(q || p0), and KL(p* || q), which is large when the policy has dropped a part of the posterior.
    reward, reward_sd
        Mean and standard deviation of the reward under the policy.
    best_reward_mass
        The policy's probability of the largest reward.
    gradient
        The loss's expected gradient at a policy away from the prior, compared with the exact gradient of -alpha x ELBO =
        -E[r] + alpha KL(q || p0): the cosine, and the ratio of their lengths.
    kl_gradients
        The part of that gradient which grows with alpha, compared with the exact gradient of each of
        `analysis.audit.objectives.REGULARISERS`: cosine and ratio of lengths. (NaN, 0) for a part that is 0 on average, or
        a loss that does not read `batch.alpha`.
    num_draws
        Draws per step; None: every completion with its probability, the exact expectation.
    num_steps, ending
        The number of steps taken, and the reason why training stopped.
    noise
        The KL by which the policy still moved, or chance moved it, between quarters of the training, in nats; it widens the
        tolerance. With draws it grows with (completions of the problem) / (draws of all steps), so small problems are best.
    policy
        The policy that it converged to: `policy.log_probs`, `policy.language_model()`.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> from bayes_klrl.inference.svi.losses import LeaveOneOut
    >>> found = bk.audit(LeaveOneOut())
    >>> found.verdict, found.settled, round(found.implied_alpha, 2)
    ('posterior', True, 0.4)
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
    ending: str
    noise: float
    policy: PrefixPolicy

    @property
    def settled(self) -> bool:
        """Whether the policy stopped moving."""
        return self.ending == SETTLED

    @property
    def implied_alpha(self) -> float:
        """The alpha of the nearest posterior: R(alpha) = E_q[r] (theory.md 1.7); negative below the prior's reward."""
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
        return "\n".join(
            [
                self._headline(),
                *textwrap.wrap(self.explanation, 110),
                "",
                f"{'KL of what it converged to, in nats, to':<40} {f'alpha {self.alpha:g}':>12} {'best alpha':>12}",
                *distances,
                f"  {'prior':<38} {self.kl_to_prior:>12.4f}",
                self._reward_text(),
                "",
                f"{'its gradient away from the prior, against the exact one':<56} {'cosine':>8} {'length':>9}",
                *(f"  {name:<54} {cosine:>8} {ratio:>9}" for name, cosine, ratio in self._slopes()),
                "",
                self._steps_text(),
            ]
        )

    def _repr_html_(self) -> str:
        distances = [
            [at.name, f"{at.kl:.4f}", f"{best.kl:.4f}", f"{best.alpha:.4g}"]
            for at, best in zip(self.targets, self.implied, strict=True)
        ]
        return html_page(
            self._headline(),
            self.explanation,
            HtmlTable(
                ("KL to, in nats", f"alpha {self.alpha:g}", "best alpha", "which is"),
                [*distances, ["prior", f"{self.kl_to_prior:.4f}", "", ""]],
                caption="distances of what it converged to",
            ),
            self._reward_text(),
            HtmlTable(("gradient", "cosine", "length"), self._slopes(), caption="its gradient against the exact one"),
            self._steps_text(),
        )

    def _headline(self) -> str:
        return f"{self.verdict.upper()}: {self.loss} at alpha {self.alpha:g}"

    def _reward_text(self) -> str:
        return (
            f"E[r] {self.reward:.4f}, sd {self.reward_sd:.4f}; probability of the best reward {self.best_reward_mass:.4f}; "
            f"KL(p*||q) {self.forward_kl:.4f}"
        )

    def _steps_text(self) -> str:
        drawn = "every completion, weighted" if self.num_draws is None else f"{self.num_draws} draws per step"
        return f"{self.num_steps} steps on {drawn}, then {self.ending} (to {self.noise:.1g} nats)."

    def _slopes(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table of gradients: what is compared, the cosine, and the ratio of lengths."""
        pairs = {"of -E[r] + alpha KL(q||p0)": self.gradient}
        pairs |= {f"its KL part, of {name}": pair for name, pair in self.kl_gradients.items()}
        return [
            (name, "" if np.isnan(cosine) else f"{cosine:.4f}", f"{ratio:.4f}")
            for name, (cosine, ratio) in pairs.items()
        ]


def audit(
    loss: Loss,
    posterior: Posterior | None = None,
    *,
    seed: int = 0,
    num_draws: int | None = None,
    num_steps: int = _NUM_STEPS,
    tolerance: float = 1e-3,
) -> Audit:
    """Return the policy that a trainer's loss converges to: the posterior, one at another alpha, a myopic policy, or nothing.

    The loss trains a policy with free next-token distributions after every prefix, from the prior, by its gradient on
    thousands of completions per step that are spread as evenly as the policy allows (`analysis.audit.training` says how and
    why), so that neither the network nor chance has a part in the answer. It takes a few seconds.

    Parameters
    ----------
    loss
        `loss(batch) -> scalar` to be minimised; `batch` is a `LossInputs`: log-probs (N, T) of policy, old policy and
        reference, mask, rewards (N,), alpha. Reference losses are in `bayes_klrl.inference.svi.losses`.
    posterior
        A problem of one prompt that can be enumerated; None: `problems.audit_posterior()`, where the answers are far apart.
    seed
        Seed for the draws.
    num_draws
        Completions per step; a multiple of the loss's group size if it makes groups. None: 4096, or the exact expectation if
        the loss has an attribute `exact = True`.
    num_steps
        The largest number of steps.
    tolerance
        The largest KL to a target, in nats, of a policy that counts as equal to it. 4 x `Audit.noise` is added: on four
        problems the distance that was left to the target measured 0.2 to 4 times the noise.

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
        raise BayesKLRLError(f"The loss must be a function of LossInputs that returns a scalar; got {loss!r}.")
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
        draw_from_prior=draws_from_prior(loss),
        rng=generator(seed),
    )
    slope, kl_slope = _slopes(gradient, seed)
    still = _NOISY_TOLERANCE if gradient.noisy else tolerance / 10
    trained = train(gradient, problem.prior_table[0], num_steps=num_steps, tolerance=still)
    found = Findings(problem, problem.policy(trained.table[None]), trained.ending, tolerance + 4 * trained.noise)
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
        best_reward_mass=found.mass(is_best(problem.reward[0])),
        gradient=slope,
        kl_gradients=kl_slope,
        num_draws=num_draws,
        num_steps=trained.num_steps,
        ending=trained.ending,
        noise=trained.noise,
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


def _slopes(gradient: LossGradient, seed: int) -> tuple[tuple[float, float], Mapping[str, tuple[float, float]]]:
    """Return how the loss's expected gradient, and its part that grows with alpha, compare with the exact ones.

    The part is the difference of the gradients at 2 alpha and at alpha, on the same draws, over alpha: a reward that is much
    larger than the KL would hide it otherwise.
    """
    problem, alpha = gradient.problem, gradient.problem.posterior.alpha
    logits = probe(problem)

    def expected(coefficient: float) -> torch.Tensor:
        at_coefficient = gradient.with_alpha(coefficient, rng=generator(seed, 1))
        return torch.stack([at_coefficient(logits) for _ in range(_NUM_PROBES if gradient.noisy else 1)]).mean(dim=0)

    at_alpha, at_twice = expected(alpha), expected(2 * alpha)
    exact = regulariser_gradients(problem, logits)
    kl_part = {name: cosine_and_ratio((at_twice - at_alpha) / alpha, reference) for name, reference in exact.items()}
    return cosine_and_ratio(at_alpha, return_gradient(problem, logits, alpha)), MappingProxyType(kl_part)
