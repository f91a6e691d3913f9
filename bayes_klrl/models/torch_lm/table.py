"""A dense n-gram table as trainable torch logits, the guide of SVI if the prior is an `NgramLM`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bayes_klrl.batch import completion_texts
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import Array, IntArray, TokenIds

__all__ = ["TableLM"]


class TableLM(nn.Module):
    """log p(a | h) = log_softmax(logits[h])[a], h the last order - 1 tokens; see `LanguageModel` for the methods.

    With an order of at least `max_new_tokens` every prefix has its own row, so the posterior itself is in the family. With a
    smaller order SVI finds the best n-gram policy.

    Parameters
    ----------
    prior
        The model that the logits start from, with its context and EOS conventions. Tokens of probability 0 stay impossible.
    """

    accepts_empty_prompt = True

    def __init__(self, prior: NgramLM) -> None:
        super().__init__()
        self._prior = prior  # contexts, EOS ids and tokenizer are the prior's
        table = torch.tensor(prior.log_probs.reshape(-1, prior.vocab_size), device="cpu")
        self.logits = nn.Parameter(table)
        self._place = prior.vocab_size ** np.arange(prior.order - 2, -1, -1, dtype=np.int64)

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel.vocab_size`."""
        return self._prior.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel.eos_token_ids`."""
        return self._prior.eos_token_ids

    @property
    def full_support(self) -> bool:
        """See `LanguageModel.full_support`."""
        return self._prior.full_support

    @property
    def tokenizer(self) -> object | None:
        """See `LanguageModel.tokenizer`."""
        return self._prior.tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel.encode`."""
        return self._prior.encode(texts)

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel.decode`."""
        return self._prior.decode(ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return completion_texts(self._prior, prompts, ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> IntArray:
        """See `LanguageModel.prefill`."""
        return self._prior.prefill(prompts)

    def next_log_probs(self, state: IntArray) -> Array:
        """See `LanguageModel.next_log_probs`; without a gradient."""
        with torch.no_grad():
            return self._rows(state)

    def append(self, state: IntArray, tokens: IntArray) -> IntArray:
        """See `LanguageModel.append`."""
        return self._prior.append(state, tokens)

    def select(self, state: IntArray, rows: IntArray) -> IntArray:
        """See `LanguageModel.select`."""
        return self._prior.select(state, rows)

    def position_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """Return log p(. | c, x_<t), shape (P, N, T, V), 0 past each completion's length; differentiable."""
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        order = self._prior.order
        before = np.repeat(self.prefill(prompts)[:, None], num_draws, axis=1)
        read = np.concatenate([before, np.where(sequences.mask, sequences.tokens, 0)], axis=2)
        contexts = np.stack([read[..., t : t + order - 1] for t in range(num_tokens)], axis=2)
        rows = self._rows(contexts.reshape(num_prompts * num_draws * num_tokens, order - 1))
        inside = torch.as_tensor(sequences.mask, device=rows.device)[..., None]
        return torch.where(inside, rows.reshape(num_prompts, num_draws, num_tokens, -1), 0.0)

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """See `LanguageModel.token_log_probs`."""
        tokens = torch.as_tensor(np.where(sequences.mask, sequences.tokens, 0), device=self.logits.device)
        return self.position_log_probs(prompts, sequences).gather(3, tokens[..., None])[..., 0]

    def to_ngram(self) -> NgramLM:
        """Return the trained table as an `NgramLM`."""
        order, vocab_size = self._prior.order, self.vocab_size
        log_probs = self.logits.detach().log_softmax(-1).cpu().numpy().reshape((vocab_size,) * order)
        return NgramLM(log_probs, eos_token_id=self.eos_token_ids, tokenizer=self.tokenizer)

    def _rows(self, contexts: IntArray) -> Tensor:
        """Return log p(. | h) for contexts (R, order - 1), shape (R, V)."""
        index = torch.as_tensor(contexts @ self._place, device=self.logits.device)
        return self.logits.log_softmax(-1)[index]
