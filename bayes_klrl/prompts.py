"""Prompts in every form in which users have them, as a tuple of texts or of token-id tuples.

A prompt is a text or a list of token ids; ids may also be in an array of any library, and in the output of a tokenizer. What
only looks like a list of prompts, because one can iterate over it, is refused by name: a dictionary would give its keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError

__all__ = ["as_prompts", "prompt_list"]

_TOKENIZER_OUTPUT = "BatchEncoding"
_TABLES = {"DataFrame", "LazyFrame", "Table"}
_TEMPLATE = "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"


def prompt_list(prompts: Any) -> tuple[Any, ...]:
    """Return the prompts as a tuple of texts or of token-id tuples.

    Parameters
    ----------
    prompts
        One prompt or several: texts, lists or arrays of token ids, or the output of a Hugging Face tokenizer.

    Raises
    ------
    BayesKLRLError
        If it is something else, or there is no prompt.
    """
    given = as_prompts(prompts)
    listed = [given] if isinstance(given, str) or (given and all(map(_is_id, given))) else given
    if not listed:
        raise BayesKLRLError("prompts is empty; give at least one prompt (the empty text '' is one).")
    if all(isinstance(prompt, str) for prompt in listed):
        return tuple(listed)
    if all(isinstance(prompt, list) and all(map(_is_id, prompt)) for prompt in listed):
        return tuple(tuple(int(token) for token in prompt) for prompt in listed)
    raise BayesKLRLError(
        f"prompts must be one text or list of token ids, or a list of such, all of one kind; got {prompts!r}."
    )


def as_prompts(prompts: Any) -> Any:
    """Return the prompts as a text or as a list, in which arrays, tuples and a tokenizer's output have become lists.

    Raises
    ------
    BayesKLRLError
        If the prompts, or one of them, are something that has no prompts in order.
    """
    if isinstance(prompts, str):
        return prompts
    if _made_by_tokenizer(prompts):
        return _unpadded(prompts)
    _check_kind("prompts", prompts)
    return [_one_prompt(p, prompt) for p, prompt in enumerate(_as_list("prompts", prompts))]


def _one_prompt(p: int, prompt: Any) -> Any:
    """Return one item of a list of prompts: a text, a list of ids, or an id; anything else as it is."""
    if isinstance(prompt, str) or not hasattr(prompt, "__iter__"):
        return prompt
    if _made_by_tokenizer(prompt):
        ids = _unpadded(prompt)
        rows = [ids] if all(map(_is_id, ids)) else ids
        if len(rows) != 1:
            raise BayesKLRLError(
                f"In the list of prompts, prompt {p} is a {type(prompt).__name__} of {len(rows)} prompts. Give one for each "
                "prompt, or a single one for all."
            )
        return rows[0]
    _check_kind(f"prompt {p}", prompt)
    if not hasattr(prompt, "tolist") and not isinstance(prompt, Sequence):
        return prompt
    return _as_list(f"prompt {p}", prompt)


def _as_list(what: str, given: Any) -> Any:
    """Return a sequence or array as a list, the items of which are Python's own numbers where an array holds them."""
    axes = getattr(given, "ndim", 1 if hasattr(given, "__len__") else 0)
    if axes == 0:
        raise BayesKLRLError(f"{what} must be a text or a list; got {given!r}.")
    if axes > 2:
        raise BayesKLRLError(
            f"{what} must be an array of token ids with one axis, or two for several prompts; got one with {axes} axes."
        )
    listed = given.tolist() if hasattr(given, "tolist") else list(given)
    return [item.tolist() if getattr(item, "ndim", 1) == 0 and hasattr(item, "tolist") else item for item in listed]


def _check_kind(what: str, given: Any) -> None:
    """Refuse what one can iterate over, but what holds no prompts in order."""
    kind = type(given).__name__
    if _is_message(given) or (isinstance(given, list | tuple) and any(map(_is_message, given))):
        raise BayesKLRLError(
            f"{what} holds messages, a conversation, which is not a prompt yet. Make a text of each conversation: "
            f"{_TEMPLATE}."
        )
    if isinstance(given, Mapping) and type(given) is dict:
        cure = (
            'Give its ids alone, encoded["input_ids"].' if "input_ids" in given else "Give a list of its texts or ids."
        )
        raise BayesKLRLError(f"{what} is a plain dict with the keys {list(given)}, not a list. {cure}")
    if isinstance(given, Mapping):
        raise BayesKLRLError(
            f"{what} is a {kind} with the keys {list(given)}. Of a mapping only what a tokenizer returns is read, a "
            f"{_TOKENIZER_OUTPUT} with 'input_ids'. Give a list of texts or token ids."
        )
    if _TABLES & _names(given):
        column = next(iter(getattr(given, "columns", ())), "prompt")
        raise BayesKLRLError(
            f"{what} is a {kind}, a table, of which it is not clear which column is meant. Give the column: "
            f"df[{column!r}].tolist()."
        )
    if isinstance(given, Set):
        raise BayesKLRLError(f"{what} is a {kind}, which has no order. Give a list.")
    if isinstance(given, bytes | bytearray | memoryview):
        raise BayesKLRLError(
            f"{what} is {kind}, which is neither text nor token ids. Decode it to a text: prompt.decode('utf-8')."
        )
    if isinstance(given, Iterator):
        raise BayesKLRLError(f"{what} is a {kind}, which can be read only once. Make a list of it: list(prompts).")


def _unpadded(encoded: Any) -> list[Any]:
    """Return the ids of a tokenizer's output, the list of one prompt or one list per prompt, without padding."""
    ids = _as_list("encoded['input_ids']", encoded["input_ids"])
    rows = [ids] if ids and all(map(_is_id, ids)) else [_as_list("encoded['input_ids']", row) for row in ids]
    masks = _masks(encoded, rows)
    if masks is not None:
        if len(masks) != len(rows):
            raise _misfit(f"{len(masks)} rows for {len(rows)} prompts")
        rows = [_kept(p, row, mask) for p, (row, mask) in enumerate(zip(rows, masks, strict=True))]
    return rows[0] if ids and all(map(_is_id, ids)) else rows


def _masks(encoded: Any, rows: list[Any]) -> list[Any] | None:
    """Return the rows of the attention mask, or those that a fast tokenizer remembers; None if there is neither."""
    if "attention_mask" in encoded:
        mask = _as_list("encoded['attention_mask']", encoded["attention_mask"])
        flat = bool(mask) and all(isinstance(entry, int) for entry in mask)
        return [mask] if flat else [_as_list("encoded['attention_mask']", row) for row in mask]
    remembered = [list(each.attention_mask) for each in getattr(encoded, "encodings", None) or []]
    same = [len(row) for row in rows] == [len(mask) for mask in remembered]
    return remembered if same else None


def _kept(p: int, row: list[int], mask: list[int]) -> list[int]:
    """Return a prompt's ids where its attention mask is 1, which must be all but one end."""
    if len(mask) != len(row):
        raise _misfit(f"{len(mask)} entries for the {len(row)} ids of prompt {p}")
    if any(entry not in (0, 1) for entry in mask):
        raise _misfit(f"the entries {mask} for prompt {p}; an entry is 0 or 1")
    ids = [token for token, inside in zip(row, mask, strict=True) if inside]
    start = mask.index(1) if ids else 0
    ends = (start, len(mask) - start - len(ids))
    if min(ends) > 0 or mask[start : start + len(ids)] != [1] * len(ids):
        raise BayesKLRLError(
            f"The attention_mask of prompt {p} is {mask}, which is neither left nor right padding. A model here reads a whole "
            "prompt: take out of input_ids what is not to be read, and give lists of token ids."
        )
    return ids


def _misfit(problem: str) -> BayesKLRLError:
    """Return the error about an attention mask that does not fit its ids."""
    return BayesKLRLError(
        f"The attention_mask of the prompts has {problem}. Give the tokenizer's output as it is, or lists of token ids."
    )


def _made_by_tokenizer(given: Any) -> bool:
    """Return whether this is what a Hugging Face tokenizer returns; told by the name of its class, without transformers."""
    return _TOKENIZER_OUTPUT in _names(given) and "input_ids" in given


def _names(given: Any) -> set[str]:
    """Return the names of an object's class and of the classes that it inherits from."""
    return {kind.__name__ for kind in type(given).__mro__}


def _is_message(item: object) -> bool:
    """Return whether this is a message of a conversation."""
    return isinstance(item, Mapping) and "role" in item


def _is_id(item: object) -> bool:
    """Return whether something can be a token id."""
    return isinstance(item, int | np.integer) and not isinstance(item, bool)
