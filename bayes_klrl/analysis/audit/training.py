"""Training a table policy by somebody's loss until it no longer moves.

The policy has a logit for every token after every prefix, so it can be any policy at all. Its gradient is the expectation
of the loss's gradient over completions drawn from the policy, in one of two ways:

* every completion once with its probability as a weight, for losses that say that they average over completions by
  `LossInputs.mean`: the exact expectation;
* draws, for any loss: `num_draws` completions by systematic sampling, so that a completion of probability q(x) is there
  N q(x) times to within one. Group means and standard deviations are then those of an endless group to O(1 / N), where
  independent draws would have O(1 / sqrt N). The rows are shuffled, so a loss may cut them into groups of its own: a group
  of 8 among 4096 is as good as 8 independent draws, and small groups show what small groups do.

The step is the natural gradient of a table: with d(s) the policy's probability of reaching prefix s,

    direction(s, a) = -gradient(s, a) / (d(s) q(a|s) + damping), centred under q(.|s).

It has the same zeros as the gradient, which is what matters, and does not wait for rarely visited prefixes, as Adam and
plain descent do. Its length grows while steps agree and shrinks when one turns back (no step changes the policy by more
than a trust region), so the scale of the loss does not matter. With draws the region shrinks as 1 / step, the length
stays above a quarter of a Newton step (else chance would freeze it) and the logits of the second half are averaged, which
takes the noise out (Polyak and Juditsky 1992).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.oracles import Enumerated
from bayes_klrl.inference.svi.loss_inputs import NO_GRADIENT, Loss, LossInputs, value_of
from bayes_klrl.typing import FloatArray

__all__ = ["LEFT", "MOVING", "NOT_FINITE", "SETTLED", "LossGradient", "Trained", "train"]

SETTLED = "it settled"
MOVING = "it was still moving"
LEFT = "a completion had all but left the policy"
NOT_FINITE = "the loss was not finite any more"

_RADIUS = 0.2  # Fisher length of the longest step: a KL of 0.02 nats
_LARGEST_LOGIT_STEP = 2.0
_GONE = -200.0  # log q - log p0 of a completion that the policy has left for good: rewards are not 200 alpha apart
_STANDSTILL = 1e-9  # of the longest direction seen
_NOTHING = 1e-12  # a direction that is rounding only: the loss has no gradient at all


@dataclass(frozen=True, eq=False)
class Trained:
    """The policy that a loss led to.

    Parameters
    ----------
    table
        log q(a | s) at the end, shape (S, V).
    num_steps
        The number of steps taken.
    ending
        The reason why training stopped: `SETTLED`; `MOVING`, the steps were used up; `LEFT`, a completion had all but left
        the policy; `NOT_FINITE`, the loss was no longer a finite number.
    noise
        KL of the fourth quarter's average policy to the third's, in nats: the size of what chance, or further steps, still
        change; 0 if training ended earlier.
    """

    table: FloatArray
    num_steps: int
    ending: str
    noise: float = 0.0


class LossGradient:
    """The expected gradient of a loss in the logits of a table policy, of one prompt.

    Parameters
    ----------
    loss
        The loss.
    problem
        The enumerated problem whose completions are used.
    alpha
        The KL coefficient that the loss gets.
    num_draws
        Draws per call; None: every completion once, weighted by its probability.
    draw_from_prior
        True: the completions are drawn from the prior; false: from the policy.
    rng
        Generator for the draws.
    """

    def __init__(
        self,
        loss: Loss,
        problem: Enumerated,
        *,
        alpha: float,
        num_draws: int | None,
        draw_from_prior: bool,
        rng: np.random.Generator,
    ) -> None:
        tree = problem.tree
        self.problem = problem
        self._loss, self._alpha, self._num_draws, self._rng = loss, alpha, num_draws, rng
        self._from_prior = draw_from_prior
        self._tokens, self._states = torch.as_tensor(tree.tokens), torch.as_tensor(tree.states)
        self._mask = torch.as_tensor(tree.mask)
        self._rewards = torch.as_tensor(problem.reward[0])
        self._prior_table = torch.as_tensor(problem.prior_table[0])

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the expected gradient, shape (S, V); `logits` is the leaf (S, V) that it is taken in.

        Raises
        ------
        BayesKLRLError
            If the loss raises, is no scalar, has no gradient, or is not finite.
        """
        batch = self._batch(logits.log_softmax(dim=-1))
        value = value_of(self._loss, batch)
        (gradient,) = torch.autograd.grad(value, logits, allow_unused=True)
        if gradient is None:
            raise BayesKLRLError(NO_GRADIENT)
        if not (torch.isfinite(value) and torch.isfinite(gradient).all()):
            raise _NotFinite(
                f"The loss is {value.item()} and its gradient has "
                f"{int((~torch.isfinite(gradient)).sum())} entries that are not finite. The rewards and log-probs it was "
                "given are finite: look for a division by 0 (a length, a standard deviation), an overflow of exp, or a log."
            )
        return gradient

    def completion_log_probs(self, table: Tensor) -> Tensor:
        """Return log q(x) of every completion, shape (M,), from log q(a | s), shape (S, V)."""
        return self._per_token(table).sum(dim=1)

    def with_alpha(self, alpha: float, *, rng: np.random.Generator) -> LossGradient:
        """Return the same gradient for another KL coefficient, with other draws."""
        return LossGradient(
            self._loss,
            self.problem,
            alpha=alpha,
            num_draws=self._num_draws,
            draw_from_prior=self._from_prior,
            rng=rng,
        )

    @property
    def noisy(self) -> bool:
        """Whether the gradient is of draws rather than the exact expectation."""
        return self._num_draws is not None

    @property
    def damping(self) -> float:
        """The probability that stands for completions too rare to be drawn; next to 0 if every completion is there."""
        return 1e-300 if self._num_draws is None else 1.0 / self._num_draws

    def occupancy(self, table: Tensor) -> Tensor:
        """Return the policy's probability of passing through each prefix and token, d(s) q(a | s), shape (S, V)."""
        probs = self.completion_log_probs(table).exp()[:, None].expand_as(self._mask)[self._mask]
        passed = (self._states * table.shape[1] + self._tokens)[self._mask]
        return torch.zeros(table.numel(), dtype=table.dtype).index_add(0, passed, probs).reshape(table.shape)

    def _per_token(self, table: Tensor) -> Tensor:
        """Return log q(x_t | x_<t), shape (M, T), 0 past each completion's length."""
        return torch.where(self._mask, table[self._states, self._tokens], 0.0)

    def _batch(self, table: Tensor) -> LossInputs:
        """Return the inputs of the loss for a policy."""
        per_token, reference = self._per_token(table), self._per_token(self._prior_table)
        drawn_by = (reference if self._from_prior else per_token).detach()
        probs = drawn_by.sum(dim=1).exp()
        probs = probs / probs.sum()
        rows = slice(None) if self._num_draws is None else self._systematic(probs)
        return LossInputs(
            log_probs=per_token[rows],
            old_log_probs=drawn_by[rows],
            ref_log_probs=reference[rows],
            mask=self._mask[rows],
            rewards=self._rewards[rows],
            alpha=self._alpha,
            tokens=self._tokens[rows],
            states=self._states[rows],
            policy_table=table,
            ref_table=self._prior_table,
            weights=probs if self._num_draws is None else None,
        )

    def _systematic(self, probs: Tensor) -> Tensor:
        """Return `num_draws` row numbers, each N q(x) times to within one, shuffled."""
        edges = np.cumsum(probs.numpy())
        grid = (np.arange(self._num_draws or 0) + self._rng.random()) / (self._num_draws or 1)
        rows = np.minimum(np.searchsorted(edges, grid, side="right"), len(edges) - 1)
        return torch.as_tensor(self._rng.permutation(rows))


class _NotFinite(BayesKLRLError):
    """A loss that is NaN or infinite: the user's mistake at the start, divergence later."""


def train(gradient: LossGradient, start: FloatArray, *, num_steps: int, tolerance: float) -> Trained:
    """Return the policy that a loss leads to from log-probs `start`, shape (S, V).

    It also ends when a completion has all but left the policy or the loss overflows: there is no way back from either.

    Parameters
    ----------
    gradient
        The expected gradient of the loss.
    start
        Log-probs of the prior, log p0(a | s), shape (S, V).
    num_steps
        The largest number of steps.
    tolerance
        The largest KL between the average policies of the third and the fourth quarter, in nats, of a policy that settled.
    """
    logits = torch.tensor(start, requires_grad=True)
    reference = gradient.completion_log_probs(logits.detach())
    step_rule, averages = _StepRule(gradient.noisy), torch.zeros((2, *logits.shape), dtype=logits.dtype)
    for step in range(num_steps):
        try:
            slope = gradient(logits)
        except _NotFinite:
            if step == 0:
                raise
            return Trained(_log_probs(logits), step, NOT_FINITE)
        with torch.no_grad():
            table = logits.log_softmax(dim=-1)
            logits += step_rule.step(slope, table, gradient.occupancy(table), gradient.damping)
            if step_rule.relative_size <= _STANDSTILL:
                return Trained(_log_probs(logits), step, SETTLED)
            if float((gradient.completion_log_probs(logits.log_softmax(dim=-1)) - reference).min()) < _GONE:
                return Trained(_log_probs(logits), step + 1, LEFT)
            if step >= num_steps // 2:
                averages[int(step >= 3 * num_steps // 4)] += logits.log_softmax(dim=-1)
    third, fourth = (
        gradient.completion_log_probs(average.log_softmax(dim=-1)) for average in averages / (num_steps / 4)
    )
    moved = max(float((fourth.exp() * (fourth - third)).sum()), 0.0)
    end = averages.sum(dim=0) / (num_steps / 2) if gradient.noisy else logits
    return Trained(_log_probs(end), num_steps, SETTLED if moved <= tolerance else MOVING, moved)


class _StepRule:
    """The direction and length of steps; see the module's description.

    Parameters
    ----------
    noisy
        True if gradients come from draws: lengths then shrink as gently as they grow, since chance turns steps back too, and
        the trust region shrinks.
    """

    def __init__(self, noisy: bool) -> None:
        self._noisy = noisy
        self._previous: Tensor | None = None
        self._length, self._least, self._longest, self._num_steps = 0.0, 0.0, 0.0, 0
        self.relative_size = 1.0
        """Size of the newest direction, as a fraction of the largest one seen; 0 for a loss without any gradient."""

    def step(self, slope: Tensor, table: Tensor, occupancy: Tensor, damping: float) -> Tensor:
        """Return the change of the logits, shape (S, V); all arguments but the last are (S, V)."""
        direction = -slope / (occupancy + damping)
        direction -= (table.exp() * direction).sum(dim=-1, keepdim=True)
        size = float((occupancy * direction.square()).sum().sqrt())
        self._longest = max(self._longest, size)
        self.relative_size = size / self._longest if self._longest > _NOTHING else 0.0
        if self.relative_size == 0.0:
            return torch.zeros_like(direction)
        radius = _RADIUS * (min(1.0, 30 / (self._num_steps + 1)) if self._noisy else 1.0)
        limit = min(radius / size, _LARGEST_LOGIT_STEP / float(direction.abs().max()))
        if self._previous is None:
            self._length = limit / 4
        else:
            agrees = float((occupancy * direction * self._previous).sum()) > 0
            if self._noisy and not agrees and self._least == 0.0:
                # The first step that turns back is about a Newton step; far below it chance would freeze the policy.
                self._least = self._length / 4
            growth = 1.3 if agrees else 1 / 1.3 if self._noisy else 0.5
            self._length = min(max(self._least, self._length * growth), limit)
        self._previous, self._num_steps = direction, self._num_steps + 1
        return self._length * direction


def _log_probs(logits: Tensor) -> FloatArray:
    """Return log q(a | s) on the host, shape (S, V)."""
    table: FloatArray = logits.detach().log_softmax(dim=-1).numpy()
    return table
