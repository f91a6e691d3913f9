"""Reference losses to audit, to train, or to compare with your own.

Every loss is a function of `loss_inputs.LossInputs` that returns a scalar to be minimised, in units of reward as trainers
have it: minus the return, so that it should descend -J(q) = -E_q[r] + alpha KL(q || p0) = -alpha ELBO(q). With
l_t = log q_t - log p0_t, the RL words are: policy q, reference model p0, "beta" alpha.

    LeaveOneOut      TRL's RLOOTrainer: k1 in the reward, a leave-one-out baseline         the posterior
    LogVariance      half the variance of the log-weights (VarGrad; Richter et al. 2020)   the same gradient, batch by batch
    RaoBlackwell     the KL summed over the vocabulary (Amini et al. 2025)                 the posterior
    GRPO             TRL's GRPOTrainer: k3 of every token in the loss                      a myopic policy
    KLPenalty        every other place for the KL and every estimator of it                theory.md 2.7
    DPO              preferences on pairs drawn from p0                                    the posterior
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.loss_inputs import LossInputs

__all__ = ["DPO", "GRPO", "KLPenalty", "LeaveOneOut", "LogVariance", "RaoBlackwell"]


_MOST_PAIRED = 5_000  # whose squares of log-ratios are 200 MB


@dataclass(frozen=True)
class LeaveOneOut:
    """Score-function gradient of r - alpha k1 with a leave-one-out baseline; Ahmadian et al. (2024), TRL's `RLOOTrainer`.

        loss = -mean_n rho_n (R_n - mean_{m != n} R_m),   R = r - alpha sum_t l_t (no gradient),   rho = q(x) / q_old(x)

    Parameters
    ----------
    normalize_advantages
        Divide by the standard deviation of R, the KL included: the steps' length changes, the optimum does not.
    """

    normalize_advantages: bool = False
    exact: ClassVar[bool] = True

    def __call__(self, batch: LossInputs) -> Tensor:
        """Return the loss."""
        kl = (batch.log_probs.detach() - batch.ref_log_probs).sum(dim=1)
        returns = batch.rewards - batch.alpha * kl
        advantages = batch.leave_one_out(returns)
        if self.normalize_advantages:
            advantages = advantages / (batch.std(returns) + 1e-4)
        return -batch.mean(_sequence_ratio(batch) * advantages)


@dataclass(frozen=True)
class LogVariance:
    """alpha / 2 times the variance of log w = log p0 + r / alpha - log q; VarGrad, and trajectory balance with its best log Z.

    Its gradient on draws of the policy is that of `LeaveOneOut`, batch by batch (theory.md 2.4).
    """

    exact: ClassVar[bool] = True

    def __call__(self, batch: LossInputs) -> Tensor:
        """Return the loss."""
        log_w = (batch.ref_log_probs - batch.log_probs).sum(dim=1) + batch.rewards / batch.alpha
        centred = log_w - batch.mean(log_w)
        return batch.alpha / 2 * batch.mean(batch.leave_one_out(log_w) * centred)


@dataclass(frozen=True)
class RaoBlackwell:
    """Leave-one-out for the reward, the KL over the whole vocabulary with its effect on later KLs (theory.md 2.3).

    grad KL(q || p0) = E sum_t [ grad KL_t + (sum_{u>t} KL_u) grad log q_t ],   KL_t = KL(q_t || p0_t) at the drawn prefix.
    """

    exact: ClassVar[bool] = True

    def __call__(self, batch: LossInputs) -> Tensor:
        """Return the loss."""
        kl = _full_kl(batch)
        later = kl.detach().flip(1).cumsum(1).flip(1) - kl.detach()
        score = (later * batch.log_probs).sum(dim=1)
        credit = batch.leave_one_out(batch.rewards) * batch.log_probs.sum(dim=1)
        return batch.mean(batch.alpha * (kl.sum(dim=1) + score) - credit)


@dataclass(frozen=True)
class GRPO:
    """The loss of TRL's `GRPOTrainer`, with one update per batch.

        loss = -sum_t min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) + alpha c_t (exp(-l_t) - 1 + l_t),   averaged (`loss_type`)

    Parameters
    ----------
    scale_rewards
        Divide A = r - mean r by the group's standard deviation: alpha then acts as alpha x sd (theory.md 2.9). TRL's own words
        "group" and "none" stand for True and False.
    loss_type
        The average over tokens: "grpo" within each completion, then over completions (the length enters the target); "dapo"
        over all tokens of the batch; "dr_grpo" over completions x T. The last two differ by a factor only.
    use_bias_correction_kl
        c_t = rho_t rather than 1. Unbiased for the KL of each token given its prefix, not for the sequence's KL.
    epsilon
        The half-width of the clipping.
    group_size
        G, the completions per group; None: the whole batch is one group, the limit of large ones. A baseline that holds its
        own completion leaves (G - 1) / G of the reward's gradient and all of the KL's: alpha acts as alpha G / (G - 1).

    Raises
    ------
    BayesKLRLError
        If the loss type or the scaling is unknown, or the group size does not divide the batch.
    """

    scale_rewards: bool | Literal["group", "none"] = True
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    use_bias_correction_kl: bool = True
    epsilon: float = 0.2
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in ("grpo", "dapo", "dr_grpo"):
            raise BayesKLRLError(f'loss_type must be "grpo", "dapo" or "dr_grpo"; got {self.loss_type!r}.')
        if not (isinstance(self.scale_rewards, bool) or self.scale_rewards in ("group", "none")):
            raise BayesKLRLError(
                f'scale_rewards must be True or "group", False or "none"; got {self.scale_rewards!r}. TRL\'s "batch" is '
                "True without a group_size."
            )
        if self.group_size is not None:
            check_count("group_size", self.group_size, least=2)

    @property
    def exact(self) -> bool:
        """Whether there are no groups smaller than the batch."""
        return self.group_size is None

    def __call__(self, batch: LossInputs) -> Tensor:
        """Return the loss."""
        ratio = (batch.log_probs - batch.old_log_probs).exp()
        advantages = self._advantages(batch)[:, None]
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        kl = _k3(batch.log_probs - batch.ref_log_probs)
        per_token = (batch.alpha * kl * (ratio if self.use_bias_correction_kl else 1.0) - gain) * batch.mask
        lengths = batch.mask.sum(dim=1)
        if self.loss_type == "grpo":
            return batch.mean(per_token.sum(dim=1) / lengths)
        tokens = batch.mean(lengths.to(per_token)) if self.loss_type == "dapo" else batch.mask.shape[1]
        return batch.mean(per_token.sum(dim=1)) / tokens

    def _advantages(self, batch: LossInputs) -> Tensor:
        """Return the rewards minus their group's mean, (N,), divided by its standard deviation if `scale_rewards` says so."""
        scaled = self.scale_rewards in (True, "group")
        if self.group_size is None:
            centred = batch.rewards - batch.mean(batch.rewards)
            return centred / (batch.std(batch.rewards) + 1e-4) if scaled else centred
        if len(batch.rewards) % self.group_size:
            raise BayesKLRLError(
                f"Groups of {self.group_size} do not divide a batch of {len(batch.rewards)} completions."
            )
        groups = batch.rewards.view(-1, self.group_size)
        centred = groups - groups.mean(dim=1, keepdim=True)
        return (centred / (groups.std(dim=1, keepdim=True) + 1e-4) if scaled else centred).flatten()


@dataclass(frozen=True)
class KLPenalty:
    """Leave-one-out for the reward, and an estimate of the KL put somewhere: the rows of theory.md 2.7.

    Parameters
    ----------
    estimator
        The estimator of the KL: of the whole completion, with l = sum_t l_t, "k1" l, "k2" l^2 / 2, "k3" exp(-l) - 1 + l; or
        summed over its tokens, "token_k2", "token_k3", and "full", KL(q_t || p0_t) over the vocabulary.
    place
        "reward": the estimate is subtracted from the reward, without gradient. "loss": it is added to the loss, with gradient.
    ratio
        In the loss, multiply by rho = q / q_old, of the completion or of each token, as the estimator is.
    per_length
        Divide by the completion's length.
    scale_rewards
        Divide r - mean r by its standard deviation, and not the KL.

    Raises
    ------
    BayesKLRLError
        If the estimator or place is unknown.
    """

    estimator: Literal["k1", "k2", "k3", "token_k2", "token_k3", "full"] = "k1"
    place: Literal["reward", "loss"] = "reward"
    ratio: bool = False
    per_length: bool = False
    scale_rewards: bool = False
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.estimator not in ("k1", "k2", "k3", "token_k2", "token_k3", "full"):
            raise BayesKLRLError(f"There is no estimator {self.estimator!r}: k1, k2, k3, token_k2, token_k3 or full.")
        if self.place not in ("reward", "loss"):
            raise BayesKLRLError(f'place must be "reward" or "loss"; got {self.place!r}.')

    def __call__(self, batch: LossInputs) -> Tensor:
        """Return the loss."""
        kl = self.kl(batch)
        rewards = batch.leave_one_out(batch.rewards)
        if self.scale_rewards:
            rewards = rewards / (batch.std(batch.rewards) + 1e-4)
        if self.place == "reward":
            advantages = rewards - batch.alpha * batch.leave_one_out(kl.detach())
            return -batch.mean(_sequence_ratio(batch) * advantages)
        return -batch.mean(_sequence_ratio(batch) * rewards) + batch.alpha * batch.mean(kl)

    def kl(self, batch: LossInputs) -> Tensor:
        """Return the estimate of every completion, shape (N,)."""
        log_ratio = batch.log_probs - batch.ref_log_probs
        if self.estimator in ("k1", "k2", "k3"):
            total = log_ratio.sum(dim=1)
            kl = {"k1": total, "k2": total.square() / 2, "k3": _k3(total)}[self.estimator]
            kl = kl * _sequence_ratio(batch) if self.ratio else kl
        else:
            tokens = {"token_k2": log_ratio.square() / 2, "token_k3": _k3(log_ratio)}.get(self.estimator)
            tokens = _full_kl(batch) if tokens is None else tokens
            kl = (tokens * (batch.log_probs - batch.old_log_probs).exp() if self.ratio else tokens).sum(dim=1)
        return kl / batch.mask.sum(dim=1) if self.per_length else kl


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation on pairs of the prior's completions, in the limit of many (Rafailov et al. 2023).

    x is preferred to y with probability sigmoid(r(x) - r(y)), and the loss is
    -E log sigmoid(alpha [h(winner) - h(loser)]) over all pairs, h = log q - log p0. Its optimum is p* (theory.md 1.11).
    """

    exact: ClassVar[bool] = True
    draw_from: ClassVar[str] = "prior"

    def __call__(self, batch: LossInputs) -> Tensor:
        """Return the loss."""
        if len(batch.rewards) > _MOST_PAIRED:
            raise BayesKLRLError(
                f"DPO here compares all pairs of completions, of which there may be {_MOST_PAIRED}; got {len(batch.rewards)}. "
                "Take a smaller problem or num_draws."
            )
        h = batch.alpha * (batch.log_probs - batch.ref_log_probs).sum(dim=1)
        preferred = torch.sigmoid(batch.rewards[:, None] - batch.rewards)
        # both orders of a pair are in the square, so the winner's term alone covers every pair
        losses = -2 * preferred * torch.nn.functional.logsigmoid(h[:, None] - h)
        weights = torch.full_like(h, 1 / len(h)) if batch.weights is None else batch.weights
        return weights @ losses @ weights


def _sequence_ratio(batch: LossInputs) -> Tensor:
    """Return q(x) / q_old(x), (N,): 1 in value on the first update, with the gradient of log q."""
    return (batch.log_probs.sum(dim=1) - batch.old_log_probs.sum(dim=1)).exp()


def _k3(log_ratio: Tensor) -> Tensor:
    """Return exp(-l) - 1 + l, Schulman's estimate of a KL from l = log q - log p0."""
    return torch.expm1(-log_ratio) + log_ratio


def _full_kl(batch: LossInputs) -> Tensor:
    """Return KL(q_t || p0_t) over the vocabulary, differentiable with the prefixes as given, (N, T); 0 past the length."""
    log_q, log_p = batch.all_log_probs, batch.all_ref_log_probs
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1) * batch.mask
