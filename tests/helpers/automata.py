"""Random posteriors that can both be enumerated and be solved by messages."""

from collections.abc import Sequence

import numpy as np

import bayes_klrl as bk

__all__ = ["random_automaton", "random_backoff", "random_hmm", "random_likelihood", "solvable_posterior"]


def random_automaton(rng: np.random.Generator, num_states: int, vocab_size: int) -> bk.Automaton:
    """Any machine, EOS moving it as well."""
    return bk.Automaton(rng.integers(0, num_states, size=(num_states, vocab_size)), int(rng.integers(num_states)))


def random_likelihood(
    rng: np.random.Generator, vocab_size: int, *, alpha: float = 0.6, hard: bool = False
) -> bk.Likelihood:
    """A reward paid by state and token and at the end; with `hard`, -inf among them and a constraint besides."""
    automaton = random_automaton(rng, 3, vocab_size)
    token_rewards, final_rewards = 0.5 * rng.standard_normal((3, vocab_size)), rng.standard_normal(3)
    if hard:
        token_rewards[rng.integers(3), rng.integers(vocab_size)] = -np.inf
        final_rewards[rng.integers(3)] = -np.inf
    likelihood: bk.Likelihood = bk.AutomatonReward(
        automaton, token_rewards=token_rewards, final_rewards=final_rewards, alpha=alpha
    )
    if hard:
        likelihood = likelihood * bk.AutomatonConstraint(bk.Automaton.forbids([0, 1], vocab_size=vocab_size))
    return likelihood


def random_table(rng: np.random.Generator, vocab_size: int, order: int, *, holes: bool = False) -> np.ndarray:
    logits = 1.2 * rng.standard_normal((vocab_size,) * order)
    if holes:
        logits[rng.random(logits.shape) < 0.25] = -np.inf
        logits[..., 1] = np.maximum(logits[..., 1], -1.0)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def random_backoff(rng: np.random.Generator, vocab_size: int, order: int, eos: Sequence[int]) -> bk.NgramLM:
    """Fitted to a few short texts, so that much is backed off."""
    texts = [rng.integers(0, vocab_size, size=rng.integers(1, 6)).tolist() for _ in range(5)]
    return bk.NgramLM.fit(texts, order=order, vocab_size=vocab_size, eos_token_id=set(eos) or None)


def random_hmm(rng: np.random.Generator, num_hidden: int, vocab_size: int, eos: Sequence[int]) -> bk.HmmLM:
    """Some transitions and emissions impossible."""
    transitions = rng.dirichlet(np.full(num_hidden, 0.5), size=num_hidden)
    emissions = rng.dirichlet(np.full(vocab_size, 0.5), size=num_hidden)
    return bk.HmmLM(rng.dirichlet(np.ones(num_hidden)), transitions, emissions, eos_token_id=set(eos) or None)


def solvable_posterior(
    kind: str,
    seed: int,
    *,
    vocab_size: int = 4,
    eos: Sequence[int] = (3,),
    num_tokens: int = 4,
    prompts: Sequence[Sequence[int]] = ((),),
    alpha: float = 0.6,
    hard: bool = False,
) -> bk.Posterior:
    """A random posterior; `kind` is "dense 2", "holes 2" (with zeros), "sparse 3", "hmm 3" and the like."""
    rng = np.random.default_rng(seed)
    family, size = kind.split()
    prior: bk.LanguageModel
    if family == "sparse":
        prior = random_backoff(rng, vocab_size, int(size), eos)
    elif family == "hmm":
        prior = random_hmm(rng, int(size), vocab_size, eos)
    else:
        table = random_table(rng, vocab_size, int(size), holes=family == "holes")
        prior = bk.NgramLM(table, eos_token_id=set(eos) or None)
    likelihood = random_likelihood(rng, vocab_size, alpha=alpha, hard=hard)
    return bk.Posterior(prior, likelihood, prompts=[list(p) for p in prompts], max_new_tokens=num_tokens)
