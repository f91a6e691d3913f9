"""Audit TRL's losses: which policy does each converge to? `python examples/audit_grpo.py` (about ten seconds).

A loss is a function of a batch of completions that returns a scalar, as in any trainer. `bk.audit` plugs it into a table
policy on a problem of 40 completions, trains until nothing moves, and names the policy that came out.
"""

import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi import losses

GROUP = 8


def grpo(batch: bk.LossInputs) -> torch.Tensor:
    """Return the loss of `GRPOTrainer`: a group mean as baseline, k3 of every token in the loss, averaged over tokens."""
    groups = batch.rewards.view(-1, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)).view(-1, 1)  # scale_rewards="none"
    ratio = torch.exp(batch.log_probs - batch.old_log_probs)
    log_ratio = batch.ref_log_probs - batch.log_probs
    kl = (torch.exp(log_ratio) - log_ratio - 1) * ratio  # use_bias_correction_kl=True
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + batch.alpha * kl
    return (per_token * batch.mask).sum() / batch.mask.sum()


def rloo(batch: bk.LossInputs) -> torch.Tensor:
    """Return the loss of `RLOOTrainer`: k1 of the completion in the reward, the mean of the others as baseline."""
    kl = (batch.old_log_probs - batch.ref_log_probs).sum(1)
    returns = (batch.rewards - batch.alpha * kl).view(-1, GROUP)
    advantages = (returns - (returns.sum(1, keepdim=True) - returns) / (GROUP - 1)).view(-1)
    ratio = torch.exp((batch.log_probs - batch.old_log_probs).sum(1))
    return -(ratio * advantages).mean()


if __name__ == "__main__":
    for loss in (rloo, grpo, losses.GRPO()):  # the last one scales rewards by the group's standard deviation
        print(bk.audit(loss), end="\n\n" + 110 * "-" + "\n\n")
