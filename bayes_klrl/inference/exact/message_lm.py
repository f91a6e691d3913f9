"""Solved messages inside other algorithms: the optimal twist, and the posterior itself as a language model.

    log psi*_t(x_1:t) = sum_{u <= t} r_a(d_u, x_u) / alpha + B_t(h_t, d_t)
    p*(a | x_1:t) = p0(a | h_t) exp( r_a / alpha + B_{t+1}(h_t a, d') - B_t(h_t, d_t) )

With the language model as proposal every importance weight is Z; with the twist in addition, so is every intermediate weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bayes_klrl.batch import completion_texts
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.prior_chains import Chain
from bayes_klrl.models.automata.reward import AutomatonPotential
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, State, TokenIds
from bayes_klrl.weights import logsumexp

__all__ = ["MessageLM", "MessageTwist"]


class SolvedMessages(Protocol):
    """The part of `Messages` that the twist and the language model need: R rows are prefixes, each with its prior state."""

    @property
    def posterior(self) -> Posterior:
        """The posterior that was solved."""

    @property
    def chain(self) -> Chain:
        """The prior as a chain."""

    @property
    def potential(self) -> AutomatonPotential:
        """The likelihood in nats on one automaton."""

    @property
    def num_tokens(self) -> int:
        """Largest number of tokens, T."""

    def log_worth(self, prior_state: State, columns: IntArray, t: int) -> FloatArray:
        """Return log E_p0[likelihood of what follows] after t tokens, shape (R,)."""

    def log_terms(self, prior_state: State, columns: IntArray, t: int) -> FloatArray:
        """Return log p*(a | .) + `log_worth` of every next token a, shape (R, V)."""


@dataclass(frozen=True, eq=False)
class MessageTwist:
    """The optimal twist of the solved posterior; for a similar prior a good one (theory.md 3.9).

    It can be called with another posterior that has the same vocabulary and max_new_tokens, and then reads its prompts.

    Parameters
    ----------
    messages
        The solved posterior, as returned by `backward_messages`.

    Examples
    --------
    With the optimal twist and the proposal made from it, two particles give log Z exactly.

    >>> import numpy as np, bayes_klrl as bk
    >>> from bayes_klrl.inference.exact.messages import backward_messages
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> odd = bk.Automaton.counts(0, modulo=2, vocab_size=2)
    >>> reward = bk.AutomatonReward(odd, final_rewards=[0.0, 1.0], alpha=1.0)
    >>> posterior = bk.Posterior(coin, reward, max_new_tokens=10)
    >>> messages = backward_messages(posterior)
    >>> draws = bk.SMC(2, twist=messages.twist(), proposal="twisted").run(posterior, seed=0)
    >>> bool(np.isclose(draws.log_evidence[0], messages.log_evidence[0]))
    True
    """

    messages: SolvedMessages

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        state, columns, paid = self._read(posterior, prompt_index, prefixes)
        return paid + self.messages.log_worth(state, columns, prefixes.shape[1])

    def next_log_psi(
        self,
        posterior: Posterior,
        prompt_index: IntArray,
        prefixes: IntArray,
        prior_rows: tuple[State, IntArray] | None = None,
    ) -> FloatArray:
        """Return log psi* of every one-token extension, (R, V); see `bayes_klrl.models.twists.simple.next_log_psi`.

        It is -inf for tokens to which the prior of the messages gives probability 0.
        """
        state, columns, paid = self._read(posterior, prompt_index, prefixes)
        log_prior = self.messages.posterior.prior.next_log_probs(state)
        log_terms = self.messages.log_terms(state, columns, prefixes.shape[1])
        possible = ~np.isneginf(log_prior)
        log_psi: FloatArray = np.where(possible, log_terms - np.where(possible, log_prior, 0.0), -np.inf)
        return log_psi + paid[:, None]

    def _read(
        self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray
    ) -> tuple[State, IntArray, FloatArray]:
        """Return the prior's state and the automaton's state after each prefix, and the reward so far in nats, (R,)."""
        messages = self.messages
        if posterior.max_new_tokens != messages.num_tokens:
            raise BayesKLRLError(
                f"The twist is for completions of {messages.num_tokens} tokens, the posterior has max_new_tokens = "
                f"{posterior.max_new_tokens}. Compute the messages of a posterior with the same max_new_tokens."
            )
        state = messages.chain.prefix_state(posterior.prompt_ids, prompt_index, prefixes)
        columns = np.zeros(len(prefixes), dtype=np.int64)
        paid = np.zeros(len(prefixes))
        potential = messages.potential
        for tokens in prefixes.T:
            paid += potential.token[columns, tokens]
            columns = potential.transitions[columns, tokens]
        return state, columns, paid


@dataclass(frozen=True, eq=False)
class _DecodingState:
    """The decoding state: the prior's state, the automaton's states (R,), and the number of tokens so far."""

    prior: State
    columns: IntArray
    t: int


@dataclass(frozen=True, eq=False)
class MessageLM:
    """A posterior that was solved by messages, as a `LanguageModel` with next-token probabilities p*(x_t | c, x_<t).

    It is defined for the first max_new_tokens tokens. After a prefix of posterior probability 0, which it never draws, it
    continues as the prior does. It is unrelated to `bk.posterior_policy`, which enumerates a small posterior and returns a
    table, a `PrefixPolicy`; this one takes lengths of thousands.

    Parameters
    ----------
    messages
        The solved posterior, as returned by `backward_messages`.

    Examples
    --------
    As a proposal it makes every importance weight equal to Z.

    >>> import numpy as np, bayes_klrl as bk
    >>> from bayes_klrl.inference.exact.messages import backward_messages
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> odd = bk.Automaton.counts(0, modulo=2, vocab_size=2)
    >>> reward = bk.AutomatonReward(odd, final_rewards=[0.0, 1.0], alpha=1.0)
    >>> posterior = bk.Posterior(coin, reward, max_new_tokens=100)
    >>> messages = backward_messages(posterior)
    >>> draws = bk.ImportanceSampling(5, proposal=messages.policy()).run(posterior, seed=0)
    >>> bool(np.allclose(draws.log_weights, messages.log_evidence[0]))
    True
    """

    messages: SolvedMessages
    accepts_empty_prompt = True

    @property
    def posterior(self) -> Posterior:
        """The solved posterior; as a proposal for it, this model covers everything of positive probability."""
        return self.messages.posterior

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel.vocab_size`."""
        return self.posterior.prior.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel.eos_token_ids`."""
        return self.posterior.prior.eos_token_ids

    @property
    def full_support(self) -> bool:
        """See `LanguageModel.full_support`."""
        potential = self.messages.potential
        finite = bool(np.isfinite(potential.token).all() and np.isfinite(potential.final).all())
        return finite and self.posterior.prior.full_support

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel.tokenizer`."""
        return self.posterior.prior.tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel.encode`."""
        return self.posterior.prior.encode(texts)

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel.decode`."""
        return self.posterior.prior.decode(ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return completion_texts(self.posterior.prior, prompts, ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> _DecodingState:
        """See `LanguageModel.prefill`."""
        return _DecodingState(self.posterior.prior.prefill(prompts), np.zeros(len(prompts), dtype=np.int64), 0)

    def next_log_probs(self, state: _DecodingState) -> FloatArray:
        """See `LanguageModel.next_log_probs`."""
        if state.t >= self.messages.num_tokens:
            raise BayesKLRLError(
                f"The solved posterior has completions of at most {self.messages.num_tokens} tokens, and no token after them."
            )
        log_terms = self.messages.log_terms(state.prior, state.columns, state.t)
        totals = logsumexp(log_terms)
        log_probs = log_terms - np.where(np.isneginf(totals), 0.0, totals)[:, None]
        dead = np.flatnonzero(np.isneginf(totals))
        if dead.size:
            prior = self.posterior.prior
            log_probs[dead] = prior.next_log_probs(prior.select(state.prior, dead))
        return log_probs

    def append(self, state: _DecodingState, tokens: IntArray) -> _DecodingState:
        """See `LanguageModel.append`."""
        columns = self.messages.potential.transitions[state.columns, tokens]
        return _DecodingState(self.posterior.prior.append(state.prior, tokens), columns, state.t + 1)

    def select(self, state: _DecodingState, rows: IntArray) -> _DecodingState:
        """See `LanguageModel.select`."""
        return _DecodingState(self.posterior.prior.select(state.prior, rows), state.columns[rows], state.t)

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """See `LanguageModel.token_log_probs`; log p0 plus the change of log psi*, without a sum over the vocabulary."""
        messages, prior = self.messages, self.posterior.prior
        num_prompts, num_draws, width = sequences.tokens.shape
        log_prior = prior.token_log_probs(prompts, sequences)
        tokens, mask = sequences.tokens.reshape(-1, width), sequences.mask.reshape(-1, width)
        state = self.select(self.prefill(prompts), np.repeat(np.arange(num_prompts), num_draws))
        worth = messages.log_worth(state.prior, state.columns, 0)
        log_probs = log_prior.reshape(-1, width).astype(np.float64)
        for t in range(width):
            rows = np.flatnonzero(mask[:, t])
            read = np.where(mask[:, t], tokens[:, t], 0)
            paid = messages.potential.token[state.columns, read]
            state = self.append(state, read)
            after = self._worth_after(state, np.isin(read, list(self.eos_token_ids)))
            alive = rows[np.isfinite(worth[rows])]  # the other rows follow the prior
            log_probs[alive, t] += paid[alive] + after[alive] - worth[alive]
            worth = after
        by_prompt: FloatArray = log_probs.reshape(log_prior.shape)
        return by_prompt

    def _worth_after(self, state: _DecodingState, ended: np.ndarray) -> FloatArray:
        """Return `log_worth` after the newest token, (R,), or the final reward in nats of rows that ended."""
        worth = self.messages.log_worth(state.prior, state.columns, state.t)
        return np.where(ended, self.messages.potential.final[state.columns], worth)
