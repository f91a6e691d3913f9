"""The contrastive loss for learned twists, which the optimal twist minimises (theory.md 3.8).

    psi*_t(x_1:t) = E_p0[exp(r(x) / alpha) | x_1:t]

Arrays have shape (P, N, T): prompts, draws, tokens. `log_psi` is given for every prefix x_1:t of every draw, including the
complete one, and `inside` marks the positions within a completion. `log_base` are log-weights of the draws, 0 for plain draws;
with log-probabilities as weights an enumeration can replace draws, and tests check that the gradient at psi* is exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ctl_loss", "ctl_weights"]


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
