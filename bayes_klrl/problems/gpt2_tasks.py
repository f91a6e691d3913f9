"""Tiny GPT-2 models with random rewards, enumerated: as far from their priors as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import all_sequences
from bayes_klrl.likelihood import TokenReward
from bayes_klrl.posterior import Posterior, completion_log_probs
from bayes_klrl.problems.gold import BOUNDS_SLACK
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel
from bayes_klrl.weights import logsumexp, normalised

__all__ = ["GPT2_TASKS", "gpt2_task", "random_gpt2_task"]

GPT2_TASKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2-8x4": {"seed": 1, "vocab_size": 8, "max_new_tokens": 4, "alpha": 0.5, "hidden": 64},
        "gpt2-7x5": {"seed": 1, "vocab_size": 7, "max_new_tokens": 5, "alpha": 0.4, "hidden": 48},
        "gpt2-8x4-sharp": {"seed": 2, "vocab_size": 8, "max_new_tokens": 4, "alpha": 0.4, "target_kl": 2.5},
    }
)
"""The random tasks that variational inference is measured on: vocabulary x length, and how far from the prior."""


def gpt2_task(name: str) -> Posterior:
    """Return one of `GPT2_TASKS` by name."""
    if name not in GPT2_TASKS:
        raise BayesKLRLError(f"There is no task {name!r}; choose one of {sorted(GPT2_TASKS)}.")
    return random_gpt2_task(**GPT2_TASKS[name])


def random_gpt2_task(
    seed: int,
    *,
    vocab_size: int = 8,
    max_new_tokens: int = 4,
    alpha: float = 0.5,
    hidden: int = 64,
    layers: int = 2,
    target_kl: float = 2.0,
) -> Posterior:
    """Return a random small GPT-2 with a random reward, KL(posterior || prior) = `target_kl` nats.

    The reward adds a weight per token, a bonus for one pair of neighbouring tokens and a slope in the length.
    Its scale s is found by bisection on the enumerated completions: KL(p* || p0) grows in s from 0 to -log
    p0(argmax r), so there is one solution. Rewards whose posterior is mostly one completion are drawn again.

    Parameters
    ----------
    seed
        Seed for the model's weights, the prompt and the reward.
    vocab_size
        V, EOS the last id.
    max_new_tokens
        T; about V**T completions are enumerated.
    alpha
        Units of reward per nat. The reward is scaled with it, so the posterior does not depend on it.
    hidden, layers
        Width and depth of the GPT-2 (two heads).
    target_kl
        KL(posterior || prior), in nats.

    Raises
    ------
    BayesKLRLError
        If no reward gets that far from the prior.
    """
    rng = np.random.default_rng(seed)
    prior = _random_gpt2(seed, vocab_size=vocab_size, hidden=hidden, layers=layers)
    prompt = rng.integers(0, vocab_size - 1, size=3).tolist()
    outcomes = all_sequences(vocab_size, prior.eos_token_ids, max_new_tokens)
    log_prior = completion_log_probs(prior, [prompt], outcomes)[0]
    log_likelihood = _draw_log_likelihood(rng, outcomes, log_prior, vocab_size, target_kl)
    reward = replace(log_likelihood, scale=alpha * log_likelihood.scale)
    values = reward(outcomes.tokens[0], outcomes.lengths[0])
    likelihood = TokenReward(
        reward,
        alpha=alpha,
        bounds=(float(values.min()) - BOUNDS_SLACK, float(values.max()) + BOUNDS_SLACK),
        name=f"random reward {seed}",
    )
    return Posterior(prior, likelihood, prompts=[prompt], max_new_tokens=max_new_tokens)


@dataclass(frozen=True, eq=False)
class _RandomReward:
    """scale * (sum_t weight(x_t) + bonus * 1[the pair occurs] + slope * |x|).

    Parameters
    ----------
    token_weights
        Shape (V,).
    pair
        Two tokens, neither of them EOS.
    pair_bonus, length_slope, scale
        The other numbers of the formula.
    """

    token_weights: FloatArray
    pair: tuple[int, int]
    pair_bonus: float
    length_slope: float
    scale: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, vocab_size: int) -> _RandomReward:
        """Return a reward that is skewed: most completions lack the bonus, and long ones differ from short ones."""
        first, second = rng.integers(0, vocab_size - 1, size=2).tolist()
        bonus, slope = rng.uniform(1.0, 2.0), rng.uniform(-0.5, 0.5)
        return cls(0.5 * rng.standard_normal(vocab_size), (first, second), bonus, slope)

    def __call__(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        """Return the reward of completions, shape (N,); of NumPy arrays or of JAX's, traced ones as well."""
        counted = np.arange(tokens.shape[1]) < lengths[:, None]
        looked_up = sum(weight * (tokens == token) for token, weight in enumerate(self.token_weights.tolist()))
        weights = (looked_up * counted).sum(axis=1)
        is_pair = (tokens[:, :-1] == self.pair[0]) & (tokens[:, 1:] == self.pair[1])  # never in the EOS padding
        bonus = self.pair_bonus * is_pair.any(axis=1)
        reward: FloatArray = self.scale * (weights + bonus + self.length_slope * lengths)
        return reward


def _draw_log_likelihood(
    rng: np.random.Generator, outcomes: Sequences, log_prior: FloatArray, vocab_size: int, target_kl: float
) -> _RandomReward:
    """Return a random reward that, at alpha = 1, moves the prior by `target_kl` nats."""
    for _ in range(100):
        reward = _RandomReward.draw(rng, vocab_size)
        values = reward(outcomes.tokens[0], outcomes.lengths[0])
        if -logsumexp(log_prior[values == values.max()]) <= target_kl:
            continue  # the KL cannot get there: its supremum over scales is -log p0(argmax r)
        scale = _scale_for(target_kl, log_prior, values)
        if normalised(log_prior + scale * values).max() < 0.5:  # else it is about one completion only
            return replace(reward, scale=scale)
    raise BayesKLRLError(
        f"No reward moves this prior by {target_kl} nats: it is nearly deterministic. Lower target_kl."
    )


def _scale_for(target_kl: float, log_prior: FloatArray, values: FloatArray) -> float:
    """Return s with KL(p_s || p0) = target_kl by bisection, p_s(x) prop. to p0(x) exp(s r(x))."""

    def kl(scale: float) -> float:  # s E_{p_s}[r] - log Z(s)
        log_joint = log_prior + scale * values
        return float(scale * (normalised(log_joint) @ values) - logsumexp(log_joint))

    low, high = 0.0, 1.0
    while kl(high) < target_kl:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < target_kl else (low, middle)
    return high


def _random_gpt2(seed: int, *, vocab_size: int, hidden: int, layers: int) -> LanguageModel:
    """Return a GPT-2 with random weights, without touching torch's global generator; EOS is the last id."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from bayes_klrl.models.torch_lm.lm import TorchLM

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=32,
        n_embd=hidden,
        n_layer=layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        # The usual 0.02 leaves next tokens nearly uniform; here their entropy is about 0.7 log V.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    return TorchLM(model, eos_token_id=vocab_size - 1)
