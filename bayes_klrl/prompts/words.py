"""Prompts and completions in words, as verdicts, tables and pictures show them.

A prompt has one name everywhere: its words. They are the text itself; of token ids, the text that they decode to, or the
ids where there is no tokenizer; of messages, the last that the user said. `prompt_texts` returns them as data, whole;
`prompt_labels` for the eye, short and on one line. Both make them unique, so that a table can be indexed by them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bayes_klrl.errors import BayesKLRLError

__all__ = ["Decoder", "prompt_labels", "prompt_texts", "prompt_words", "shortened", "visible"]

Decoder = Callable[[Sequence[Sequence[int]]], Sequence[str]]
"""Function that turns lists of token ids into texts."""

_MOST = 40
_EMPTY = "(empty)"
_MARKS = {"\n": "↵", "\t": "⇥"}
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of control, format, surrogate and separating characters
_JOINERS = "\u200c\u200d"  # of category Cf, but parts of words and of emoji
_OUTER_SPACES = re.compile(r"\A +| +\Z")


def visible(text: str) -> str:
    r"""Return a text on one line, whitespace made visible only where it matters: at both ends, and where a line breaks.

    Spaces at an end are shown as ␣, line breaks as ↵, tabs as ⇥; control characters, which could command a terminal, as
    their escapes.

    Examples
    --------
    >>> visible(" a fine day.\n"), visible("plain words"), visible("")
    ('␣a fine day.↵', 'plain words', '(empty)')
    """
    if not text:
        return _EMPTY
    marked = _OUTER_SPACES.sub(lambda spaces: "␣" * len(spaces[0]), text.replace("\r\n", "\n"))
    return "".join(map(_shown, marked))


def _shown(character: str) -> str:
    """Return what stands for a character."""
    if character in _MARKS:
        return _MARKS[character]
    if unicodedata.category(character) in _UNSEEN and character not in _JOINERS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def shortened(text: str, most: int = _MOST) -> str:
    """Return a text of at most `most` characters: an ellipsis stands for the middle, since prompts often begin alike.

    Examples
    --------
    >>> shortened("It was a fine morning in the month of May", 20)
    'It was a f…th of May'
    """
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def prompt_words(prompt: Any, decode: Decoder | None = None, *, most: int = _MOST) -> str:
    """Return one prompt's words for the eye: on one line, whitespace visible where it matters, at most `most` characters.

    Parameters
    ----------
    prompt
        A text, token ids, or a list of messages with the keys "role" and "content".
    decode
        Function that turns lists of token ids into texts, for prompts of ids; None: there is no tokenizer.
    most
        The largest number of characters; the middle gives way to an ellipsis.

    Examples
    --------
    >>> prompt_words("The king said: "), prompt_words((3, 1, 4)), prompt_words([{"role": "user", "content": "Hi!"}])
    ('The king said:␣', 'ids 3 1 4', 'Hi!')
    """
    return shortened(visible(_text_of(prompt, decode)), most)


def prompt_texts(prompts: Iterable[Any], decode: Decoder | None = None) -> list[str]:
    """Return the words of each prompt, whole and as they are; equal ones are told apart by their numbers.

    Examples
    --------
    >>> prompt_texts(["Hi", " Hi", "Hi"])
    ['Hi (prompt 0)', ' Hi', 'Hi (prompt 2)']
    """
    return _unique([_text_of(prompt, decode) for prompt in prompts])


def prompt_labels(prompts: Iterable[Any], decode: Decoder | None = None, *, most: int = _MOST) -> list[str]:
    """Return `prompt_words` of each prompt; equal ones are told apart by their numbers, which come on top of `most`."""
    return _unique([prompt_words(prompt, decode, most=most) for prompt in prompts])


def _text_of(prompt: Any, decode: Decoder | None) -> str:
    """Return a prompt as one text."""
    if isinstance(prompt, str):
        return prompt
    items = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return _last_said(items)
    text = "" if decode is None or not items else _decoded(items, decode)
    return text or ("ids " + " ".join(map(str, items)) if items else "")


def _decoded(ids: list[int], decode: Decoder) -> str:
    """Return the text of some ids; "" if the decoder does not know them, as one read from a file of draws."""
    try:
        return decode([ids])[0]
    except BayesKLRLError:
        return ""


def _last_said(messages: list[Mapping[str, Any]]) -> str:
    """Return the content of the user's last message, of the last message if none is the user's."""
    said = [message for message in messages if message.get("role") == "user"] or messages
    content = said[-1].get("content")
    if isinstance(content, list | tuple):  # parts, of which some may be images
        content = " ".join(part["text"] for part in content if isinstance(part, Mapping) and "text" in part)
    return "" if content is None else str(content)


def _unique(names: list[str]) -> list[str]:
    """Return the names, those that occur twice with the number of their prompt; all of them if that is not enough."""
    numbered = [f"{name} (prompt {p})" for p, name in enumerate(names)]
    counts = Counter(names)
    told = [number if counts[name] > 1 else name for name, number in zip(names, numbered, strict=True)]
    return told if len(set(told)) == len(told) else numbered
