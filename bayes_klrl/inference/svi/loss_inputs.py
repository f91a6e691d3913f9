"""What a trainer's loss reads, and the call of a loss that anybody may have written.

`bk.audit` gives these inputs from an enumerated problem, `bk.SVI(objective=loss)` from the draws of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.estimators import leave_one_out

__all__ = ["NO_GRADIENT", "Loss", "LossInputs", "draws_from_prior", "value_of"]


@dataclass(frozen=True, eq=False)
class LossInputs:
    """N completions of one prompt, one group, with all that a loss may read of them; float64.

    Parameters
    ----------
    log_probs
        log q(x_t | x_<t) of the policy, differentiable, shape (N, T); 0 past each completion's length, as in the next two.
    old_log_probs, ref_log_probs
        Log-probs under the policy that drew the completions, without gradient, and under the reference model, shape (N, T).
    mask
        True at the tokens of each completion, EOS included, shape (N, T).
    rewards
        r(x), shape (N,).
    alpha
        The KL coefficient, "beta" in TRL.
    tokens
        Token ids, shape (N, T).
    states, policy_table, ref_table
        The number of the prefix before each token, shape (N, T), and log q and log p0 of every token after every prefix,
        shape (S, V); read them through `all_log_probs` and `all_ref_log_probs`.
    weights
        None: the completions are draws. Otherwise the probability of each, shape (N,): every completion is there once, and
        `mean`, `std` and `leave_one_out` are exact expectations.

    Examples
    --------
    The batch of a loss, made by hand: two completions of one token, one of them rewarded.

    >>> import torch, bayes_klrl as bk
    >>> from bayes_klrl.inference.svi.losses import LeaveOneOut
    >>> half, prior = torch.tensor([[-0.7], [-0.7]], requires_grad=True), torch.full((1, 2), 0.5).log()
    >>> batch = bk.LossInputs(
    ...     log_probs=half, old_log_probs=half.detach(), ref_log_probs=half.detach(), mask=torch.ones(2, 1, dtype=bool),
    ...     rewards=torch.tensor([1.0, 0.0]), alpha=0.1, tokens=torch.tensor([[0], [1]]), states=torch.zeros(2, 1, dtype=int),
    ...     policy_table=prior, ref_table=prior,
    ... )
    >>> LeaveOneOut()(batch).backward()
    >>> half.grad.tolist()  # the rewarded completion is made more likely, the other one less
    [[-0.5], [0.5]]
    """

    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    mask: Tensor
    rewards: Tensor
    alpha: float
    tokens: Tensor
    states: Tensor
    policy_table: Tensor
    ref_table: Tensor
    weights: Tensor | None = None

    @property
    def all_log_probs(self) -> Tensor:
        """Log q of every token at every position, differentiable, shape (N, T, V); not masked."""
        return self.policy_table[self.states]

    @property
    def all_ref_log_probs(self) -> Tensor:
        """Log p0 of every token at every position, shape (N, T, V); not masked."""
        return self.ref_table[self.states]

    def mean(self, values: Tensor) -> Tensor:
        """Return the average of values (N,) over completions."""
        return values.mean() if self.weights is None else self.weights @ values

    def leave_one_out(self, values: Tensor) -> Tensor:
        """Return values minus the mean of the others, shape (N,); minus the expectation where that is known."""
        return leave_one_out(values) if self.weights is None else values - self.mean(values)

    def std(self, values: Tensor) -> Tensor:
        """Return the standard deviation of values (N,)."""
        return values.std() if self.weights is None else self.mean((values - self.mean(values)).square()).sqrt()


Loss: TypeAlias = Callable[[LossInputs], Tensor]
"""`loss(batch) -> scalar`. One that averages over completions by `batch.mean`, `batch.std` and `batch.leave_one_out` alone
may say so with an attribute `exact = True`; one for completions of the reference model with `draw_from = "prior"`."""


NO_GRADIENT = (
    "The loss does not depend on the policy: it has no gradient. Build it from batch.log_probs (or batch.all_log_probs), and "
    "do not detach them."
)


def draws_from_prior(loss: object) -> bool:
    """Return whether a loss is for completions of the reference model, which it says by its attribute `draw_from`."""
    draw_from = getattr(loss, "draw_from", "policy")
    if draw_from not in ("policy", "prior"):
        raise BayesKLRLError(f'The loss\'s attribute draw_from must be "policy" or "prior"; got {draw_from!r}.')
    return bool(draw_from == "prior")


def value_of(loss: Loss, batch: LossInputs) -> Tensor:
    """Return a loss's value, a scalar with a graph.

    Raises
    ------
    BayesKLRLError
        If the loss raises, is no scalar, or has no gradient.
    """
    try:
        value = loss(batch)
    except BayesKLRLError:
        raise
    except Exception as error:  # whatever a user's function raises is shown with the shapes it met
        raise BayesKLRLError(
            f"The loss raised {type(error).__name__}: {error} -- on log_probs of shape {tuple(batch.log_probs.shape)} "
            f"and rewards of shape {tuple(batch.rewards.shape)}. See LossInputs for what it is given."
        ) from error
    if not isinstance(value, Tensor):
        raise BayesKLRLError(f"The loss must return a torch scalar; it returned {value!r}.")
    if value.numel() != 1:
        raise BayesKLRLError(
            f"The loss must return a scalar; it returned a tensor of shape {tuple(value.shape)}. Average it over completions."
        )
    if not value.requires_grad:
        raise BayesKLRLError(NO_GRADIENT)
    return value
