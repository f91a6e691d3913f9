"""Losses for learned twists; the optimal twist minimises each of them (theory.md 3.8).

    psi*_t(x_1:t) = E_p0[exp(r(x) / alpha) | x_1:t]

Arrays have shape (P, N, T): prompts, draws, tokens. `log_psi` is given for every prefix x_1:t of every draw, including the
complete one, and `inside` marks the positions within a completion. `log_base` are log-weights of the draws, 0 for plain draws;
with log-probabilities as weights an enumeration can replace draws, and tests check that the gradient at psi* is exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ctl_loss", "ctl_weights", "fudge_loss", "soft_q_loss"]


def fudge_loss(outputs: Tensor, log_likelihood: Tensor, log_bound: float, inside: Tensor, log_base: Tensor) -> Tensor:
    """Return the cross-entropy of sigmoid(o_t) with the label phi(x) / exp(log_bound), for draws from the prior.

    This is FUDGE (Yang and Klein 2021) with a soft label. At the minimum exp(log_bound) sigmoid(o) = psi*.

    Parameters
    ----------
    outputs
        The network's outputs o, shape (P, N, T).
    log_likelihood
        log phi = r / alpha, at most `log_bound`, shape (P, N).
    log_bound
        Upper bound of the log-likelihood, in nats.
    inside, log_base
        Positions within completions, (P, N, T), and log-weights, (P, N); see the module.
    """
    labels = (log_likelihood - log_bound).exp()[..., None].expand_as(outputs)
    entropy = nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    return _mean(entropy, inside, log_base)


def soft_q_loss(
    log_psi: Tensor, soft_values: Tensor, log_likelihood: Tensor, inside: Tensor, log_base: Tensor
) -> Tensor:
    """Return the squared violation of path consistency, for draws from any distribution with full support.

        (log psi_t(x_1:t) - log sum_a p0(a | x_1:t) psi_{t+1}(x_1:t a))^2,     log psi(x) = r(x) / alpha where x is complete

    This is soft Q-learning, or PCL with the policy's term summed out. The right-hand side carries no gradient. Information
    from the end moves back one token at a time, so for rewards that depend on the end only, this loss takes several times as
    many steps as the others.

    Parameters
    ----------
    log_psi
        log psi of every prefix, shape (P, N, T).
    soft_values
        log sum_a p0(a | x_<t) psi_t(x_<t a), shape (P, N, T); position t has the value of the prefix before token t.
    log_likelihood
        r / alpha, finite, shape (P, N).
    inside, log_base
        Positions within completions, (P, N, T), and log-weights, (P, N); see the module.
    """
    following = torch.cat([soft_values[..., 1:], torch.zeros_like(soft_values[..., :1])], dim=-1)
    targets = torch.where(_last(inside), log_likelihood[..., None], following).detach()
    return _mean((log_psi - targets).square(), inside, log_base)


def ctl_loss(
    log_psi: Tensor, log_prior: Tensor, log_proposal: Tensor, log_likelihood: Tensor, inside: Tensor, log_base: Tensor
) -> Tensor:
    """Return a function whose gradient is that of sum_t KL(p*(x_1:t) || pi_t), pi_t prop. to p0 psi_t (contrastive learning).

        sum_t  - E_p*[d log psi_t(x_1:t)] + E_pi_t[d log psi_t(x_1:t)]                (Zhao et al. 2024, section 4.1)

    Both expectations use self-normalised weights of the same draws, over draws that have a token t; step t has as weight the
    posterior probability of having one. psi is learned up to a constant at each (prompt, t).

    Parameters
    ----------
    log_psi
        log psi of every prefix, shape (P, N, T).
    log_prior, log_proposal
        log p0(x_1:t) and log q(x_1:t) of every prefix, shape (P, N, T).
    log_likelihood
        r / alpha, shape (P, N).
    inside, log_base
        Positions within completions, (P, N, T), and log-weights, (P, N); see the module.
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
    """Return log-weights of draws from q for p* and for each pi_t, (P, N, T) each; -inf if there is no token t."""
    final = (log_prior - log_proposal)[..., -1] + log_likelihood + log_base
    outside = ~inside
    positive = final[..., None].expand_as(log_psi).masked_fill(outside, -torch.inf)
    negative = (log_base[..., None] + log_prior - log_proposal + log_psi).masked_fill(outside, -torch.inf)
    return positive, negative


def _normalised(log_weights: Tensor) -> Tensor:
    """Return weights that sum to 1 over draws at each (prompt, step); all 0 if all log-weights are -inf."""
    total = log_weights.logsumexp(dim=1, keepdim=True)
    return torch.where(total.isneginf(), 0.0, (log_weights - total.nan_to_num(neginf=0.0)).exp())


def _last(inside: Tensor) -> Tensor:
    """Return a mask of the last position of each completion, bool (P, N, T)."""
    following = torch.cat([inside[..., 1:], torch.zeros_like(inside[..., :1])], dim=-1)
    return inside & ~following


def _mean(values: Tensor, inside: Tensor, log_base: Tensor) -> Tensor:
    """Return the mean over draws, weighted by exp(log_base), of the sum over a completion's tokens."""
    weights = log_base.softmax(dim=1)
    per_draw = torch.where(inside, values, 0.0).sum(dim=-1)
    return (weights * per_draw).sum(dim=1).mean()
