"""A hidden Markov model as a language model, `HmmLM`; its next token depends on all tokens before it.

    p(x_1:T) = sum_z p(z_1) E[z_1, x_1] prod_t A[z_t, z_{t+1}] E[z_{t+1}, x_{t+1}]

The decoding state is the filter p(z_t | x_1:t), so sampling and scoring are exact (Rabiner 1989).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.ngram_lm.lm import as_ids, as_int_array, check_vocabulary, plain_ids, texts_of
from bayes_klrl.models.token_ids import decoded_after
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, TokenIds

__all__ = ["HmmLM"]

_SUM_TOLERANCE = 1e-6


class HmmLM:
    """A hidden Markov model over tokens; prompt and completion are one sequence of the same chain.

        p(x_1:T) = sum_z p(z_1) E[z_1, x_1] prod_t A[z_t, z_{t+1}] E[z_{t+1}, x_{t+1}]

    Parameters
    ----------
    initial
        p(z_1), the distribution of the first of S hidden states, shape (S,).
    transitions
        A[z, z'] = p(z_{t+1} = z' | z_t = z), shape (S, S).
    emissions
        E[z, a] = p(x_t = a | z_t = z), shape (S, V).
    eos_token_id
        The id, or ids, that end a completion; None if nothing does.
    tokenizer
        The tokenizer, as for `NgramLM`; None: the model works on token ids only.

    Raises
    ------
    BayesKLRLError
        If the shapes do not fit or rows do not sum to 1 within 1e-6.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> lm = bk.HmmLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]], eos_token_id=None)
    >>> np.exp(lm.next_log_probs(lm.prefill([[], [0, 0]]))).round(2)
    array([[0.4 , 0.6 ],
           [0.63, 0.37]])
    """

    accepts_empty_prompt = True

    def __init__(
        self,
        initial: ArrayLike,
        transitions: ArrayLike,
        emissions: ArrayLike,
        *,
        eos_token_id: int | Collection[int] | None,
        tokenizer: Any | None = None,
    ) -> None:
        self.initial = _distributions("initial", initial, 1)
        self.transitions = _distributions("transitions", transitions, 2)
        self.emissions = _distributions("emissions", emissions, 2)
        num = self.initial.size
        if self.transitions.shape != (num, num) or len(self.emissions) != num:
            raise BayesKLRLError(
                f"With initial of shape ({num},), transitions must be ({num}, {num}) and emissions ({num}, V); got "
                f"{self.transitions.shape} and {self.emissions.shape}."
            )
        self._eos_token_ids = as_ids(eos_token_id)
        self._tokenizer = tokenizer
        # the last row is the chain before its first token
        self._steps = np.concatenate([self.transitions, self.initial[None]])
        check_vocabulary(np.array(sorted(self._eos_token_ids), dtype=np.int64), self.vocab_size)

    @property
    def num_hidden(self) -> int:
        """S, the number of hidden states."""
        return self.initial.size

    @property
    def steps(self) -> FloatArray:
        """p(z_{t+1} | z_t), shape (S + 1, S); the last row is p(z_1), for the state before the first token."""
        return self._steps

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel.vocab_size`."""
        return int(self.emissions.shape[1])

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel.eos_token_ids`."""
        return self._eos_token_ids

    @property
    def full_support(self) -> bool:
        """See `LanguageModel.full_support`; true only if every hidden state emits every token."""
        return bool((self.emissions > 0).all())

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel.tokenizer`."""
        return self._tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel.encode`. Without a tokenizer only "" is legal: it has no ids."""
        if self._tokenizer is None and any(texts):
            raise BayesKLRLError("This HmmLM has no tokenizer: give prompts as lists of token ids.")
        return [plain_ids(self._tokenizer, text) if text else [] for text in texts]

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel.decode`."""
        if self._tokenizer is None:
            raise BayesKLRLError("This HmmLM has no tokenizer, so its tokens have no text: use token ids.")
        return texts_of(self._tokenizer, ids, self._eos_token_ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return decoded_after(self._tokenizer, self.decode, prompts, ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> FloatArray:
        """Return the filter p(z | prompt) after each prompt, (R, S + 1); before the first token the last entry is 1.

        Raises
        ------
        BayesKLRLError
            If a prompt has probability 0, so that p(completion | prompt) is undefined.
        """
        rows = []
        for p, prompt in enumerate(prompts):
            state = np.eye(self.num_hidden + 1)[-1:]
            for token in as_int_array(prompt):
                if np.isneginf(self.next_log_probs(state)[0, _index(token, self.vocab_size)]):
                    raise BayesKLRLError(f"Prompt {p} has probability 0 under this HmmLM, at token {token}. Change it.")
                state = self.append(state, np.array([token]))
            rows.append(state)
        return np.concatenate(rows)

    def next_log_probs(self, state: FloatArray) -> FloatArray:
        """See `LanguageModel.next_log_probs`."""
        with np.errstate(divide="ignore"):
            log_probs: FloatArray = np.log(state @ self._steps @ self.emissions)
        return np.minimum(log_probs, 0.0)

    def append(self, state: FloatArray, tokens: IntArray) -> FloatArray:
        """See `LanguageModel.append`. After a token of probability 0 the filter is uniform."""
        tokens = as_int_array(tokens)
        check_vocabulary(tokens, self.vocab_size)
        joint = (state @ self._steps) * self.emissions[:, tokens].T
        total = joint.sum(axis=1, keepdims=True)
        filtered = np.where(total > 0, joint / np.where(total > 0, total, 1.0), 1.0 / self.num_hidden)
        return np.concatenate([filtered, np.zeros((len(state), 1))], axis=1)

    def select(self, state: FloatArray, rows: IntArray) -> FloatArray:
        """See `LanguageModel.select`."""
        return state[rows]

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """See `LanguageModel.token_log_probs`."""
        num_prompts, num_draws, width = sequences.tokens.shape
        if len(prompts) != num_prompts:
            raise BayesKLRLError(f"There are {len(prompts)} prompts and completions for {num_prompts}; give one each.")
        state = self.select(self.prefill(prompts), np.repeat(np.arange(num_prompts), num_draws))
        tokens, mask = sequences.tokens.reshape(-1, width), sequences.mask.reshape(-1, width)
        check_vocabulary(tokens[mask], self.vocab_size)
        log_probs = np.zeros(tokens.shape)
        for t in range(width):
            going = np.flatnonzero(mask[:, t])
            read = tokens[going, t]
            hidden = state[going] @ self._steps
            with np.errstate(divide="ignore"):
                log_probs[going, t] = np.minimum(np.log((hidden * self.emissions[:, read].T).sum(axis=1)), 0.0)
            state[going] = self.append(state[going], read)
        return log_probs.reshape(sequences.tokens.shape)


def _index(token: int, vocab_size: int) -> int:
    """Return a token id; refuse one outside the vocabulary."""
    check_vocabulary(np.array([token]), vocab_size)
    return int(token)


def _distributions(what: str, given: ArrayLike, ndim: int) -> FloatArray:
    """Return rows of probabilities, normalised in float64 and read-only."""
    probs = np.array(given, dtype=np.float64)
    if probs.ndim != ndim or not probs.size:
        raise BayesKLRLError(f"{what} must have {ndim} axes and at least one entry; got shape {probs.shape}.")
    if not (probs >= 0).all() or np.isinf(probs).any():
        raise BayesKLRLError(f"{what} holds probabilities, which are neither negative nor NaN; got {probs.min()}.")
    sums = probs.sum(axis=-1, keepdims=True)
    if (np.abs(sums - 1) > _SUM_TOLERANCE).any():
        worst = sums.ravel()[np.abs(sums.ravel() - 1).argmax()]
        raise BayesKLRLError(f"Every row of {what} must sum to 1 within {_SUM_TOLERANCE}; one sums to {worst:.9g}.")
    probs /= sums
    probs.setflags(write=False)
    return probs
