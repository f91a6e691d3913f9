"""Policies as tables over every prefix of a problem small enough to enumerate.

A `PrefixTree` numbers the prefixes of an enumeration and propagates values from the completions back to the empty prefix. A
`PrefixPolicy` holds one next-token distribution per prefix. Every policy on the problem has this form. So the policy that a
trainer converges to in this family shows the effect of its loss alone, not the limits of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp

__all__ = ["PrefixPolicy", "PrefixTree", "StateValue"]

StateValue: TypeAlias = Callable[[IntArray, FloatArray], FloatArray]
"""A function of the numbers of K prefixes, (K,), and the values Q of their tokens, (P, K, V), that returns V(s), (P, K)."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Every unfinished prefix of an enumeration, ordered by length, the empty prefix first.

    Parameters
    ----------
    sequences
        Every completion of one prompt exactly once, shape (1, M, T), as `all_sequences` returns them.
    vocab_size
        V, the number of tokens.

    Attributes
    ----------
    states
        Number of the prefix before each token, shape (M, T); 0 past a completion's length.
    prefixes
        The tokens of each of the S prefixes.
    leaf, child
        The number of the completion, or of the longer prefix, that a prefix becomes by one more token, shape (S, V) each; -1
        where there is none.
    """

    sequences: Sequences
    vocab_size: int
    states: IntArray = field(init=False)
    prefixes: tuple[tuple[int, ...], ...] = field(init=False)
    leaf: IntArray = field(init=False)
    child: IntArray = field(init=False)

    def __post_init__(self) -> None:
        completions = self.sequences.lists()
        proper = {tuple(ids[:t]) for ids in completions for t in range(len(ids))}
        prefixes = tuple(sorted(proper, key=lambda prefix: (len(prefix), prefix)))
        number = {prefix: s for s, prefix in enumerate(prefixes)}
        states = np.zeros(self.sequences.tokens.shape[1:], dtype=np.int64)
        leaf, child = np.full((2, len(prefixes), self.vocab_size), -1, dtype=np.int64)
        for m, ids in enumerate(completions):
            states[m, : len(ids)] = [number[tuple(ids[:t])] for t in range(len(ids))]
            leaf[states[m, len(ids) - 1], ids[-1]] = m
        for s, prefix in enumerate(prefixes[1:], start=1):
            child[number[prefix[:-1]], prefix[-1]] = s
        for name, value in {"states": states, "prefixes": prefixes, "leaf": leaf, "child": child}.items():
            object.__setattr__(self, name, value)

    @property
    def num_states(self) -> int:
        """S, the number of unfinished prefixes."""
        return len(self.prefixes)

    @property
    def tokens(self) -> IntArray:
        """The completions' tokens, shape (M, T)."""
        tokens: IntArray = self.sequences.tokens[0]
        return tokens

    @property
    def mask(self) -> np.ndarray:
        """True at the positions that belong to a completion, shape (M, T)."""
        mask: np.ndarray = self.sequences.mask[0]
        return mask

    def backward(self, terminal: FloatArray, state_value: StateValue) -> FloatArray:
        """Return Q(s, a), shape (P, S, V): the completion's value, or V of the longer prefix; -inf where there is neither.

            Q(s, a) = terminal(sa)  if sa is complete,  else  V(sa);     V(s) = state_value(s, Q(s, .))

        Parameters
        ----------
        terminal
            Values of the completions, shape (P, M).
        state_value
            The function that computes a prefix's value from the values of its tokens.
        """
        q = np.where(self.leaf >= 0, terminal[:, self.leaf], -np.inf)
        lengths = np.array([len(prefix) for prefix in self.prefixes])
        for length in range(lengths.max(), 0, -1):  # the empty prefix continues no other
            level = np.flatnonzero(lengths == length)
            values = state_value(level, q[:, level])
            parents, tokens = np.nonzero(np.isin(self.child, level))
            q[:, parents, tokens] = values[:, self.child[parents, tokens] - level[0]]
        return q

    def conditionals(self, log_mass: FloatArray) -> FloatArray:
        """Return log p(a | s), shape (P, S, V), of a distribution that is given as log p(x) + constant, shape (P, M).

        After a prefix of probability 0 all tokens are equally likely.
        """
        log_q = self.backward(log_mass, lambda _, q: logsumexp(q))
        total = logsumexp(log_q)[..., None]
        return np.where(np.isneginf(total), -np.log(self.vocab_size), log_q - np.where(np.isneginf(total), 0.0, total))

    def log_probs(self, table: FloatArray) -> FloatArray:
        """Return log p(x) of every completion, shape (P, M), from log p(a | s), shape (P, S, V)."""
        per_token = np.where(self.mask, table[:, self.states, self.tokens], 0.0)
        total: FloatArray = per_token.sum(axis=2)
        return total


@dataclass(frozen=True, eq=False)
class PrefixPolicy:
    """A table of next-token distributions, one for every prompt and every unfinished prefix of a small problem.

    This is not a language model: it cannot be decoded, and it knows the prompts and completions of its own posterior only. It
    is the exact form of a policy. `log_probs` gives the probability of every completion at once, so that ELBO and KL are sums
    and not estimates. `language_model` turns it into an `NgramLM`, which has the methods of a `LanguageModel`.

    Parameters
    ----------
    posterior
        The posterior whose prompts and completions the table covers.
    tree
        The enumeration of its completions and prefixes.
    table
        log q(a | c, s) in nats, shape (P, S, V).

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> policy = bk.posterior_policy(bk.Posterior(coin, longer, max_new_tokens=2))
    >>> policy.tree.prefixes, policy.table.shape
    (((), (0,)), (1, 2, 2))
    >>> bool(np.isclose(np.exp(policy.log_probs).sum(), 1.0))
    True
    """

    posterior: Posterior
    tree: PrefixTree
    table: FloatArray

    @property
    def sequences(self) -> Sequences:
        """Every completion exactly once for each prompt, shape (P, M, T), in the order of `log_probs`."""
        one, copies = self.tree.sequences, self.posterior.num_prompts
        return Sequences(np.repeat(one.tokens, copies, axis=0), np.repeat(one.lengths, copies, axis=0))

    @property
    def log_probs(self) -> FloatArray:
        """Log q(x | c) of every completion in nats, shape (P, M)."""
        return self.tree.log_probs(self.table)

    def kl_to(self, log_p: FloatArray) -> FloatArray:
        """Return KL(q || p) in nats, shape (P,), from log p of every completion, shape (P, M)."""
        log_q = self.log_probs
        with np.errstate(invalid="ignore"):
            terms = np.where(np.isneginf(log_q), 0.0, np.exp(log_q) * (log_q - log_p))
        kl: FloatArray = terms.sum(axis=1)
        return kl

    def language_model(self) -> NgramLM:
        """Return the policy as an `NgramLM` whose contexts hold the whole prompt and prefix.

        Raises
        ------
        BayesKLRLError
            If two prefixes would share a context: without an EOS token the padding before the start is token 0, which
            cannot be distinguished from a first token 0.
        """
        posterior, vocab_size = self.posterior, self.tree.vocab_size
        width = posterior.max_new_tokens - 1 + max(len(ids) for ids in posterior.prompt_ids)
        table = np.full((vocab_size,) * (width + 1), -np.log(vocab_size))
        seen = set()
        for p, prompt in enumerate(posterior.prompt_ids):
            for s, prefix in enumerate(self.tree.prefixes):
                read = [posterior.pad_token] * width + [*prompt, *prefix]
                context = tuple(read[len(read) - width :])
                if context in seen:
                    raise BayesKLRLError(
                        f"The prefix {list(prefix)} of prompt {p} has the same context {context} as another prefix. "
                        "Score with `log_probs` instead, or give the problem an EOS token."
                    )
                seen.add(context)
                table[context] = self.table[p, s]
        prior = posterior.prior
        return NgramLM(table, eos_token_id=prior.eos_token_ids, tokenizer=prior.tokenizer)
