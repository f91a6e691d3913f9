"""Helpers of every model with a Hugging Face tokenizer: text to ids and back, EOS ids, checks of ids and lengths."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    "encoded",
    "first_token",
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
    """Return the ids of each text; a final EOS that the tokenizer adds is removed unless `keep_eos`."""
    prompts = [list(tokenizer.encode(text)) for text in texts]
    if keep_eos:
        return prompts
    return [
        prompt[:-1] if ends_with_added_eos(tokenizer, text, prompt) else prompt
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def decoded(tokenizer: Any, ids: Sequence[TokenIds]) -> list[str]:
    """Return the text of each completion, special tokens skipped."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode([int(token) for token in completion], **options) for completion in ids]


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
