"""The exact gradients that losses turn out to follow: the rows of theory.md 2.7, by enumeration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.inference.exact.oracles import Enumerated

__all__ = ["REGULARISERS", "cosine_and_ratio", "probe", "regulariser_gradients", "return_gradient"]

Regulariser: TypeAlias = Callable[["_Exact"], Tensor]


class _Exact:
    """Exact quantities of a table policy, differentiable in its logits.

    Parameters
    ----------
    problem
        The enumerated problem, with one prompt.
    logits
        The policy's logit for each token after each prefix, shape (S, V).
    """

    def __init__(self, problem: Enumerated, logits: Tensor) -> None:
        tree = problem.tree
        self._states, self._mask = torch.as_tensor(tree.states), torch.as_tensor(tree.mask)
        self.table, self.prior_table = logits.log_softmax(dim=-1), torch.as_tensor(problem.prior_table[0])
        per_token = torch.where(self._mask, self.table[self._states, torch.as_tensor(tree.tokens)], 0.0)
        self.log_q, self.log_p = per_token.sum(dim=1), torch.as_tensor(problem.log_prior[0])
        self.reward = torch.as_tensor(problem.reward[0])

    def reverse_kl(self) -> Tensor:
        """KL(q || p0) of completions."""
        return (self.log_q.exp() * (self.log_q - self.log_p)).sum()

    def forward_kl(self) -> Tensor:
        """KL(p0 || q) of completions."""
        return (self.log_p.exp() * (self.log_p - self.log_q)).sum()

    def frozen(self, token_kl: Tensor) -> Tensor:
        """Return E_q sum_t of a KL of every prefix, (S,), the prefixes taken as given: no gradient in their probability."""
        per_token = torch.where(self._mask, token_kl[self._states], 0.0)
        return self.log_q.detach().exp() @ per_token.sum(dim=1)

    def token_reverse_kl(self) -> Tensor:
        """KL(q_t || p0_t) of tokens, frozen."""
        return self.frozen((self.table.exp() * (self.table - self.prior_table)).sum(dim=1))

    def token_forward_kl(self) -> Tensor:
        """KL(p0_t || q_t) of tokens, frozen."""
        return self.frozen((self.prior_table.exp() * (self.prior_table - self.table)).sum(dim=1))


REGULARISERS: Mapping[str, Regulariser] = MappingProxyType(
    {
        "KL(q||p0)": _Exact.reverse_kl,
        "KL(p0||q)": _Exact.forward_kl,
        "KL(q||p0) - KL(p0||q)": lambda exact: exact.reverse_kl() - exact.forward_kl(),
        "sum_t KL(q_t||p0_t), prefixes frozen": _Exact.token_reverse_kl,
        "sum_t KL(p0_t||q_t), prefixes frozen": _Exact.token_forward_kl,
    }
)
"""The regularisers that the KL in a loss may amount to, by its gradient; the first is that of KL-regularised RL."""


def probe(problem: Enumerated, *, seed: int = 0) -> Tensor:
    """Return logits (S, V) of a policy some way from the prior, at which gradients tell losses apart.

    At q = p0 they do not: most estimators of a KL have the gradient of most others there.
    """
    noise = np.random.default_rng(seed).standard_normal(problem.prior_table[0].shape)
    return torch.tensor(problem.prior_table[0] + 0.7 * noise, requires_grad=True)


def return_gradient(problem: Enumerated, logits: Tensor, alpha: float) -> Tensor:
    """Return the gradient of -E_q[r] + alpha KL(q || p0) = -alpha ELBO in the logits, (S, V)."""
    exact = _Exact(problem, logits)
    value = -(exact.log_q.exp() @ exact.reward) + alpha * exact.reverse_kl()
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient


def regulariser_gradients(problem: Enumerated, logits: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each of `REGULARISERS` in the logits, (S, V)."""
    values = {name: regulariser(_Exact(problem, logits)) for name, regulariser in REGULARISERS.items()}
    return {name: torch.autograd.grad(value, logits)[0] for name, value in values.items()}


def cosine_and_ratio(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the cosine of two gradients and the ratio of their lengths; (NaN, 0) where the first is 0 to rounding."""
    length, reference_length = float(gradient.norm()), float(reference.norm())
    if length <= 1e-12 * reference_length:
        return float("nan"), 0.0
    return float((gradient * reference).sum()) / (length * reference_length), length / reference_length
