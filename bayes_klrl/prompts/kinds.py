"""What an object is that stands where prompts are expected; what only looks like a list of prompts is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.chat import is_message

__all__ = ["TABLES", "TOKENIZER_OUTPUT", "as_list", "check_kind", "class_names", "is_id"]

TABLES = frozenset({"DataFrame", "LazyFrame", "Table"})
TOKENIZER_OUTPUT = "BatchEncoding"


def is_id(item: object) -> bool:
    """Return whether something can be a token id."""
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def class_names(given: Any) -> set[str]:
    """Return the names of an object's class and of the classes that it inherits from."""
    return {kind.__name__ for kind in type(given).__mro__}


def as_list(what: str, given: Any) -> Any:
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


def check_kind(what: str, given: Any) -> None:
    """Refuse what one can iterate over, but what holds no prompts in order."""
    kind = type(given).__name__
    if is_message(given):
        raise BayesKLRLError(
            f"{what} is one message, {dict(given)!r}. A conversation is a list of messages: [message]; several prompts are a "
            "list of such lists."
        )
    if isinstance(given, Mapping) and type(given) is dict:
        cure = (
            'Give its ids alone, encoded["input_ids"].' if "input_ids" in given else "Give a list of its texts or ids."
        )
        raise BayesKLRLError(f"{what} is a plain dict with the keys {list(given)}, not a list. {cure}")
    if isinstance(given, Mapping):
        raise BayesKLRLError(
            f"{what} is a {kind} with the keys {list(given)}. Of a mapping only what a tokenizer returns is read, a "
            f"{TOKENIZER_OUTPUT} with 'input_ids'. Give a list of texts or token ids."
        )
    if TABLES & class_names(given):
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
