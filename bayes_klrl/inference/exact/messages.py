"""The exact posterior by backward messages: an n-gram or hidden Markov prior, and a reward that an automaton computes.

    log Z = B_0(start),    p*(x) = p0(x) exp(r(x) / alpha) / Z                                    (theory.md 5.2, 5.4)

In time linear in T, at lengths of thousands: log evidence, independent draws, log p*(x), moments, marginals, the optimal twist
and the posterior as a language model. This is dynamic programming, called soft value iteration in RL; nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bayes_klrl.arrays import draw_tokens
from bayes_klrl.checks import check_count
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, SupportError
from bayes_klrl.inference.exact.backoff_chain import BackoffChain
from bayes_klrl.inference.exact.backward_pass import BackwardPass, StoredMessages
from bayes_klrl.inference.exact.message_lm import MessageLM, MessageTwist
from bayes_klrl.inference.exact.prior_chains import Chain, DenseChain, HmmChain
from bayes_klrl.inference.exact.summaries import Marginals, forward_marginals, path_moments, prior_mean
from bayes_klrl.models.automata.reward import AutomatonPotential, automaton_potential
from bayes_klrl.models.ngram_lm.hmm import HmmLM
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.models.ngram_lm.tables import BackoffTable, DenseTable
from bayes_klrl.posterior import Posterior
from bayes_klrl.prompts.words import prompt_words
from bayes_klrl.randomness import Streams, prompt_keys
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State
from bayes_klrl.weights import logsumexp

__all__ = ["Messages", "Moments", "backward_messages", "chain_of", "why_no_messages"]

_ENTRIES_PER_CHUNK = 2**21


@dataclass(frozen=True, eq=False)
class Moments:
    """Exact summaries of a posterior, one number per prompt, shape (P,) each, in nats except for rewards.

    Parameters
    ----------
    reward, variance
        E[r] and Var[r] under the posterior, in the reward's own units.
    kl
        KL(p* || p0), the divergence of the posterior from the prior.
    kl_from_prior
        KL(p0 || p*); inf if the prior can draw a completion of likelihood 0.
    entropy
        -E log p*(x) under the posterior; NaN for a hidden Markov prior, for which there is no closed form.
    prior_reward
        E[r] under the prior.
    log_ess_ratio
        The limit of log(ESS / N) of importance sampling from the prior, 2 log Z(b) - log Z(2b) with b = 1 / alpha.
    """

    reward: FloatArray
    variance: FloatArray
    kl: FloatArray
    kl_from_prior: FloatArray
    entropy: FloatArray
    prior_reward: FloatArray
    log_ess_ratio: FloatArray


class Messages:
    """A solved posterior, as returned by `backward_messages`.

    Attributes
    ----------
    posterior
        The posterior that was solved.
    potential
        Its likelihood in nats on one automaton.
    chain
        Its prior as a chain of states.
    log_evidence
        The exact log Z of each prompt, shape (P,).
    """

    def __init__(self, posterior: Posterior, chain: Chain, potential: AutomatonPotential) -> None:
        self.posterior, self.chain, self.potential = posterior, chain, potential
        self._backward = BackwardPass(chain, potential, posterior.prior.eos_token_ids)
        self._stored = StoredMessages(self._backward, self.num_tokens)
        self.log_evidence = self._log_evidence(self._stored.at(0))
        if np.isneginf(self.log_evidence).any():
            p = int(np.isneginf(self.log_evidence).argmax())
            raise SupportError(
                f"Every completion of prompt {p} ({prompt_words(posterior.prompts[p])}) has likelihood 0 or prior "
                "probability 0: there is no posterior. Relax the constraint."
            )

    def __repr__(self) -> str:
        evidence = ", ".join(f"{value:.6f}" for value in self.log_evidence[:3])
        return f"Messages({self.chain.num_states} x {self.potential.final.size} states, log evidence [{evidence}])"

    @property
    def num_tokens(self) -> int:
        """Largest number of tokens, T."""
        return self.posterior.max_new_tokens

    @cached_property
    def _start(self) -> tuple[IntArray, FloatArray]:
        """The chain's possible states after each prompt and their log-probabilities, (P, m) each."""
        return self.chain.beliefs(self.posterior.prior.prefill(self.posterior.prompt_ids))

    def _log_evidence(self, message: FloatArray) -> FloatArray:
        """Return log of the sum of p(h | prompt) exp(B_0(h, start)), shape (P,)."""
        states, log_probs = self._start
        return logsumexp(log_probs + message[states, 0])

    def log_worth(self, prior_state: State, columns: IntArray, t: int) -> FloatArray:
        """Return log E_p0[likelihood of what follows] after t tokens, shape (R,).

        Parameters
        ----------
        prior_state
            The prior's decoding state of R rows.
        columns
            The states of `potential`'s automaton, shape (R,).
        t
            Number of tokens so far, 0..T.
        """
        states, log_probs = self.chain.beliefs(prior_state)
        return logsumexp(log_probs + self._stored.at(t)[states, columns[:, None]])

    def log_terms(self, prior_state: State, columns: IntArray, t: int) -> FloatArray:
        """Return log p*(a | .) + `log_worth` of every next token a, shape (R, V); parameters as in `log_worth`."""
        return self.chain.log_terms(prior_state, self._values_after(t), columns)

    def _values_after(self, t: int) -> FloatArray:
        """Return the log value of every arrival as token t + 1, shape (J, D); the last result is kept."""
        if self._values[0] != t:
            self._values = (t, self._backward.log_values(self._stored.at(t + 1)))
        return self._values[1]

    _values: tuple[int, FloatArray] = (-1, np.zeros(0))

    def log_posterior(self, x: Sequences | Draws | SequenceOf[SequenceOf[int]]) -> FloatArray:
        """Return the normalised log p*(x | c), shape (P, N), for completions as in `Posterior.log_joint`."""
        return self.posterior.log_joint(x) - self.log_evidence[:, None]

    def draw(self, num_draws: int, seed: int | Streams) -> Sequences:
        """Return N independent posterior draws per prompt, (P, N, T), by ancestral sampling from p*(a | h, d, t)."""
        check_count("num_draws", num_draws)
        streams = seed if isinstance(seed, Streams) else Streams.of(seed)
        posterior, prior = self.posterior, self.posterior.prior
        uniforms = streams.uniforms(prompt_keys(posterior.prompt_ids), 0, num_draws, self.num_tokens)
        index = np.repeat(np.arange(posterior.num_prompts), num_draws)
        tokens = np.full((index.size, self.num_tokens), posterior.pad_token, dtype=np.int64)
        lengths = np.zeros(index.size, dtype=np.int64)
        state, columns = prior.select(prior.prefill(posterior.prompt_ids), index), np.zeros_like(index)
        rows = np.arange(index.size)
        for t in range(self.num_tokens):
            drawn = self._next_tokens(state, columns, t, uniforms[t, rows])
            tokens[rows, t] = drawn
            lengths[rows] += 1
            going = np.flatnonzero(~np.isin(drawn, list(prior.eos_token_ids)))
            if not going.size:
                break
            rows, drawn = rows[going], drawn[going]
            columns = self.potential.transitions[columns[going], drawn]
            state = prior.append(prior.select(state, going), drawn)
        shape = (posterior.num_prompts, num_draws)
        return Sequences(tokens.reshape(*shape, -1), lengths.reshape(shape))

    def _next_tokens(self, state: State, columns: IntArray, t: int, uniforms: FloatArray) -> IntArray:
        """Return the next token of each row, computed for some rows at a time to bound memory."""
        step = max(1, _ENTRIES_PER_CHUNK // self.posterior.prior.vocab_size)
        drawn = np.empty(columns.size, dtype=np.int64)
        for start in range(0, columns.size, step):
            rows = np.arange(start, min(start + step, columns.size))
            log_terms = self.log_terms(self.posterior.prior.select(state, rows), columns[rows], t)
            log_terms -= log_terms.max(axis=1, keepdims=True)
            drawn[rows] = draw_tokens(log_terms, np.arange(rows.size), uniforms[rows])
        return drawn

    def moments(self) -> Moments:
        """Return mean and variance of the reward, KLs, entropy and the efficiency of importance sampling from the prior."""
        alpha = self.posterior.alpha
        moments = path_moments(self._backward, self._stored, self.num_tokens)
        states, weights = self._posterior_start
        values = moments.mean[states, 0]
        mean = (weights * values).sum(axis=1)
        spread = (values - mean[:, None]) ** 2 + moments.variance[states, 0]
        variance = (weights * spread).sum(axis=1)
        entropy = np.full(mean.shape, np.nan)
        if moments.log_prior is not None:
            entropy = self.log_evidence - mean - (weights * moments.log_prior[states, 0]).sum(axis=1)
        prior_reward = self._prior_mean()
        return Moments(
            reward=alpha * mean,
            variance=alpha**2 * variance,
            kl=mean - self.log_evidence,
            kl_from_prior=self.log_evidence - prior_reward,
            entropy=entropy,
            prior_reward=alpha * prior_reward,
            log_ess_ratio=2 * self.log_evidence - self._squared_log_evidence(),
        )

    @property
    def _posterior_start(self) -> tuple[IntArray, FloatArray]:
        """The chain's possible states after each prompt and their posterior probabilities, (P, m) each."""
        states, log_probs = self._start
        return states, np.exp(log_probs + self._stored.at(0)[states, 0] - self.log_evidence[:, None])

    def _prior_mean(self) -> FloatArray:
        """Return E_p0[r / alpha] of each prompt, (P,)."""
        states, log_probs = self._start
        values = prior_mean(self._backward, self.num_tokens)[states, 0]
        possible = np.isfinite(log_probs)
        mean: FloatArray = np.where(possible, np.exp(log_probs) * np.where(possible, values, 0.0), 0.0).sum(axis=1)
        return mean

    def _squared_log_evidence(self) -> FloatArray:
        """Return log E_p0[likelihood^2] of each prompt, (P,)."""
        backward = BackwardPass(self.chain, self.potential.scaled(2.0), self.posterior.prior.eos_token_ids)
        message = backward.last_message
        for _ in range(self.num_tokens):
            message = backward.step(message).message
        return self._log_evidence(message)

    def marginals(self) -> Marginals:
        """Return the distributions of length, tokens and automaton states under the posterior; they are computed once."""
        return self._marginals

    @cached_property
    def _marginals(self) -> Marginals:
        vocab_size = self.posterior.prior.vocab_size
        return forward_marginals(self._backward, self._stored, self.num_tokens, vocab_size, self._posterior_start)

    def twist(self) -> MessageTwist:
        """Return the optimal twist, log psi* of any prefix; alpha times it is the soft value of RL."""
        return MessageTwist(self)

    def policy(self) -> MessageLM:
        """Return the posterior as a language model, for drawing, for scoring, or as a `proposal`."""
        return MessageLM(self)


def backward_messages(posterior: Posterior) -> Messages:
    """Solve a posterior exactly by backward messages.

    Parameters
    ----------
    posterior
        A posterior whose prior is an `NgramLM` (dense or sparse) or an `HmmLM`, and whose likelihood is a product of
        `AutomatonReward` and `AutomatonConstraint`.

    Raises
    ------
    BayesKLRLError
        If prior or likelihood are of another kind.
    SupportError
        If some prompt has no completion of positive likelihood.

    Examples
    --------
    The reward is 1 for an odd number of zeros, which has prior probability 1 / 2.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> odd = bk.Automaton.counts(0, modulo=2, vocab_size=2)
    >>> reward = bk.AutomatonReward(odd, final_rewards=[0.0, 1.0], alpha=1.0)
    >>> messages = backward_messages(bk.Posterior(coin, reward, max_new_tokens=1000))
    >>> bool(np.isclose(messages.log_evidence[0], np.log((1 + np.e) / 2)))
    True
    """
    obstacle = why_no_messages(posterior)
    potential = automaton_potential(posterior.likelihood)
    chain = chain_of(posterior.prior)
    if obstacle is not None or potential is None or chain is None:
        raise BayesKLRLError(f"Backward messages cannot solve this posterior: {obstacle}.")
    return Messages(posterior, chain, potential)


def why_no_messages(posterior: Posterior) -> str | None:
    """Return the reason why backward messages are impossible, or None if they are possible."""
    prior = posterior.prior
    if not isinstance(prior, NgramLM | HmmLM):
        return f"the prior is a {type(prior).__name__}, not a bk.NgramLM or bk.HmmLM"
    if automaton_potential(posterior.likelihood) is None:
        return "its likelihood is not made of bk.AutomatonReward and bk.AutomatonConstraint alone"
    return None


def chain_of(prior: LanguageModel) -> Chain | None:
    """Return a prior as a chain of states, or None if it is of another kind."""
    if isinstance(prior, HmmLM):
        return HmmChain(prior)
    if isinstance(prior, NgramLM) and isinstance(prior.table, BackoffTable):
        return BackoffChain(prior, prior.table)
    if isinstance(prior, NgramLM) and isinstance(prior.table, DenseTable):
        return DenseChain(prior, prior.table)
    return None
