"""Conversations as prompts: what a message may be, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import bayes_klrl as bk
from bayes_klrl.prompts.chat import Conversation, as_conversations, copied, is_messages
from bayes_klrl.prompts.lists import prompt_list

USER = {"role": "user", "content": "a b"}
TURNS = [
    {"role": "system", "content": "c"},
    USER,
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def plain(prompts: Any) -> list[list[dict[str, Any]]]:
    """The conversations as lists of dictionaries."""
    listed = prompt_list(prompts)
    assert all(isinstance(prompt, Conversation) for prompt in listed)
    return [prompt.messages() for prompt in listed]


FORMS: dict[str, Callable[[], Any]] = {
    "a list": lambda: [TURNS, [USER]],
    "tuples": lambda: (tuple(TURNS), (USER,)),
    "a generator": lambda: iter([TURNS, [USER]]),
    "a Series": lambda: pd.Series([TURNS, [USER]]),
    "arrays of objects": lambda: [np.array(TURNS, dtype=object), np.array([USER], dtype=object)],
    "conversations": lambda: prompt_list([TURNS, [USER]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_come_in_any_list(form: str) -> None:
    assert plain(FORMS[form]()) == [TURNS, [USER]]


@pytest.mark.parametrize("form", [TURNS, tuple(TURNS), np.array(TURNS, dtype=object)], ids=["list", "tuple", "array"])
def test_one_conversation_is_one_prompt(form: Any) -> None:
    assert plain(form) == [TURNS]


def test_parts_of_text_are_joined_and_what_is_none_is_left_out() -> None:
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "tool_calls": None,
    }
    assert plain([parts, {"role": "assistant", "content": "", "tool_calls": [], "name": "z"}]) == [
        [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "", "name": "z"}]
    ]


def test_the_users_messages_are_copied() -> None:
    mine = [dict(USER)]
    (kept,) = prompt_list(mine)
    mine[0]["content"] = "changed"
    copied(kept)[0]["content"] = kept.messages()[0]["content"] = "changed"
    assert kept[0]["content"] == "a b"


def test_a_conversation_is_known_by_the_words_of_its_last_question() -> None:
    long = Conversation([*TURNS, {"role": "user", "content": "What is\nthe capital of " + "far " * 30}])
    assert len(str(long)) <= 40
    assert str(long).startswith("What is↵the")
    assert repr(Conversation([USER])) == "<conversation of 1 message: 'a b'>"
    assert Conversation(TURNS) == tuple(TURNS)
    assert copy.deepcopy(long) == long


def test_texts_become_messages_of_the_user() -> None:
    assert as_conversations(["a b", Conversation(TURNS)]) == [(USER,), tuple(TURNS)]
    with pytest.raises(bk.BayesKLRLError, match="Prompt 1 is a list of token ids"):
        as_conversations(["a b", (1, 2)])


def test_what_is_a_conversation() -> None:
    assert all(map(is_messages, (TURNS, tuple(TURNS), prompt_list(TURNS)[0])))
    assert not any(map(is_messages, ("a", [1], [], (), [TURNS], USER, [USER, "a"], None)))


REFUSED: dict[str, tuple[Any, str]] = {
    "a tool": (
        [USER, {"role": "tool", "content": "3"}],
        "Message 1 of the conversation has the role 'tool'.*tools are not",
    ),
    "calls of tools": (
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
        "Message 0 of the conversation has the entry 'tool_calls'.*tools are not supported",
    ),
    "an image": (
        [[USER], [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "x.png"}]}]],
        "Message 0 of prompt 1 has a part of type 'image' in its content. Only text",
    ),
    "images beside the text": ([{**USER, "images": ["x.png"]}], "has the entry 'images'. Only text"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "a part without text"),
    "no content": ([{"role": "user"}], "has no content. Give a text"),
    "a number as content": ([{"role": "user", "content": 3}], "has the content 3. Give a text"),
    "a number as role": ([{"role": 3, "content": "a"}], "has the role 3. A role is a text"),
    "no role": ([USER, {"content": "a"}], r"Message 1 of the conversation is \{'content': 'a'\}, which is no message"),
    "a lone surrogate": (
        [[USER], [USER, {"role": "user", "content": "a\ud800"}]],
        r"Message 1 of prompt 1 has the lone surrogate",
    ),
    "a lone surrogate in a role": (
        [{"role": "\udfff", "content": "a"}],
        r"has the lone surrogate '\\udfff' at character 0",
    ),
    "a list beside the text": ([{**USER, "notes": ["x"]}], r"has the entry 'notes': \['x'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_conversation_of_texts_is_refused_by_name(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(bk.BayesKLRLError, match=message):
        prompt_list(given)
