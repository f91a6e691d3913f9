"""Certify policies that another trainer tuned: `python examples/certify_other_trainer.py` (half a minute).

Two trainers in plain PyTorch and transformers stand for any other: GRPO as TRL's `GRPOTrainer` has it by default, and a
leave-one-out policy gradient, TRL's `RLOOTrainer`. Each tunes a small GPT-2 towards the same reward with the same beta, and
writes what trainers write, `checkpoint-N` folders. A certificate needs nothing else from a trainer. With a run of TRL's own:

    trainer = GRPOTrainer("my/model", reward_fn, args=GRPOConfig("out", beta=0.5, max_completion_length=24, ...), ...)
    trainer.train()                                # leaves out/checkpoint-N, an adapter with peft_config=...
    prior = bk.TorchLM.from_pretrained("my/model")                # what it was tuned from; temperature= that of the trainer
    posterior = bk.Posterior(prior, bk.Reward(reward_fn, alpha=0.5), prompts=prompts, max_new_tokens=24)
    print(bk.certify(posterior, "out", seed=0))                   # alpha is its beta, reward_fn its own
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

import bayes_klrl as bk
from bayes_klrl.problems import random_gpt2_task

GROUP = 8  # completions whose rewards are compared; TRL: num_generations
BATCH = 256
NUM_DRAWS = 2**15  # of policy and prior, so that implied alpha and frontier gap are known to 0.05 nats


def grpo(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return the loss of GRPO: rewards standardised in each group, k3 of every token in the loss, averaged over tokens."""
    groups = rewards.view(-1, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    ratio = torch.exp(log_probs - log_probs.detach())  # 1, with a gradient: one update per batch, so nothing is clipped
    log_ratio = ref_log_probs - log_probs
    kl = (torch.exp(log_ratio) - log_ratio - 1) * ratio
    return ((beta * kl - ratio * advantages.view(-1, 1)) * mask).sum() / mask.sum()


def leave_one_out(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return the loss with the KL of the whole completion in the reward, and the mean of the others as baseline."""
    scores = (log_probs * mask).sum(1)
    returns = rewards - beta * (scores.detach() - (ref_log_probs * mask).sum(1))
    advantages = (returns - returns.mean()) * BATCH / (BATCH - 1)
    return -(advantages * scores).mean()


def tune(loss: Callable[..., Tensor], posterior: bk.Posterior, folder: Path, num_steps: int = 100) -> None:
    """Train: generate, reward, step. From bayes_klrl come only the reward function and the model to start from."""
    reference, reward_fn, beta = posterior.prior.module, posterior.likelihood.fn, posterior.alpha
    policy = copy.deepcopy(reference)
    eos, num_new = policy.config.eos_token_id, posterior.max_new_tokens
    prompts = torch.tensor(posterior.prompt_ids).repeat(BATCH, 1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    for step in range(1, num_steps + 1):
        ids = policy.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_new,
            do_sample=True,
            top_k=0,
            pad_token_id=eos,
        )
        tokens = ids[:, prompts.shape[1] :]
        ended = (tokens == eos).int()
        mask = (ended.cumsum(1) - ended) == 0  # up to EOS, which belongs to the completion
        rewards = torch.tensor(reward_fn(tokens.numpy(), mask.sum(1).numpy()), dtype=torch.float32)
        with torch.no_grad():
            ref_log_probs = token_log_probs(reference, ids, tokens)
        optimizer.zero_grad()
        loss(token_log_probs(policy, ids, tokens), ref_log_probs, mask, rewards, beta).backward()
        optimizer.step()
        schedule.step()
        if step in (num_steps // 3, num_steps):
            policy.save_pretrained(folder / f"checkpoint-{step}")


def token_log_probs(model: torch.nn.Module, ids: Tensor, tokens: Tensor) -> Tensor:
    """Return log q of every token of the completions, shape (N, T)."""
    logits = model(ids).logits[:, -tokens.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def main(folder: Path) -> tuple[bk.Posterior, dict[str, bk.Certificate]]:
    """Tune by both losses, certify the policies in the folders, and print how far apart they are."""
    logging.disable_progress_bar()
    posterior = random_gpt2_task(seed=1, layers=1, hidden=32)
    frontier = bk.frontier(posterior, num_draws=NUM_DRAWS, seed=0)
    certificates = {}
    for loss in (grpo, leave_one_out):
        torch.manual_seed(0)
        tune(loss, posterior, folder / loss.__name__)
        certificates[loss.__name__] = certificate = bk.certify(
            posterior, folder / loss.__name__, seed=0, num_draws=NUM_DRAWS
        )
        gap = frontier.gap(certificate.reward, certificate.kl_prior)
        print(f"--- {loss.__name__}: {certificate}")
        print(
            f"bk.frontier has its reward for {gap.value:.2f} ± {gap.se:.2f} nats less, at alpha = {gap.implied.alpha:.2f}\n"
        )
    far, near = (certificates[loss.__name__].pooled.reverse_kl.mean() for loss in (grpo, leave_one_out))
    print(
        f"The same beta, reward and budget: GRPO is {far:.2f} nats from the posterior, where leave-one-out is {near:.2f}."
    )
    return posterior, certificates


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
