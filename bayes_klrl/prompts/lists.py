"""Prompts in every form in which users have them, as a tuple of texts, of token-id tuples, or of conversations.

A prompt is a text, a list of token ids, or a conversation, which is a list of messages; ids may also be in an array of any
library, and in the output of a tokenizer. What only looks like a list of prompts, because one can iterate over it, is refused
by name: a dictionary would give its keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from bayes_klrl.checks import check_unicode
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.chat import Conversation, conversation, is_message
from bayes_klrl.prompts.kinds import as_list, check_kind, is_id
from bayes_klrl.prompts.tokenizer_output import made_by_tokenizer, unpadded

__all__ = ["as_prompts", "chosen_prompts", "prompt_list"]


def prompt_list(prompts: Any) -> tuple[Any, ...]:
    """Return the prompts as a tuple of texts, of token-id tuples, or of `Conversation`s.

    Parameters
    ----------
    prompts
        One prompt or several: texts, lists or arrays of token ids, the output of a Hugging Face tokenizer, or conversations.
        Several may be in an iterator, which is read once.

    Raises
    ------
    BayesKLRLError
        If it is something else, there is no prompt, a conversation is not one of text, or a text has a lone surrogate.
    """
    given = as_prompts(prompts)
    one = isinstance(given, str | Conversation) or (given and all(map(is_id, given)))
    listed = [given] if one else given
    if not listed:
        raise BayesKLRLError("prompts is empty; give at least one prompt (the empty text '' is one).")
    if any(isinstance(prompt, Conversation) for prompt in listed):
        return _conversations(listed)
    if all(isinstance(prompt, str) for prompt in listed):
        for p, prompt in enumerate(listed):
            check_unicode(f"Prompt {p}", prompt)
        return tuple(listed)
    if all(isinstance(prompt, list) and all(map(is_id, prompt)) for prompt in listed):
        return tuple(tuple(int(token) for token in prompt) for prompt in listed)
    raise BayesKLRLError(
        "prompts must be one text, list of token ids or conversation, or a list of such, all of one kind; got "
        f"{given!r}."
    )


def as_prompts(prompts: Any) -> Any:
    """Return the prompts as a text, as a `Conversation`, or as a list.

    In a list, arrays, tuples and a tokenizer's output have become lists, and messages have become `Conversation`s.

    Raises
    ------
    BayesKLRLError
        If the prompts, or one of them, are something that has no prompts in order.
    """
    if isinstance(prompts, str | Conversation):
        return prompts
    if made_by_tokenizer(prompts):
        return unpadded(prompts)
    listed = list(prompts) if isinstance(prompts, Iterator) else prompts
    check_kind("prompts", listed)
    items = as_list("prompts", listed)
    if any(map(is_message, items)):
        return conversation("the conversation", items)
    return [_one_prompt(p, prompt) for p, prompt in enumerate(items)]


def _conversations(listed: list[Any]) -> tuple[Any, ...]:
    """Return prompts some of which are conversations; all of them must be."""
    for p, prompt in enumerate(listed):
        if prompt == []:
            raise BayesKLRLError(f"The conversation of prompt {p} is empty. Give at least one message.")
        if not isinstance(prompt, Conversation):
            raise BayesKLRLError(
                f"Prompt {p} is no conversation, but others are: {prompt!r}. Prompts are all of one kind; a text becomes a "
                "conversation by [{'role': 'user', 'content': text}]."
            )
    return tuple(listed)


def chosen_prompts(indices: Any, num_prompts: int) -> list[int]:
    """Return the indices of the prompts that a list or array of indices, a slice, or a mask of P bools means.

    Raises
    ------
    BayesKLRLError
        If it means no prompt, a prompt that is not there, or nothing at all.
    """
    listed = _listed_indices(indices, num_prompts)
    if listed and all(isinstance(index, bool | np.bool_) for index in listed):
        if len(listed) != num_prompts:
            raise BayesKLRLError(
                f"A mask of prompts has one bool per prompt, so it has length {num_prompts} here; got one of length "
                f"{len(listed)}."
            )
        listed = [p for p, is_chosen in enumerate(listed) if is_chosen]
    wrong = [index for index in listed if not is_id(index) or not -num_prompts <= index < num_prompts]
    if wrong or not listed:
        raise BayesKLRLError(
            f"Indices of prompts are from 0 to {num_prompts - 1}, at least one of them; got {wrong or 'none'}."
        )
    return [int(index) for index in listed]


def _listed_indices(indices: Any, num_prompts: int) -> list[Any]:
    """Return indices or bools as a list; those of a slice are counted out."""
    try:
        if isinstance(indices, slice):
            return list(range(num_prompts)[indices])
        if isinstance(indices, str | bytes | Mapping | Set) or getattr(indices, "ndim", 1) != 1:
            raise TypeError
        listed: list[Any] = as_list("indices", list(indices))
    except (TypeError, ValueError):
        raise BayesKLRLError(
            f"Prompts are chosen by a list or array of indices, by a slice, or by one bool per prompt; got {indices!r}."
        ) from None
    return listed


def _one_prompt(p: int, prompt: Any) -> Any:
    """Return one item of a list of prompts: a text, a list of ids, a conversation, or an id; anything else as it is."""
    if isinstance(prompt, str | Conversation) or not hasattr(prompt, "__iter__"):
        return prompt
    if made_by_tokenizer(prompt):
        ids = unpadded(prompt)
        rows = [ids] if all(map(is_id, ids)) else ids
        if len(rows) != 1:
            raise BayesKLRLError(
                f"In the list of prompts, prompt {p} is a {type(prompt).__name__} of {len(rows)} prompts. Give one for each "
                "prompt, or a single one for all."
            )
        return rows[0]
    check_kind(f"prompt {p}", prompt)
    if not hasattr(prompt, "tolist") and not isinstance(prompt, Sequence):
        return prompt
    items = as_list(f"prompt {p}", prompt)
    return conversation(f"prompt {p}", items) if any(map(is_message, items)) else items
