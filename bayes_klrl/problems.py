"""Posteriors with known truth: small enough to enumerate, hard enough to tell methods apart.

`gold_posterior` is a deterministic table whose numbers are in THEORY.md, section 6; `random_gpt2_task` is a
small transformer with a random reward, as far from its prior as asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact import all_sequences
from bayes_klrl.likelihood import TokenReward
from bayes_klrl.models.ngram_lm import NgramLM
from bayes_klrl.posterior import Posterior, completion_log_probs
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp, normalised

if TYPE_CHECKING:
    from bayes_klrl.models.torch_lm import TorchLM

__all__ = ["GPT2_TASKS", "audit_posterior", "gold_posterior", "gold_table", "gpt2_task", "random_gpt2_task"]

GPT2_TASKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2-8x4": {"seed": 1, "vocab_size": 8, "max_new_tokens": 4, "alpha": 0.5, "hidden": 64},
        "gpt2-7x5": {"seed": 1, "vocab_size": 7, "max_new_tokens": 5, "alpha": 0.4, "hidden": 48},
        "gpt2-8x4-sharp": {"seed": 2, "vocab_size": 8, "max_new_tokens": 4, "alpha": 0.4, "target_kl": 2.5},
    }
)
"""The random tasks that variational inference is measured on: vocabulary x length, and how far from the prior."""

_BOUNDS_SLACK = 1e-9  # sums of rewards round


def gold_table(eos_logit: float, num: int = 4) -> FloatArray:
    """Return the GOLD bigram table, THEORY section 6: log-probs of shape (num, num), EOS the last token.

        logit(h, a) = sin(1.7 h + 2.3 a + 0.5 h a),  plus `eos_logit` for a = EOS;  rows are softmax(logits).

    The row of EOS doubles as the start, which is how `NgramLM` pads.

    Examples
    --------
    >>> gold_table(-0.5).shape
    (4, 4)
    """
    previous, token = np.indices((num, num))
    logits = np.sin(1.7 * previous + 2.3 * token + 0.5 * previous * token)
    logits[:, -1] += eos_logit
    log_probs: FloatArray = logits - logsumexp(logits)[:, None]
    return log_probs


def gold_posterior(alpha: float = 1 / 1.5, max_new_tokens: int = 6) -> Posterior:
    """Return problem P1 of THEORY section 6: GOLD with eos_logit -0.5, and a reward for "0, and right after it 1".

        r(x) = sum_t r_a(x_t) + r_T(d),  r_a = (0, -0.2, 0.1, 0),  r_T = (0, 0.3, 2),

    d the final state of the automaton "contains 0 then 1". At the default (1093 completions) log Z =
    1.65238447, E[r] = 1.48690885 and KL(p* || p0) = 0.57797880.

    Examples
    --------
    >>> gold_posterior().log_joint([[1, 0, 1, 2, 3]]).round(6)
    array([[-1.847754]])
    """
    contains_01 = _AutomatonReward(
        transitions=np.array([[1, 0, 0, 0], [1, 2, 0, 1], [2, 2, 2, 2]]),
        token_rewards=np.array([0.0, -0.2, 0.1, 0.0]),
        final_rewards=np.array([0.0, 0.3, 2.0]),
    )
    # The worst completion is 1, 1, 1, ...; the best one 0, 1, 2, 2, ...
    low, high = -0.2 * max_new_tokens, 2.0 - 0.2 + 0.1 * (max_new_tokens - 2)
    likelihood = TokenReward(
        contains_01, alpha=alpha, bounds=(low - _BOUNDS_SLACK, high + _BOUNDS_SLACK), name="contains 0 1"
    )
    prior = NgramLM(gold_table(-0.5), eos_token_id=3)
    return Posterior(prior, likelihood, prompts="", max_new_tokens=max_new_tokens)


def audit_posterior(alpha: float = 0.4) -> Posterior:
    """Return a gamble on which trainers that differ in their KL part ways: 40 completions of at most 3 tokens.

        r(x) = 2 [x = 1 1 1] + [x_1 is 0 or 2] - |x| / 10     under GOLD with eos_logit 0.5

    After a first 1 the prize takes two tokens of probability 0.06 each: the posterior leaves it and takes what is sure, the
    myopic policies do not count what the gamble costs and take it. At the default, in nats: KL(p* || p0) = 0.59; KL of the
    myopic policy to p* 1.62, to the nearest posterior of any alpha 0.91.

    Examples
    --------
    >>> audit_posterior().reward([[1, 1, 1], [2, 3], [1, 1, 3]]).round(1)
    array([[ 1.7,  0.8, -0.3]])
    """

    def gamble(tokens: IntArray, lengths: IntArray) -> FloatArray:
        prize, sure = (tokens == 1).all(axis=1), np.isin(tokens[:, 0], (0, 2))
        reward: FloatArray = 2.0 * prize + sure - 0.1 * lengths
        return reward

    likelihood = TokenReward(gamble, alpha=alpha, bounds=(-0.3 - _BOUNDS_SLACK, 1.7 + _BOUNDS_SLACK), name="gamble")
    return Posterior(NgramLM(gold_table(0.5), eos_token_id=3), likelihood, prompts="", max_new_tokens=3)


@dataclass(frozen=True, eq=False)
class _AutomatonReward:
    """sum_t r_a(x_t) + r_T(d_final) for a finite automaton that starts in state 0.

    Parameters
    ----------
    transitions
        The next state, shape (num_states, V).
    token_rewards
        r_a, shape (V,).
    final_rewards
        r_T, shape (num_states,).
    """

    transitions: IntArray
    token_rewards: FloatArray
    final_rewards: FloatArray

    def __call__(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        """Return the reward of completions, shape (N,)."""
        state = np.zeros(len(tokens), dtype=np.int64)
        for t in range(tokens.shape[1]):
            state = np.where(t < lengths, self.transitions[state, tokens[:, t]], state)
        counted = np.arange(tokens.shape[1]) < lengths[:, None]
        reward: FloatArray = (self.token_rewards[tokens] * counted).sum(axis=1) + self.final_rewards[state]
        return reward


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

    The reward adds a weight a token, a bonus for one pair of neighbouring tokens and a slope in the length.
    Its scale s is found by bisection on the enumerated completions: KL(p* || p0) grows in s from 0 to -log
    p0(argmax r), so there is one solution. Rewards whose posterior is mostly one completion are drawn again.

    Parameters
    ----------
    seed
        Of the model's weights, the prompt and the reward.
    vocab_size
        V, EOS the last id.
    max_new_tokens
        T; about V**T completions are enumerated.
    alpha
        Units of reward per nat. The reward is scaled with it, so the posterior does not depend on it.
    hidden, layers
        Width and depth of the GPT-2 (two heads).
    target_kl
        In nats.

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
        bounds=(float(values.min()) - _BOUNDS_SLACK, float(values.max()) + _BOUNDS_SLACK),
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
        In the order of the formula.
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
        """Return the reward of completions, shape (N,)."""
        counted = np.arange(tokens.shape[1]) < lengths[:, None]
        weights = (self.token_weights[tokens] * counted).sum(axis=1)
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


def _random_gpt2(seed: int, *, vocab_size: int, hidden: int, layers: int) -> TorchLM:
    """Return a GPT-2 with random weights, without touching torch's global generator; EOS is the last id."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from bayes_klrl.models.torch_lm import TorchLM

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
