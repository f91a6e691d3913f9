"""What messages are good for inside other algorithms: the optimal twist, and the posterior itself as a language model.

    log psi*_t(x_1:t) = sum_{u <= t} r_a(d_u, x_u) / alpha + B_t(h_t, d_t)
    p*(a | x_1:t) = p0(a | h_t) exp( r_a / alpha + B_{t+1}(h_t a, d') - B_t(h_t, d_t) )

With the policy as proposal every importance weight is Z; with the twist besides so is every intermediate one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.prior_chains import Chain
from bayes_klrl.models.automata.reward import AutomatonPotential
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, State, TokenIds
from bayes_klrl.weights import logsumexp

__all__ = ["MessageLM", "MessageTwist"]


class SolvedMessages(Protocol):
    """What a solved posterior offers to its twist and its language model; `Messages` has it, see there."""

    @property
    def posterior(self) -> Posterior:
        """The posterior that was solved."""

    @property
    def chain(self) -> Chain:
        """The prior as a chain."""

    @property
    def potential(self) -> AutomatonPotential:
        """The automaton's rewards and transitions."""

    @property
    def num_tokens(self) -> int:
        """T."""

    def log_worth(self, prior_state: State, columns: IntArray, t: int) -> FloatArray:
        """Return log E_p0[likelihood of what follows] after t tokens, shape (R,)."""

    def log_terms(self, prior_state: State, columns: IntArray, t: int) -> FloatArray:
        """Return log p0(a | .) + `log_worth` of every next token a, shape (R, V)."""


@dataclass(frozen=True, eq=False)
class MessageTwist:
    """The optimal twist of the posterior that the messages are of; a good one for a prior like it (theory.md 3.9).

    Called with another posterior it reads that one's prompts, and needs the same vocabulary and max_new_tokens.

    Parameters
    ----------
    messages
        The backward messages.
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

        Tokens that the messages' own prior cannot draw have none: -inf.
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
        """Return the prior's state after each prefix, the automaton's, and what it has paid in nats."""
        messages = self.messages
        if posterior.max_new_tokens != messages.num_tokens:
            raise BayesKLRLError(
                f"The twist is of completions of {messages.num_tokens} tokens, the posterior has max_new_tokens = "
                f"{posterior.max_new_tokens}. Make the messages of a posterior with the same."
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
class _PolicyState:
    """Where the policy is: the prior's state, the automaton's (R,), and how many tokens have been drawn."""

    prior: State
    columns: IntArray
    t: int


@dataclass(frozen=True, eq=False)
class MessageLM:
    """p*(x_t | c, x_<t) of a solved posterior as a `LanguageModel`; it exists for max_new_tokens tokens.

    After a prefix of posterior probability 0, which it never draws, it goes on as the prior does.

    Parameters
    ----------
    messages
        The backward messages.
    """

    messages: SolvedMessages
    accepts_empty_prompt = True

    @property
    def posterior(self) -> Posterior:
        """What it is the policy of; as a proposal for this one it covers all that it must."""
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

    def prefill(self, prompts: Sequence[TokenIds]) -> _PolicyState:
        """See `LanguageModel.prefill`."""
        return _PolicyState(self.posterior.prior.prefill(prompts), np.zeros(len(prompts), dtype=np.int64), 0)

    def next_log_probs(self, state: _PolicyState) -> FloatArray:
        """See `LanguageModel.next_log_probs`."""
        if state.t >= self.messages.num_tokens:
            raise BayesKLRLError(
                f"The posterior policy is of completions of at most {self.messages.num_tokens} tokens; nothing comes after."
            )
        log_terms = self.messages.log_terms(state.prior, state.columns, state.t)
        totals = logsumexp(log_terms)
        log_probs = log_terms - np.where(np.isneginf(totals), 0.0, totals)[:, None]
        dead = np.flatnonzero(np.isneginf(totals))
        if dead.size:
            prior = self.posterior.prior
            log_probs[dead] = prior.next_log_probs(prior.select(state.prior, dead))
        return log_probs

    def append(self, state: _PolicyState, tokens: IntArray) -> _PolicyState:
        """See `LanguageModel.append`."""
        columns = self.messages.potential.transitions[state.columns, tokens]
        return _PolicyState(self.posterior.prior.append(state.prior, tokens), columns, state.t + 1)

    def select(self, state: _PolicyState, rows: IntArray) -> _PolicyState:
        """See `LanguageModel.select`."""
        return _PolicyState(self.posterior.prior.select(state.prior, rows), state.columns[rows], state.t)

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """See `LanguageModel.token_log_probs`: log p0 plus the change of log psi*, with no sum over the vocabulary."""
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
            alive = rows[np.isfinite(worth[rows])]  # elsewhere the policy is the prior
            log_probs[alive, t] += paid[alive] + after[alive] - worth[alive]
            worth = after
        by_prompt: FloatArray = log_probs.reshape(log_prior.shape)
        return by_prompt

    def _worth_after(self, state: _PolicyState, ended: np.ndarray) -> FloatArray:
        """Return log of what rows are worth after their newest token, the final reward for those that ended."""
        worth = self.messages.log_worth(state.prior, state.columns, state.t)
        return np.where(ended, self.messages.potential.final[state.columns], worth)
