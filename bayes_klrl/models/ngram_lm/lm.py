"""An n-gram language model in NumPy, `NgramLM`: small enough for exact answers.

As a dense table it is the prior of the problems with known truth. Fitted to texts it is a cheap prior or proposal for any
vocabulary. Its decoding state is the last order - 1 tokens of every row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.ngram_lm.tables import BackoffTable, DenseTable, NgramTable, fit_witten_bell
from bayes_klrl.models.token_ids import decoded_after, known_ids
from bayes_klrl.sequences import Sequences, pad_token
from bayes_klrl.typing import FloatArray, IntArray, TokenIds
from bayes_klrl.whole_files import whole_folder

__all__ = ["CharacterTokenizer", "NgramLM", "as_ids", "as_int_array", "check_vocabulary", "plain_ids", "texts_of"]

_FORMAT = "bayes_klrl.NgramLM/1"
_TABLE_FILE = "ngram.npz"
_MAX_DENSE_ENTRIES = 10_000_000  # 80 MB of float64


@dataclass(frozen=True)
class CharacterTokenizer:
    """A tokenizer with one token per character, in the given order; EOS is the last id and has no text.

    Examples
    --------
    >>> tokenizer = CharacterTokenizer("abc")
    >>> tokenizer.encode("cab"), tokenizer.eos_token_id, tokenizer.decode([2, 0, 3])
    ([2, 0, 1], 3, 'ca')
    """

    characters: str

    @classmethod
    def of(cls, texts: Sequence[str]) -> CharacterTokenizer:
        """Return the tokenizer of every character in some texts, sorted."""
        return cls("".join(sorted(set().union(*texts))))

    @property
    def eos_token_id(self) -> int:
        """The id after the last character."""
        return len(self.characters)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids that have no text."""
        return [self.eos_token_id]

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """Return the id of every character."""
        unknown = [c for c in text if c not in self._ids]
        if unknown:
            raise BayesKLRLError(
                f"The character {unknown[0]!r} is not in the vocabulary {self.characters!r}. Leave it out, "
                "or fit on texts that contain it."
            )
        return [self._ids[c] for c in text]

    def decode(self, ids: TokenIds) -> str:
        """Return the characters, EOS skipped."""
        return "".join(self.characters[i] for i in ids if i != self.eos_token_id)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters)}


class NgramLM:
    """An n-gram language model: p(x_t | c, x_<t) = p(x_t | the n - 1 tokens before it).

    The context before the start is padded with EOS tokens, so an empty prompt is legal. With several EOS ids the padding is
    the lowest one, without EOS it is token 0.

    Parameters
    ----------
    log_probs
        log p(token | context), shape (V,) * order, last axis the next token, the axes before it the context,
        oldest token first. Rows must sum to 1 within 1e-6 and are normalised to float64; -inf is legal. Or a
        `BackoffTable`.
    eos_token_id
        The id, or ids, that end a completion; None if nothing does.
    tokenizer
        The tokenizer, which turns text into ids; None: the model works on token ids only. It needs the methods
        `encode(text)` and `decode(ids)` of Hugging Face's interface.

    Raises
    ------
    BayesKLRLError
        If the table does not hold log-probs, or an EOS id is outside the vocabulary.

    Examples
    --------
    A bigram model fitted to texts, with one token per character:

    >>> import bayes_klrl as bk
    >>> lm = bk.NgramLM.fit(["abab", "abba", "ab"], order=2)
    >>> lm.encode(["ab"]), lm.vocab_size
    ([[0, 1]], 3)
    >>> lm.next_log_probs(lm.prefill(lm.encode(["a"]))).argmax(axis=1)  # "b" is the most probable token after "a"
    array([1])

    A model given as a table: a coin where heads is token 0 and tails, EOS, ends the text.

    >>> coin = bk.NgramLM(np.log([0.75, 0.25]), eos_token_id=1)
    >>> two_heads = bk.Sequences.from_lists([[0, 0, 1]], max_new_tokens=3)
    >>> bool(np.isclose(np.exp(coin.token_log_probs([[]], two_heads).sum()), 0.75**2 * 0.25))
    True
    """

    accepts_empty_prompt = True

    def __init__(
        self,
        log_probs: ArrayLike | BackoffTable,
        *,
        eos_token_id: int | Collection[int] | None,
        tokenizer: Any | None = None,
    ) -> None:
        self._table: NgramTable
        if isinstance(log_probs, BackoffTable):
            self._table = log_probs
        else:
            self._table = DenseTable(np.asarray(log_probs, dtype=np.float64))
        self._eos_token_ids = as_ids(eos_token_id)
        self._tokenizer = tokenizer
        outside = sorted(i for i in self._eos_token_ids if not 0 <= i < self.vocab_size)
        if outside:
            raise BayesKLRLError(
                f"The EOS id {outside[0]} is outside the vocabulary 0..{self.vocab_size - 1}; give an "
                "id of the table, or None if no token ends a completion."
            )

    @classmethod
    def fit(
        cls,
        texts_or_ids: str | Sequence[str] | Sequence[TokenIds],
        *,
        order: int,
        tokenizer: Any | None = None,
        eos_token_id: int | Collection[int] | None = None,
        vocab_size: int | None = None,
    ) -> NgramLM:
        """Return the Witten-Bell n-gram model of some texts; every token has positive probability in every context.

        Parameters
        ----------
        texts_or_ids
            Texts, to each of which EOS is added; or lists of token ids, which are used as they are: a finished text must
            have EOS as its last id, a cut one not (`Sequences.lists()` returns such lists).
        order
            n, at least 1.
        tokenizer
            The tokenizer. None: one token per character for texts, no tokenizer for ids. BOS, EOS, CLS and SEP that it adds
            at the ends of a text are removed.
        eos_token_id
            The id or ids that end a text. None: the tokenizer's EOS id; without a tokenizer none.
        vocab_size
            V. None: the tokenizer's length; without a tokenizer the largest id plus 1.

        See Also
        --------
        bayes_klrl.models.ngram_lm.tables.fit_witten_bell : The formula.

        Examples
        --------
        >>> lm = NgramLM.fit(["abab", "ab"], order=2)
        >>> lm.decode(lm.encode(["ab"])), lm.vocab_size
        (['ab'], 3)
        """
        if order < 1:
            raise BayesKLRLError(f"An n-gram model has order 1 (no context) or more; got {order}.")
        texts: list[Any] = [texts_or_ids] if isinstance(texts_or_ids, str) else list(texts_or_ids)
        are_texts = bool(texts) and all(isinstance(text, str) for text in texts)
        if are_texts and tokenizer is None:
            tokenizer = CharacterTokenizer.of(texts)
        if tokenizer is not None:
            eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
            vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        eos_ids = as_ids(eos_token_id)
        if are_texts and not eos_ids:
            raise BayesKLRLError("The tokenizer has no EOS to end the texts with; give eos_token_id.")
        if are_texts:
            texts = [[*plain_ids(tokenizer, text), min(eos_ids)] for text in texts]
        ids = [as_int_array(text) for text in texts]
        if not sum(map(len, ids)):
            raise BayesKLRLError(
                "There is nothing to fit to: the texts have no tokens. Give at least one text, or list of ids, with a token."
            )
        used = np.concatenate([*ids, np.array(sorted(eos_ids), dtype=np.int64)])
        vocab_size = int(used.max()) + 1 if vocab_size is None else vocab_size
        check_vocabulary(used, vocab_size)
        table = fit_witten_bell(ids, order=order, vocab_size=vocab_size, pad_token=pad_token(eos_ids))
        return cls(table, eos_token_id=eos_ids, tokenizer=tokenizer)

    @property
    def order(self) -> int:
        """n: the next token depends on the n - 1 tokens before it."""
        return self._table.order

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel.vocab_size`."""
        return self._table.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel.eos_token_ids`."""
        return self._eos_token_ids

    @property
    def full_support(self) -> bool:
        """See `LanguageModel.full_support`."""
        return self._table.full_support

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel.tokenizer`."""
        return self._tokenizer

    @property
    def table(self) -> NgramTable:
        """The stored log-probs: a dense table, or a sparse one with back-off."""
        return self._table

    @property
    def log_probs(self) -> FloatArray:
        """The table log p(token | context), shape (V,) * order; refused above ten million entries."""
        if isinstance(self._table, DenseTable):
            return self._table.log_probs
        shape = (self.vocab_size,) * self.order
        if self.vocab_size**self.order > _MAX_DENSE_ENTRIES:
            raise BayesKLRLError(
                f"The dense table of shape {shape} has more than {_MAX_DENSE_ENTRIES} entries. Use "
                "next_log_probs on the contexts that you need, or fit a lower order."
            )
        place_values = self.vocab_size ** np.arange(self.order - 2, -1, -1, dtype=np.int64)
        contexts = np.arange(self.vocab_size ** (self.order - 1))[:, None] // place_values % self.vocab_size
        return self._table.rows(contexts).reshape(shape)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel.encode`. BOS is left out, since EOS pads. Without a tokenizer only "" is legal: it has no ids."""
        if self._tokenizer is None and any(texts):
            raise BayesKLRLError("This NgramLM has no tokenizer: give prompts as lists of token ids.")
        return [plain_ids(self._tokenizer, text) if text else [] for text in texts]

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel.decode`."""
        if self._tokenizer is None:
            raise BayesKLRLError("This NgramLM has no tokenizer, so its tokens have no text: use token ids.")
        return texts_of(self._tokenizer, ids, self._eos_token_ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return decoded_after(self._tokenizer, self.decode, prompts, ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> IntArray:
        """Return the last order - 1 tokens of each prompt, (R, order - 1): see `LanguageModel.prefill`."""
        width = self.order - 1
        contexts = np.full((len(prompts), width), pad_token(self._eos_token_ids), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids = as_int_array(prompt)
            check_vocabulary(ids, self.vocab_size)
            kept = min(len(ids), width)
            contexts[row, width - kept :] = ids[len(ids) - kept :]
        return contexts

    def next_log_probs(self, state: IntArray) -> FloatArray:
        """See `LanguageModel.next_log_probs`."""
        return self._table.rows(state)

    def append(self, state: IntArray, tokens: IntArray) -> IntArray:
        """See `LanguageModel.append`."""
        tokens = as_int_array(tokens)
        check_vocabulary(tokens, self.vocab_size)
        return np.concatenate([state, tokens[:, None]], axis=1)[:, 1:]

    def select(self, state: IntArray, rows: IntArray) -> IntArray:
        """See `LanguageModel.select`."""
        return state[rows]

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """See `LanguageModel.token_log_probs`."""
        num_prompts, num_draws, _ = sequences.tokens.shape
        if len(prompts) != num_prompts:
            raise BayesKLRLError(f"There are {len(prompts)} prompts and completions for {num_prompts}; give one each.")
        before = np.broadcast_to(self.prefill(prompts)[:, None], (num_prompts, num_draws, self.order - 1))
        grams = sliding_window_view(np.concatenate([before, sequences.tokens], axis=2), self.order, axis=2)
        scored = grams[sequences.mask]  # positions past a completion's length may hold no token id
        check_vocabulary(scored[:, -1], self.vocab_size)
        log_probs = np.zeros(sequences.tokens.shape)
        log_probs[sequences.mask] = self._table.at(scored[:, :-1], scored[:, -1])
        return log_probs

    def position_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """Return log p(. | c, x_<t) at every position, shape (P, N, T, V), 0 past each completion's length."""
        num_prompts, num_draws, _ = sequences.tokens.shape
        before = np.broadcast_to(self.prefill(prompts)[:, None], (num_prompts, num_draws, self.order - 1))
        read = np.concatenate([before, sequences.tokens], axis=2)
        contexts = sliding_window_view(read, self.order, axis=2)[..., :-1]
        log_probs = np.zeros((*sequences.tokens.shape, self.vocab_size))
        log_probs[sequences.mask] = self._table.rows(contexts[sequences.mask])
        return log_probs

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, ngram.npz and, unless its tokens are characters, the tokenizer in tokenizer/.

        Raises
        ------
        OutputError
            If they cannot be written.
        """
        config: dict[str, Any] = {
            "format": _FORMAT,
            "order": self.order,
            "eos_token_id": sorted(self._eos_token_ids),
        }
        if isinstance(self._tokenizer, CharacterTokenizer):
            config["characters"] = self._tokenizer.characters
        elif self._tokenizer is not None:
            if not hasattr(self._tokenizer, "save_pretrained"):
                raise CheckpointError(
                    f"A {type(self._tokenizer).__name__} has no save_pretrained, so it cannot be saved."
                )
            config["tokenizer"] = "tokenizer"
        with whole_folder(folder) as unfinished:
            if self._tokenizer is not None and "tokenizer" in config:
                self._tokenizer.save_pretrained(unfinished / "tokenizer")
            np.savez_compressed(unfinished / _TABLE_FILE, **self._table.arrays())  # type: ignore[arg-type]
            (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def is_saved_in(folder: str | Path) -> bool:
        """Return whether `save_pretrained` wrote this folder."""
        return (Path(folder) / _TABLE_FILE).is_file()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> NgramLM:
        """Return the model that `save_pretrained` wrote; raise `CheckpointError` if there is none."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config["format"] != _FORMAT:
                raise CheckpointError(f"{folder} is of format {config['format']!r}, not {_FORMAT!r}.")
            with (folder / _TABLE_FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                dense = arrays.get("log_probs")
                table = BackoffTable.from_arrays(arrays, config["order"]) if dense is None else dense
            return cls(table, eos_token_id=config["eos_token_id"], tokenizer=_load_tokenizer(folder, config))
        except CheckpointError:
            raise
        except Exception as error:  # whatever NumPy, zipfile and zlib raise for broken files
            raise CheckpointError(f"{folder} does not hold a readable NgramLM: {error}") from error


def as_ids(eos_token_id: int | Collection[int] | None) -> frozenset[int]:
    """Return one id, several ids or None as a set."""
    if eos_token_id is None:
        return frozenset()
    if isinstance(eos_token_id, Collection):
        return frozenset(int(i) for i in eos_token_id)
    return frozenset({int(eos_token_id)})


def as_int_array(ids: TokenIds | IntArray) -> IntArray:
    """Return token ids as int64; refuse floats, which are not rounded."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise BayesKLRLError(f"Token ids are one list of integers; got shape {array.shape} of dtype {array.dtype}.")
    return array.astype(np.int64)


def check_vocabulary(ids: IntArray, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary; a negative one would silently index from the end."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise BayesKLRLError(
            f"Token id {outside[0]} is outside the vocabulary 0..{vocab_size - 1}. Was it made by another tokenizer?"
        )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return a text's ids without the special tokens that a tokenizer adds at its ends; EOS padding replaces them."""
    marks = {getattr(tokenizer, f"{mark}_token_id", None) for mark in ("bos", "eos", "cls", "sep")}
    ids = [int(i) for i in tokenizer.encode(text)]
    inner = [position for position, i in enumerate(ids) if i not in marks]
    return ids[inner[0] : inner[-1] + 1] if inner else []


def texts_of(tokenizer: Any, ids: Sequence[TokenIds], eos_token_ids: Collection[int]) -> list[str]:
    """Return the text of each list of ids; EOS, special tokens and ids that the tokenizer does not have are skipped."""
    special = {*eos_token_ids, *getattr(tokenizer, "all_special_ids", ())}
    return [tokenizer.decode([i for i in row if i not in special]) for row in known_ids(tokenizer, ids)]


def _load_tokenizer(folder: Path, config: dict[str, Any]) -> Any | None:
    """Return the tokenizer that was saved with a model, if there was one."""
    if "characters" in config:
        return CharacterTokenizer(config["characters"])
    if "tokenizer" not in config:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False, local_files_only=True)
