"""Completions as arrays: tokens (P, N, T) and lengths (P, N).

The EOS token, if a completion has one, is its last token. Only `lengths` says which positions count; tokens are never
compared with a padding id, because pad == eos (the GPT-2 default) would delete the EOS term, and with it the
normalisation of the prior (total mass 4.5 instead of 1 on problem P1, theory.md 1.2).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

__all__ = ["Sequences", "check_outcomes", "completion_lengths", "completion_log_probs", "pad_token"]

_TOKENS_PER_CHUNK = 2**14


def pad_token(eos_token_ids: Collection[int]) -> int:
    """Return the id that fills positions past a completion's length: the lowest EOS id, or 0 if there is none."""
    return min(eos_token_ids, default=0)


def completion_lengths(tokens: IntArray, eos_token_ids: Collection[int]) -> IntArray:
    """Return each row's number of tokens up to and including its first EOS; the full width if it has none.

    Parameters
    ----------
    tokens
        Token ids, shape (..., T).
    eos_token_ids
        The ids that end a completion.

    Returns
    -------
    The lengths, shape (...,), values in 1..T.

    Examples
    --------
    >>> completion_lengths(np.array([[1, 2, 3], [1, 0, 2], [0, 0, 0]]), {0})
    array([3, 2, 1])
    """
    is_eos = np.isin(tokens, list(eos_token_ids))
    lengths: IntArray = np.where(is_eos.any(axis=-1), is_eos.argmax(axis=-1) + 1, tokens.shape[-1])
    return lengths


@dataclass(frozen=True, eq=False)
class Sequences:
    """N completions for each of P prompts.

    Parameters
    ----------
    tokens
        Integer token ids, shape (P, N, T). Positions past a completion's length are ignored.
    lengths
        Number of tokens of each completion, EOS included, shape (P, N), values in 1..T.

    Raises
    ------
    BayesKLRLError
        If the shapes do not fit or a length is outside 1..T.

    Examples
    --------
    Two completions of one prompt, of 3 and 2 tokens:

    >>> x = Sequences(tokens=np.array([[[5, 7, 1], [6, 1, 1]]]), lengths=np.array([[3, 2]]))
    >>> x.lists()
    [[5, 7, 1], [6, 1]]
    >>> x.finished({1})
    array([[ True,  True]])
    """

    tokens: IntArray
    lengths: IntArray

    def __post_init__(self) -> None:
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        if tokens.ndim != 3 or lengths.shape != tokens.shape[:2]:
            raise BayesKLRLError(
                f"Sequences needs tokens (P, N, T) and lengths (P, N); got {tokens.shape} and {lengths.shape}."
            )
        if tokens.dtype.kind not in "iu" or lengths.dtype.kind not in "iu":
            raise BayesKLRLError(f"Token ids and lengths are integers; got dtypes {tokens.dtype} and {lengths.dtype}.")
        if lengths.size and not (1 <= lengths.min() and lengths.max() <= tokens.shape[2]):
            raise BayesKLRLError(
                f"A completion has 1 to T = {tokens.shape[2]} tokens (EOS counts); got lengths from {lengths.min()} "
                f"to {lengths.max()}."
            )
        object.__setattr__(self, "tokens", tokens.astype(np.int64, copy=False))
        object.__setattr__(self, "lengths", lengths.astype(np.int64, copy=False))

    @classmethod
    def from_lists(cls, completions: Sequence[Sequence[int]], *, max_new_tokens: int, pad_token: int = 0) -> Sequences:
        """Return the completions of one prompt, shape (1, N, max_new_tokens), from lists of token ids.

        Examples
        --------
        >>> Sequences.from_lists([[5, 1], [7]], max_new_tokens=3, pad_token=1).tokens
        array([[[5, 1, 1],
                [7, 1, 1]]])

        Raises
        ------
        BayesKLRLError
            If they are no list of lists of token ids, or one of them has no token or more than `max_new_tokens`.
        """
        if not isinstance(completions, Iterable):
            raise BayesKLRLError(
                f"Completions are a list of lists of token ids, such as [[5, 1], [7]], or bk.Sequences; got {completions!r}."
            )
        rows = [ids.tolist() if hasattr(ids, "tolist") else ids for ids in completions]
        for row, ids in enumerate(rows):
            if not isinstance(ids, list | tuple) or not all(isinstance(i, int | np.integer) for i in ids):
                raise BayesKLRLError(f"Completion {row} must be a list of token ids; got {ids!r}.")
        lengths = np.array([[len(ids) for ids in rows]], dtype=np.int64).reshape(1, len(rows))
        if lengths.size and (lengths.min() < 1 or lengths.max() > max_new_tokens):
            worst = int(np.argmax((lengths[0] < 1) | (lengths[0] > max_new_tokens)))
            raise BayesKLRLError(
                f"Completion {worst} has {lengths[0, worst]} tokens; a completion has 1 to max_new_tokens = "
                f"{max_new_tokens} tokens, EOS included."
            )
        tokens = np.full((1, len(rows), max_new_tokens), pad_token, dtype=np.int64)
        for row, ids in enumerate(rows):
            tokens[0, row, : len(ids)] = ids
        return cls(tokens, lengths)

    @property
    def mask(self) -> np.ndarray:
        """True at the positions that belong to a completion, shape (P, N, T)."""
        positions: np.ndarray = np.arange(self.tokens.shape[2])
        return positions < self.lengths[..., None]

    def lists(self) -> list[list[int]]:
        """Return the P * N completions, prompt by prompt, as lists of token ids up to and including EOS."""
        rows = self.tokens.reshape(-1, self.tokens.shape[2]).tolist()
        return [row[:length] for row, length in zip(rows, self.lengths.ravel().tolist(), strict=True)]

    def finished(self, eos_token_ids: Collection[int]) -> np.ndarray:
        """Return which completions end with EOS, shape (P, N); the others were cut at T tokens."""
        last = np.take_along_axis(self.tokens, self.lengths[..., None] - 1, axis=2)[..., 0]
        return np.isin(last, list(eos_token_ids))

    def padded(self, num_tokens: int, pad_token: int) -> Sequences:
        """Return the same completions with T = `num_tokens` and `pad_token` past each length."""
        num_prompts, num_draws, width = self.tokens.shape
        if self.lengths.size and self.lengths.max() > num_tokens:
            raise BayesKLRLError(
                f"A completion of {self.lengths.max()} tokens does not fit into max_new_tokens = {num_tokens}."
            )
        tokens = np.full((num_prompts, num_draws, num_tokens), pad_token, dtype=np.int64)
        kept = min(width, num_tokens)
        tokens[..., :kept] = np.where(self.mask, self.tokens, pad_token)[..., :kept]
        return Sequences(tokens, self.lengths)


def check_outcomes(sequences: Sequences, prior: LanguageModel) -> None:
    """Refuse ids outside the vocabulary, EOS before the end, and prefixes: they are not outcomes of p0."""
    tokens, mask = sequences.tokens, sequences.mask
    if (mask & ((tokens < 0) | (tokens >= prior.vocab_size))).any():
        bad = tokens[mask & ((tokens < 0) | (tokens >= prior.vocab_size))][0]
        raise BayesKLRLError(f"Token id {bad} is outside the vocabulary 0..{prior.vocab_size - 1}.")
    is_last = np.arange(tokens.shape[2]) == sequences.lengths[..., None] - 1
    early = (mask & ~is_last & np.isin(tokens, list(prior.eos_token_ids))).any(axis=2)
    if early.any():
        p, n = np.argwhere(early)[0]
        raise BayesKLRLError(
            f"Completion {n} of prompt {p} goes on after EOS: {tokens[p, n].tolist()}. Its length ends at the first EOS."
        )
    prefix = (sequences.lengths < tokens.shape[2]) & ~sequences.finished(prior.eos_token_ids)
    if prefix.any():
        p, n = np.argwhere(prefix)[0]
        ids = tokens[p, n, : sequences.lengths[p, n]].tolist()
        raise BayesKLRLError(
            f"Completion {n} of prompt {p} is a prefix, not an outcome: {ids} neither ends with EOS nor has "
            f"max_new_tokens = {tokens.shape[2]} tokens."
        )


def completion_log_probs(lm: LanguageModel, prompt_ids: Sequence[Sequence[int]], sequences: Sequences) -> FloatArray:
    """Return log p(x | c) of every completion, shape (P, N), float64, in chunks of draws so that memory is bounded."""
    num_prompts, num_draws, num_tokens = sequences.tokens.shape
    total = np.empty((num_prompts, num_draws))
    step = max(1, _TOKENS_PER_CHUNK // (num_tokens * num_prompts))
    with no_gradient():
        for start in range(0, num_draws, step):
            part = slice(start, start + step)
            chunk = Sequences(sequences.tokens[:, part], sequences.lengths[:, part])
            total[:, part] = to_host(lm.token_log_probs(prompt_ids, chunk)).sum(axis=2, dtype=np.float64)
    return total
