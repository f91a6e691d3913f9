"""The losses of learned twists, each of which the optimal twist minimises (theory.md 3.8).

    psi*_t(x_1:t) = E_p0[exp(r(x) / alpha) | x_1:t]

Shapes (P, N, T): prompts, draws, tokens. `log_psi` is that of every prefix x_1:t of every draw, the complete one included,
`inside` says which positions a completion has. Draws have log-weights `log_base` (0: plain draws), by which an enumeration
with its probabilities stands in for draws, and the tests see the gradient at psi* vanish exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ctl_loss", "ctl_weights", "fudge_loss", "soft_q_loss"]


def fudge_loss(outputs: Tensor, log_likelihood: Tensor, log_bound: float, inside: Tensor, log_base: Tensor) -> Tensor:
    """Return the cross-entropy of sigmoid(o_t) with the label phi(x) / exp(log_bound), for draws from the prior.

    Yang and Klein (2021), with a soft label. At the minimum exp(log_bound) sigmoid(o) = psi*.

    Parameters
    ----------
    outputs
        o, shape (P, N, T).
    log_likelihood
        log phi = r / alpha, at most `log_bound`, shape (P, N).
    log_bound
        The largest log-likelihood there is.
    inside, log_base
        See the module.
    """
    labels = (log_likelihood - log_bound).exp()[..., None].expand_as(outputs)
    entropy = nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    return _mean(entropy, inside, log_base)


def soft_q_loss(
    log_psi: Tensor, soft_values: Tensor, log_likelihood: Tensor, inside: Tensor, log_base: Tensor
) -> Tensor:
    """Return the squared violation of path consistency, for draws from any distribution that reaches everything.

        (log psi_t(x_1:t) - log sum_a p0(a | x_1:t) psi_{t+1}(x_1:t a))^2,     log psi(x) = r(x) / alpha where x is complete

    Soft Q-learning, or PCL with the policy's term summed out. The right-hand side carries no gradient. What happens at the
    end travels one step a sweep: where it shows at the end only, this takes several times the steps of the other losses.

    Parameters
    ----------
    log_psi
        Shape (P, N, T).
    soft_values
        log sum_a p0(a | x_<t) psi_t(x_<t a), shape (P, N, T): at position t that of the prefix before it.
    log_likelihood
        Shape (P, N), finite.
    inside, log_base
        See the module.
    """
    following = torch.cat([soft_values[..., 1:], torch.zeros_like(soft_values[..., :1])], dim=-1)
    targets = torch.where(_last(inside), log_likelihood[..., None], following).detach()
    return _mean((log_psi - targets).square(), inside, log_base)


def ctl_loss(
    log_psi: Tensor, log_prior: Tensor, log_proposal: Tensor, log_likelihood: Tensor, inside: Tensor, log_base: Tensor
) -> Tensor:
    """Return a function whose gradient is that of sum_t KL(p*(x_1:t) || pi_t), pi_t prop. to p0 psi_t: contrastive twists.

        sum_t  - E_p*[d log psi_t(x_1:t)] + E_pi_t[d log psi_t(x_1:t)]                (Zhao et al. 2024, section 4.1)

    Both expectations by self-normalised weights of the same draws, over those that have a token t; the sum weighs step t by
    the share of the posterior that has one. psi is learned up to a constant at each (prompt, t).

    Parameters
    ----------
    log_psi
        Shape (P, N, T).
    log_prior, log_proposal
        log p0(x_1:t) and log q(x_1:t) of every prefix, shape (P, N, T).
    log_likelihood
        Shape (P, N).
    inside, log_base
        See the module.
    """
    positive, negative = ctl_weights(log_psi.detach(), log_prior, log_proposal, log_likelihood, inside, log_base)
    alive = positive.logsumexp(dim=1)  # every completion has a first token
    share = (alive - alive[:, :1].nan_to_num(neginf=0.0)).exp()
    contrast = _normalised(negative) - _normalised(positive)
    per_step = torch.where(inside, contrast * log_psi, 0.0).sum(dim=1)
    return (share * per_step).sum(dim=1).mean()


def ctl_weights(
    log_psi: Tensor, log_prior: Tensor, log_proposal: Tensor, log_likelihood: Tensor, inside: Tensor, log_base: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-weights of draws from q towards p* and towards each pi_t, (P, N, T), -inf where there is no token t."""
    final = (log_prior - log_proposal)[..., -1] + log_likelihood + log_base
    outside = ~inside
    positive = final[..., None].expand_as(log_psi).masked_fill(outside, -torch.inf)
    negative = (log_base[..., None] + log_prior - log_proposal + log_psi).masked_fill(outside, -torch.inf)
    return positive, negative


def _normalised(log_weights: Tensor) -> Tensor:
    """Return weights that sum to 1 over draws at each (prompt, step); 0 where all are 0."""
    total = log_weights.logsumexp(dim=1, keepdim=True)
    return torch.where(total.isneginf(), 0.0, (log_weights - total.nan_to_num(neginf=0.0)).exp())


def _last(inside: Tensor) -> Tensor:
    """Return which position is the last one of its completion."""
    following = torch.cat([inside[..., 1:], torch.zeros_like(inside[..., :1])], dim=-1)
    return inside & ~following


def _mean(values: Tensor, inside: Tensor, log_base: Tensor) -> Tensor:
    """Return the mean over draws, weighted by exp(log_base), of the sum over a completion's tokens."""
    weights = log_base.softmax(dim=1)
    per_draw = torch.where(inside, values, 0.0).sum(dim=-1)
    return (weights * per_draw).sum(dim=1).mean()
