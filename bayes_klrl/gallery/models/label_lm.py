"""A classifier as a language model: the prompt is what is classified, and the completion is one token, the label.

    p(label | prompt) = softmax(head(features(prompt)))[label]

The labels are the EOS tokens, so that a completion has one token, and the posterior over K labels is enumerated by
`bk.Exact`. The features are frozen and computed once for each prompt; the head is a torch network, and `bk.SVI` trains a
copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, TokenIds

__all__ = ["Features", "LabelLM", "LabelTokenizer", "minimise"]

Features = Callable[[Sequence[str]], Tensor]
"""Function that turns P prompts into an array with P as its first axis; nothing in it is trained."""


@dataclass(frozen=True)
class LabelTokenizer:
    """A vocabulary of two parts: the characters that prompts are written in, then the labels.

    Parameters
    ----------
    symbols
        The S characters of prompts; their token ids are 0 to S - 1.
    labels
        The K labels; their token ids are S to S + K - 1.

    Examples
    --------
    >>> tokens = LabelTokenizer("01", ("even", "odd"))
    >>> tokens.encode("011"), tokens.decode([3])
    ([0, 1, 1], 'odd')
    """

    symbols: str
    labels: tuple[str, ...]

    @property
    def characters(self) -> tuple[str, ...]:
        """What each token id stands for."""
        return (*self.symbols, *self.labels)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt's characters.

        Raises
        ------
        BayesKLRLError
            If a character is not among the symbols.
        """
        unknown = sorted(set(text) - set(self.symbols))
        if unknown:
            raise BayesKLRLError(
                f"A prompt has the character {unknown[0]!r}, which is not among the symbols {self.symbols!r}. Write prompts "
                "in these, or make the model with more symbols."
            )
        return [self.symbols.index(character) for character in text]

    def decode(self, ids: TokenIds) -> str:
        """Return the text of some ids: characters, or a label."""
        return "".join(self.characters[token] for token in ids)


class LabelLM:
    """A language model whose completion of a prompt is one label. See `LanguageModel` for the methods.

    Parameters
    ----------
    head
        A torch network that turns the features of P prompts into logits (P, K). Its parameters are those that are trained.
    features
        Function of P prompts, as texts, that returns the features that the head reads. It is called once for each prompt.
    symbols, labels
        The characters of prompts, and the K labels; see `LabelTokenizer`.

    Examples
    --------
    >>> import numpy as np, torch, bayes_klrl as bk
    >>> def number_of_ones(texts):
    ...     return torch.tensor([[float(text.count("1"))] for text in texts])
    >>> few_or_many = LabelLM(torch.nn.Linear(1, 2), number_of_ones, symbols="01", labels=("few", "many"))
    >>> says_many = bk.Reward(lambda completions: [text == "many" for text in completions], alpha=0.5)
    >>> posterior = bk.Posterior(few_or_many, says_many, prompts=["0100", "1110"], max_new_tokens=1)
    >>> bk.check_posterior(posterior).raise_if_broken()
    >>> prior = few_or_many.label_probs(["0100", "1110"])[:, 1]
    >>> evidence = prior * np.exp(2) + 1 - prior
    >>> bool(np.allclose(np.exp(bk.Exact().run(posterior, seed=0).log_evidence), evidence))
    True
    """

    full_support = False  # no character follows a prompt

    def __init__(self, head: nn.Module, features: Features, *, symbols: str, labels: Sequence[str]) -> None:
        self.head = head
        self.tokenizer = LabelTokenizer(symbols, tuple(labels))
        self._features = features
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LabelLM:
        """Return a model with a head of its own; what is frozen is shared."""
        other = copy.copy(self)
        other.head = copy.deepcopy(self.head, memo)
        return other

    @property
    def labels(self) -> tuple[str, ...]:
        """The K labels."""
        return self.tokenizer.labels

    @property
    def vocab_size(self) -> int:
        """V, the number of characters and labels together."""
        return len(self.tokenizer.characters)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The labels, each of which ends a completion."""
        return frozenset(range(len(self.tokenizer.symbols), self.vocab_size))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the head."""
        return self.head.parameters()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel.encode`."""
        return [self.tokenizer.encode(text) for text in texts]

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel.decode`. Labels end a completion, but they are its text."""
        return [self.tokenizer.decode(row) for row in ids]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[TokenIds]) -> Tensor:
        """See `LanguageModel.prefill`: the state is the next token's log-probs, (R, V)."""
        return self._log_probs(prompts)

    def next_log_probs(self, state: Tensor) -> Tensor:
        """See `LanguageModel.next_log_probs`."""
        return state

    def append(self, state: Tensor, tokens: IntArray) -> Tensor:
        """See `LanguageModel.append`. A label ends the completion, so that nothing depends on it."""
        return state

    def select(self, state: Tensor, rows: IntArray) -> Tensor:
        """See `LanguageModel.select`."""
        return state[torch.as_tensor(rows)]

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """See `LanguageModel.token_log_probs`. Differentiable in the head's parameters."""
        inside = torch.as_tensor(sequences.mask)
        tokens = torch.as_tensor(sequences.tokens).masked_fill(~inside, 0)  # (P, N, T)
        found = self._log_probs(prompts).gather(1, tokens.flatten(1)).view(tokens.shape)
        return torch.where(inside, found, 0.0)

    def label_log_probs(self, prompts: Sequence[str]) -> Tensor:
        """Return log p(label | prompt) of every label, (P, K), float32, differentiable in the head's parameters."""
        return self._log_probs(self.encode(prompts))[:, len(self.tokenizer.symbols) :]

    @torch.no_grad()
    def label_probs(self, prompts: Sequence[str]) -> FloatArray:
        """Return p(label | prompt) of every label, (P, K)."""
        found: FloatArray = self.label_log_probs(prompts).double().exp().numpy()
        return found

    def _log_probs(self, prompts: Sequence[TokenIds]) -> Tensor:
        """Return the log-probs of every token after each prompt, (P, V): -inf for characters."""
        labels = self.head(self._features_of(prompts)).log_softmax(-1)
        characters = labels.new_full((len(labels), len(self.tokenizer.symbols)), -torch.inf)
        return torch.cat([characters, labels], dim=1)

    def _features_of(self, prompts: Sequence[TokenIds]) -> Tensor:
        """Return the features of each prompt, computed at the first time."""
        keys = [tuple(prompt) for prompt in prompts]
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        if new:
            with torch.no_grad():
                self._known |= dict(zip(new, self._features(self.decode(new)), strict=True))
        return torch.stack([self._known[key] for key in keys])


def minimise(lm: LabelLM, loss: Callable[[], Tensor], *, steps: int, learning_rate: float = 5e-3) -> None:
    """Minimise a function of the model's log-probs by Adam."""
    optimizer = torch.optim.Adam(lm.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
