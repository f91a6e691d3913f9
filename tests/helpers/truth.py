"""What the tests of algorithms compare with: enumerated posteriors, and judgement by z-score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy import stats

import bayes_klrl as bk
from tests.helpers.backends import ngram_of

__all__ = [
    "Truth",
    "chi_square_p",
    "completions",
    "counts",
    "full_table",
    "pooled",
    "random_posterior",
    "repeated",
    "t_square_p",
    "z_score",
]


def completions(vocab_size: int, eos: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Every completion once, straight from the definition: nothing follows the first EOS."""
    cut = set()
    for x in product(range(vocab_size), repeat=num_tokens):
        end = next((t + 1 for t, token in enumerate(x) if token in eos), num_tokens)
        cut.add(x[:end])
    return [list(x) for x in sorted(cut)]


class Truth:
    """The enumerated posterior of each prompt, by sums over `completions`."""

    def __init__(self, posterior: bk.Posterior) -> None:
        prior = posterior.prior
        self.posterior = posterior
        self.xs = completions(prior.vocab_size, sorted(prior.eos_token_ids), posterior.max_new_tokens)
        one = bk.Sequences.from_lists(self.xs, max_new_tokens=posterior.max_new_tokens, pad_token=posterior.pad_token)
        copies = posterior.num_prompts
        self.sequences = bk.Sequences(np.repeat(one.tokens, copies, 0), np.repeat(one.lengths, copies, 0))
        self.log_prior = posterior.log_prior(self.sequences)
        self.reward = posterior.reward(self.sequences)
        joint = self.log_prior + self.reward / posterior.alpha
        self.log_evidence = np.log(np.exp(joint).sum(axis=1))
        self.log_posterior = joint - self.log_evidence[:, None]
        self.p = np.exp(self.log_posterior)

    def log_psi(self, p: int, prefix: Sequence[int]) -> float:
        """log psi*(prefix) = log sum of p0 exp(r / alpha) over what begins with it, less log p0(prefix)."""
        t = len(prefix)
        begins = (self.sequences.tokens[p, :, :t] == prefix).all(axis=1) & (self.sequences.lengths[p] > t)
        joint = np.exp(self.log_posterior[p, begins] + self.log_evidence[p]).sum()
        return float(np.log(joint) - np.log(np.exp(self.log_prior[p, begins]).sum()))

    def twist(self) -> Any:
        """The optimal twist, as a function that looks every prefix up."""
        known: dict[Any, float] = {}

        def look_up(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
            keys = [(int(p), *prefix) for p, prefix in zip(prompt_index, prefixes.tolist(), strict=True)]
            for key in set(keys) - known.keys():
                known[key] = self.log_psi(key[0], key[1:])
            return np.array([known[key] for key in keys])

        return look_up

    def policy(self) -> bk.NgramLM:
        """The posterior as an `NgramLM`, one context a prefix; prompts must be of one length."""
        posterior, prior = self.posterior, self.posterior.prior
        (prompt_length,) = {len(ids) for ids in posterior.prompt_ids}
        order = posterior.max_new_tokens + prompt_length
        table = np.full((prior.vocab_size,) * order, 1.0 / prior.vocab_size)
        mass: dict[tuple[int, ...], np.ndarray] = {}
        for p, prompt in enumerate(posterior.prompt_ids):
            for x, prob in zip(self.xs, self.p[p], strict=True):
                for t, token in enumerate(x):
                    read = [posterior.pad_token] * order + [*prompt, *x[:t]]
                    context = tuple(read[len(read) - order + 1 :])
                    mass.setdefault(context, np.zeros(prior.vocab_size))[token] += prob
        for context, masses in mass.items():
            table[context] = masses / masses.sum()
        with np.errstate(divide="ignore"):
            return bk.NgramLM(np.log(table), eos_token_id=prior.eos_token_ids, tokenizer=prior.tokenizer)

    def kl(self, guide: bk.LanguageModel) -> np.ndarray:
        """KL(q || p*) of each prompt."""
        log_q = bk.Posterior(
            guide,
            self.posterior.likelihood,
            prompts=[list(ids) for ids in self.posterior.prompt_ids],
            max_new_tokens=self.posterior.max_new_tokens,
        ).log_prior(self.sequences)
        return (np.exp(log_q) * (log_q - self.log_posterior)).sum(axis=1)


def random_posterior(
    seed: int,
    *,
    vocab_size: int = 4,
    eos: Sequence[int] = (3,),
    order: int = 2,
    num_tokens: int = 5,
    prompts: Sequence[Sequence[int]] = ((),),
    alpha: float = 0.5,
    eos_logit: float = 0.0,
    prompt_shift: float = 0.0,
) -> bk.Posterior:
    """A random n-gram prior with a lopsided reward: token weights, a bonus for a pair, a slope in the length.

    The reward takes prompts in turns: a posterior of the same likelihood whose prompts are these, k times over, is k copies.
    """
    rng = np.random.default_rng(seed)
    logits = 1.2 * rng.standard_normal((vocab_size,) * order)
    logits[..., list(eos)] += eos_logit
    weights = rng.standard_normal(vocab_size)
    bonus, slope = rng.uniform(1.0, 2.0), rng.uniform(-0.3, 0.3)

    def reward(tokens: np.ndarray, lengths: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        total = (0.4 * weights[tokens] * inside).sum(axis=1) + slope * lengths
        pair = ((tokens[:, :-1] == 0) & (tokens[:, 1:] == 1) & inside[:, 1:]).any(axis=1)
        return total + bonus * pair + prompt_shift * (prompt_index % len(prompts))

    table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return bk.Posterior(
        bk.NgramLM(table, eos_token_id=set(eos)),
        bk.TokenReward(reward, alpha=alpha),
        prompts=[list(prompt) for prompt in prompts],
        max_new_tokens=num_tokens,
    )


def repeated(posterior: bk.Posterior, num_runs: int) -> bk.Posterior:
    """The first prompt of a posterior, as often as there are runs.

    Every prompt has random numbers of its own, so P equal prompts are P independent runs in one vectorised pass.
    """
    prompts = [list(posterior.prompt_ids[0])] * num_runs
    return bk.Posterior(posterior.prior, posterior.likelihood, prompts=prompts, max_new_tokens=posterior.max_new_tokens)


def full_table(lm: bk.LanguageModel, order: int | None = None, *, noise: float = 0.0, seed: int = 0) -> bk.NgramLM:
    """The same model with longer contexts (None: its own), and its logits perturbed."""
    given = ngram_of(lm).log_probs
    table = np.broadcast_to(given, (lm.vocab_size,) * (order or given.ndim))
    logits = table + noise * np.random.default_rng(seed).standard_normal(table.shape)
    return bk.NgramLM(
        logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)),
        eos_token_id=lm.eos_token_ids,
        tokenizer=lm.tokenizer,
    )


def counts(truth: Truth, tokens: np.ndarray) -> np.ndarray:
    """How often each completion of `truth` is among padded tokens (N, T)."""
    place = truth.posterior.prior.vocab_size ** np.arange(tokens.shape[1])
    codes = truth.sequences.tokens[0] @ place
    order = np.argsort(codes)
    found = np.searchsorted(codes[order], tokens @ place)
    assert (codes[order][found] == tokens @ place).all()
    return np.bincount(order[found], minlength=len(codes))


def pooled(probs: np.ndarray, num: int, least: float = 5.0) -> np.ndarray:
    """Labels of cells, each of expectation >= `least` under `num` draws, rare outcomes together."""
    labels = np.zeros(len(probs), dtype=np.int64)
    cell, mass = 0, 0.0
    left = num * probs.sum()
    for outcome in np.argsort(probs):
        labels[outcome] = cell
        mass += num * probs[outcome]
        left -= num * probs[outcome]
        if mass >= least and left >= least:
            cell, mass = cell + 1, 0.0
    return labels


def chi_square_p(observed: np.ndarray, probs: np.ndarray) -> float:
    """The p-value of counts against probabilities, cells pooled to expectations of at least 5."""
    assert (observed[probs == 0] == 0).all()
    labels = pooled(probs, int(observed.sum()))
    seen = np.bincount(labels, weights=observed)
    expected = np.bincount(labels, weights=probs) * observed.sum() / probs.sum()
    assert len(seen) > 2
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(statistic, len(seen) - 1))


def z_score(values: np.ndarray, expected: float) -> float:
    """How many standard errors the mean is off."""
    return float((values.mean() - expected) / (values.std(ddof=1) / np.sqrt(len(values))))


def t_square_p(samples: np.ndarray, expected: np.ndarray, num_directions: int = 8, seed: int = 0) -> float:
    """The p-value of mean = expected for vectors (runs, coordinates): Hotelling's T^2 on random projections.

    The first directions are those of the expectation and of its largest coordinates.
    """
    num, size = samples.shape
    directions = np.random.default_rng(seed).standard_normal((num_directions, size))
    if np.abs(expected).max() > 0:
        directions[0] = expected
    errors = (samples - expected) @ directions.T
    mean, covariance = errors.mean(axis=0), np.cov(errors.T)
    t_square = num * mean @ np.linalg.solve(covariance, mean)
    return float(
        stats.f.sf(
            t_square * (num - num_directions) / (num_directions * (num - 1)),
            num_directions,
            num - num_directions,
        )
    )
