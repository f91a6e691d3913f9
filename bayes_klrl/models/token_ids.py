"""Helpers of every model with a Hugging Face tokenizer: text to ids and back, EOS ids, checks of ids and lengths."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.typing import IntArray, TokenIds

__all__ = [
    "check_ids",
    "check_length",
    "check_prompts",
    "check_tokenizer_fits",
    "decoded",
    "decoded_after",
    "drops_first_space",
    "encoded",
    "first_token",
    "known_ids",
    "require_tokenizer",
    "resolved_eos",
]


def require_tokenizer(lm: Any, purpose: str) -> Any:
    """Return the model's tokenizer; raise an error that names `purpose` ("encode", "decode") if it has none."""
    if lm.tokenizer is None:
        name = type(lm).__name__
        raise BayesKLRLError(
            f"This {name} has no tokenizer to {purpose} text with. Give it one, {name}(model, tokenizer), or use "
            "token ids: prompts as lists of ids, and a TokenReward."
        )
    return lm.tokenizer


def encoded(tokenizer: Any, texts: Sequence[str], *, keep_eos: bool) -> list[list[int]]:
    """Return the ids of each text, with one BOS where the tokenizer adds one.

    A text that begins with BOS already, as rendered chat templates do, gets no second one. A final EOS that the tokenizer
    adds is removed unless `keep_eos`.
    """
    prompts = [_without_added_bos(tokenizer, text, list(tokenizer.encode(text))) for text in texts]
    if keep_eos:
        return prompts
    return [
        prompt[:-1] if ends_with_added_eos(tokenizer, text, prompt) else prompt
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def decoded(tokenizer: Any, ids: Sequence[TokenIds]) -> list[str]:
    """Return the text of each completion; special tokens, and ids that the tokenizer does not have, are skipped."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(completion, **options) for completion in known_ids(tokenizer, ids)]


def decoded_after(
    tokenizer: Any,
    decode: Callable[[list[TokenIds]], Sequence[str]],
    prompts: Sequence[TokenIds],
    ids: Sequence[TokenIds],
) -> list[str]:
    """Return the text of each completion as it stands after its prompt, so that both together are what the model wrote.

    Tokenizers of SentencePiece's kind drop the space of the first token that they decode: "_world" and "world" would have one
    text. Here the completion is decoded after the prompt's last token, whose own text is then cut off. After an empty prompt
    and after a special token, which has no text, a completion is decoded alone, as it is with all other tokenizers.

    Parameters
    ----------
    tokenizer
        The tokenizer, a part of which `decode` is.
    decode
        The model's own `decode`.
    prompts, ids
        The prompt of each completion, and the completions.
    """
    given = [list(completion) for completion in ids]
    alone = list(decode(given))  # type: ignore[arg-type]  # lists are sequences
    if not drops_first_space(tokenizer):
        return alone
    special = set(getattr(tokenizer, "all_special_ids", ()))
    last = {
        row: int(prompt[-1]) for row, prompt in enumerate(prompts) if len(prompt) and int(prompt[-1]) not in special
    }
    ends = sorted(set(last.values()))
    before = dict(zip(ends, decode([[end] for end in ends]), strict=True))
    together = decode([[end, *given[row]] for row, end in last.items()])
    for (row, end), whole in zip(last.items(), together, strict=True):
        rest = whole.removeprefix(before[end])
        space = rest.removesuffix(alone[row])
        if whole == before[end] + space + alone[row] and space.isspace():
            alone[row] = rest
    return alone


class _PerTokenizer:
    """A value for each tokenizer object, which is forgotten with it: tokenizers are told apart by identity."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[Any, Any]] = {}

    def get(self, tokenizer: Any, make: Callable[[Any], Any]) -> Any:
        """Return the tokenizer's value, which is made when it is first asked for."""
        found = self._values.get(id(tokenizer))
        if found is not None and found[0]() is tokenizer:
            return found[1]
        value, key = make(tokenizer), id(tokenizer)
        with suppress(TypeError):  # of an object that cannot be referred to weakly: it is asked anew each time
            self._values[key] = weakref.ref(tokenizer, lambda _: self._values.pop(key, None)), value
        return value


_drops_first_space, _own_ids, _told_of_bos = _PerTokenizer(), _PerTokenizer(), _PerTokenizer()
_SPACE = "\u2581"  # SentencePiece's sign for a space
_NUM_PROBES = 4


def drops_first_space(tokenizer: Any) -> bool:
    """Return whether decoding loses the space before the first token; found out once for each tokenizer."""
    return bool(_drops_first_space.get(tokenizer, _loses_a_space))


def _loses_a_space(tokenizer: Any) -> bool:
    """Return whether a token with a space before it loses the space where it is first, and keeps it after another one."""
    words, special = _vocabulary(tokenizer), set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = sorted(i for word, i in words.items() if i not in special and word[:1] != _SPACE and word.isalnum())
    spaced = sorted((len(w) == 1, i, w[1:]) for w, i in words.items() if w[:1] == _SPACE and i not in special)
    for _, i, word in spaced[:_NUM_PROBES] + spaced[-1:]:
        for other in (ordinary[:1] or [i]) + [i]:
            first, alone, whole = (tokenizer.decode(each) for each in ([other], [i], [other, i]))
            if alone == word and whole == f"{first} {alone}":
                return True
    return False


def known_ids(tokenizer: Any, ids: Sequence[TokenIds]) -> list[list[int]]:
    """Return each completion without the ids that the tokenizer does not have: a model may be wider than its tokenizer."""
    rows = [[int(token) for token in completion] for completion in ids]
    length = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if length is None or all(token < length for row in rows for token in row):
        return rows
    own = _own_ids.get(tokenizer, lambda it: frozenset(_vocabulary(it).values()))
    return [[token for token in row if token < length or token in own] for row in rows]


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Return the tokenizer's tokens with their ids; nothing if it does not tell."""
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return dict(words) if isinstance(words, Mapping) else {}


def _without_added_bos(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Return a text's ids without the BOS that the tokenizer added before a BOS of the text's own."""
    for mark in ("bos", "cls"):
        token, word = getattr(tokenizer, f"{mark}_token_id", None), getattr(tokenizer, f"{mark}_token", None)
        if token is None or ids[:2] != [token, token] or not text.lstrip().startswith(str(word)):
            continue
        if leading(token, ids) > leading(token, tokenizer.encode(text, add_special_tokens=False)):
            _told_of_bos.get(tokenizer, _tell_of_bos)
            return ids[1:]
    return ids


def _tell_of_bos(tokenizer: Any) -> bool:
    """Warn that no second BOS was added."""
    word = getattr(tokenizer, "bos_token", None) or getattr(tokenizer, "cls_token", None)
    warnings.warn(
        f"A text begins with {word!r}, the token that the tokenizer would put before it, as rendered chat templates do. "
        "bayes_klrl does not add a second one. Leave it out of the text, and nothing changes but this warning.",
        UserWarning,
        stacklevel=2,
    )
    return True


def ends_with_added_eos(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Return whether the tokenizer added the EOS at the end of a text's ids.

    False for an EOS that the text itself ends with, and for an unknown word whose id is that of EOS.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None or ids[-1:] != [eos]:
        return False
    if set(ids) == {getattr(tokenizer, "bos_token_id", None)}:
        return False  # BOS and EOS share one id and there is no other: this is the BOS
    return trailing(eos, ids) > trailing(eos, tokenizer.encode(text, add_special_tokens=False))


def leading(token: int, ids: Sequence[int]) -> int:
    """Return the number of ids at the beginning that equal `token`."""
    return next((count for count, i in enumerate(ids) if i != token), len(ids))


def trailing(token: int, ids: Sequence[int]) -> int:
    """Return the number of ids at the end that equal `token`."""
    return next((count for count, i in enumerate(reversed(ids)) if i != token), len(ids))


def resolved_eos(
    given: int | Collection[int] | None, configured: Any, tokenizer: Any | None, vocab_size: int
) -> frozenset[int]:
    """Return the EOS ids: the given ones, else the configuration's, else the tokenizer's.

    A configured id outside the vocabulary can never be drawn and is left out; a given one is refused.
    """
    if given is not None:
        ids = eos_set(given)
        if outside := sorted(token for token in ids if not 0 <= token < vocab_size):
            raise BayesKLRLError(f"eos_token_id {outside} is outside the vocabulary 0..{vocab_size - 1}.")
        return ids
    if configured is None:
        configured = getattr(tokenizer, "eos_token_id", None)
    found = frozenset() if configured is None else eos_set(configured)
    return frozenset(token for token in found if 0 <= token < vocab_size)


def eos_set(given: int | Collection[int]) -> frozenset[int]:
    """Return one id or several as a set; refuse anything that is not a token id."""
    ids: Any = [given] if isinstance(given, Integral) else given
    if (
        isinstance(ids, str)
        or not hasattr(ids, "__iter__")
        or not all(isinstance(token, Integral) and not isinstance(token, bool) for token in ids)
    ):
        raise BayesKLRLError(f"eos_token_id is a token id or a collection of them; got {given!r}.")
    return frozenset(int(token) for token in ids)


def first_token(candidates: Sequence[Any], vocab_size: int) -> int | None:
    """Return the first candidate that is a token of the vocabulary; None if there is none."""
    return next((token for token in candidates if isinstance(token, int) and 0 <= token < vocab_size), None)


def check_tokenizer_fits(tokenizer: Any | None, vocab_size: int) -> None:
    """Refuse a tokenizer that has more ids than the model."""
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"The tokenizer has {len(tokenizer)} ids but the model's vocabulary has {vocab_size}: they do "
            "not belong together. Load both from one folder, or call model.resize_token_embeddings and train it."
        )


def check_prompts(prompts: Sequence[TokenIds], vocab_size: int, bos_token_id: int | None) -> None:
    """Refuse an empty list of prompts, a prompt without tokens, and ids outside the vocabulary."""
    if len(prompts) == 0:
        raise BayesKLRLError("At least one prompt is needed; got none.")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
            raise BayesKLRLError(f"Prompt {index} must be a list of token ids; got {prompt!r}. Encode texts first.")
        if len(prompt) == 0:
            raise BayesKLRLError(
                f"Prompt {index} has no tokens, and a transformer needs at least one token to predict the next. Start the "
                f"prompt with a token, for example the BOS id ({bos_token_id} here)."
            )
        check_ids(np.asarray(prompt), vocab_size)


def check_ids(ids: IntArray, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary, and numbers that are not integers."""
    if ids.size and ids.dtype.kind not in "iu":
        raise BayesKLRLError(f"Token ids must be integers; got {ids.ravel()[0]!r} among them.")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise BayesKLRLError(
            f"Token ids must be in 0..{vocab_size - 1}, the model's vocabulary; got ids from {ids.min()} to "
            f"{ids.max()}. Were they made by another model's tokenizer?"
        )


def check_length(num_tokens: int, limit: int | None) -> None:
    """Refuse more tokens than the model can read."""
    if limit is not None and num_tokens > limit:
        raise BayesKLRLError(
            f"Prompt and completion together have {num_tokens} tokens; this model reads at most {limit}. Shorten "
            "the prompt or max_new_tokens."
        )
