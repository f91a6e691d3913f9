"""Language models as a user would write them: the protocol, in NumPy, and nothing else."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.weights import logsumexp


class RecurrentLM:
    """h' = tanh(h A + E[token]), logits = h W; counts how often it is run."""

    tokenizer: Any = None
    full_support = True

    def __init__(self, vocab_size: int = 4, eos_token_ids: Sequence[int] = (3,), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_calls = 0
        self._recurrence, self._embedding, self._output = (
            rng.normal(size=(5, 5)),
            rng.normal(size=(vocab_size, 5)),
            rng.normal(size=(5, vocab_size)),
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(character) for character in text] for text in texts]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(str(i) for i in row if i not in self.eos_token_ids) for row in ids]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        self.num_calls += 1
        state = np.ones((len(prompts), 5))
        for row, prompt in enumerate(prompts):
            for token in prompt:
                state[row] = np.tanh(state[row] @ self._recurrence + self._embedding[token])
        return state

    def next_log_probs(self, state: np.ndarray) -> np.ndarray:
        self.num_calls += 1
        logits = state @ self._output
        return logits - logsumexp(logits)[:, None]

    def append(self, state: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        self.num_calls += 1
        return np.tanh(state @ self._recurrence + self._embedding[tokens])

    def select(self, state: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return state[rows]

    def token_log_probs(self, prompts: Sequence[Sequence[int]], sequences: bk.Sequences) -> np.ndarray:
        _, num_draws, num_tokens = sequences.tokens.shape
        tokens = sequences.tokens.reshape(-1, num_tokens)
        state, log_probs = self.prefill(prompts).repeat(num_draws, axis=0), np.zeros(tokens.shape)
        for t in range(num_tokens):
            log_probs[:, t] = self.next_log_probs(state)[np.arange(len(tokens)), tokens[:, t]]
            state = self.append(state, tokens[:, t])
        return log_probs.reshape(sequences.tokens.shape) * sequences.mask


class TextLM(RecurrentLM):
    """The same on text: one digit a token, itself the tokenizer."""

    tokenizer = "digits"


class Classifier:
    """p(label | item) by a table (items, labels): an item's number is its prompt, and a label the only token."""

    eos_token_ids: frozenset[int] = frozenset()
    tokenizer = None
    full_support = True

    def __init__(self, log_probs: np.ndarray) -> None:
        self.log_probs, self.vocab_size = log_probs, log_probs.shape[1]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        raise NotImplementedError

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([prompt[0] for prompt in prompts])

    def next_log_probs(self, state: np.ndarray) -> np.ndarray:
        return self.log_probs[state]

    def append(self, state: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        raise AssertionError("A completion of one token needs no second one.")

    def select(self, state: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return state[rows]

    def token_log_probs(self, prompts: Sequence[Sequence[int]], sequences: bk.Sequences) -> np.ndarray:
        return self.log_probs[self.prefill(prompts)[:, None, None], sequences.tokens]
