"""Conversations as prompts: messages, each with a role and a text, and the words by which a person knows a conversation.

    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "What is the capital of France?"}]

A posterior keeps each conversation with its `Rendering`, the text that the chat template made of it (see `template`). So the
template is applied once, when the posterior is made, and parts and copies of the posterior use the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bayes_klrl.checks import check_unicode
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.words import prompt_words

__all__ = [
    "Conversation",
    "Rendering",
    "as_conversations",
    "as_message",
    "conversation",
    "copied",
    "is_message",
    "is_messages",
    "rendering_of",
    "stored_conversation",
]

_TOOLS = ("tools", "tool_calls", "tool_call_id", "function_call")
_MEDIA = ("images", "image", "audio", "video", "files")
_TOOL_ROLES = frozenset({"tool", "function", "ipython"})


@dataclass(frozen=True)
class Rendering:
    """The text that a chat template made of a conversation.

    Parameters
    ----------
    text
        The text, with all special tokens, BOS included.
    template
        A digest of the chat template and of the tokenizer's special tokens. A conversation that is given to a model with
        another template is rendered anew.
    options
        The arguments that the template was given.
    """

    text: str
    template: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Conversation(tuple[dict[str, Any], ...]):
    """The messages of one prompt, in order; made by `conversation`.

    It equals any conversation with the same messages. `str` gives the last that the user said, shortened, which is what
    tables, pictures and error messages show of it.

    Examples
    --------
    >>> asked = conversation("The prompt", [{"role": "user", "content": "What is the capital of France?"}])
    >>> asked[0]["content"], str(asked)
    ('What is the capital of France?', 'What is the capital of France?')
    >>> asked
    <conversation of 1 message: 'What is the capital of France?'>
    """

    rendering: Rendering | None

    def __new__(cls, messages: Iterable[Mapping[str, Any]], rendering: Rendering | None = None) -> Conversation:
        """Return a conversation of copies of the messages."""
        made = super().__new__(cls, map(dict, messages))
        made.rendering = rendering
        return made

    @property
    def is_begun(self) -> bool:
        """Whether the last message is the assistant's: then the completion continues it."""
        return bool(self[-1]["role"] == "assistant")

    def messages(self) -> list[dict[str, Any]]:
        """Return copies of the messages, in a list, as chat templates and reward functions take them."""
        return [dict(message) for message in self]

    def __str__(self) -> str:
        return prompt_words(self)

    def __repr__(self) -> str:
        number = f"{len(self)} message" + "s" * (len(self) > 1)
        return f"<conversation of {number}: {str(self)!r}>"


def is_message(item: object) -> bool:
    """Return whether this is a message of a conversation: a mapping with a role."""
    return isinstance(item, Mapping) and "role" in item


def is_messages(prompt: object) -> bool:
    """Return whether a prompt is a conversation: a non-empty list or tuple of messages.

    Examples
    --------
    >>> is_messages([{"role": "user", "content": "Hello"}]), is_messages("Hello"), is_messages([1, 2]), is_messages([])
    (True, False, False, False)
    """
    return isinstance(prompt, list | tuple) and bool(prompt) and all(map(is_message, prompt))


def conversation(what: str, messages: Iterable[Any]) -> Conversation:
    """Return messages as a `Conversation`; one that is a conversation already, as it is.

    Parameters
    ----------
    what
        The name of the conversation in error messages, such as "prompt 3".
    messages
        The messages: mappings with "role" and "content", both texts. A content may be a list of parts of type "text", which
        are joined with newlines. Further entries are for the template; those that are None are left out.

    Raises
    ------
    BayesKLRLError
        If something is no message, has no role or no text, or holds tools, images or other media.
    """
    if isinstance(messages, Conversation):
        return messages
    return Conversation(_message(f"Message {m} of {what}", message) for m, message in enumerate(messages))


def as_conversations(prompts: Iterable[Any]) -> list[Conversation]:
    """Return prompts as conversations: a text as one message of the user.

    Raises
    ------
    BayesKLRLError
        If a prompt is a list of token ids.
    """
    found = []
    for p, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Conversation):
            raise BayesKLRLError(f"Prompt {p} is a list of token ids, of which no message can be made. Give its text.")
        found.append(Conversation([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt)
    return found


def rendering_of(prompt: Any) -> dict[str, Any] | None:
    """Return the rendering of a conversation as JSON takes it; None if there is none."""
    rendering = getattr(prompt, "rendering", None)
    return None if rendering is None else {**vars(rendering), "options": dict(rendering.options)}


def stored_conversation(messages: list[dict[str, Any]], rendering: dict[str, Any] | None) -> Conversation:
    """Return the conversation behind its messages and what `rendering_of` returned."""
    return Conversation(messages, None if rendering is None else Rendering(**rendering))


def as_message(completion: str) -> list[dict[str, str]]:
    """Return the text of a completion as a conversation of the assistant's turn alone."""
    return [{"role": "assistant", "content": completion}]


def copied(prompt: Any) -> Any:
    """Return a prompt as a reward function gets it: a conversation as a list of copies, any other prompt as it is."""
    return [dict(message) for message in prompt] if is_messages(prompt) else prompt


def _message(what: str, given: Any) -> dict[str, Any]:
    """Return a message as a dictionary of its entries, the content as one text."""
    if not is_message(given):
        raise BayesKLRLError(
            f"{what} is {given!r}, which is no message. All items of a conversation are messages, such as "
            "{'role': 'user', 'content': 'Hello'}."
        )
    entries = {key: value for key, value in given.items() if value is not None}
    role, content = entries.pop("role", None), entries.pop("content", None)
    if not isinstance(role, str) or not role:
        raise BayesKLRLError(
            f"{what} has the role {role!r}. A role is a text, such as 'system', 'user' or 'assistant'."
        )
    _refuse_tools_and_media(what, role, entries)
    text = _text(what, content)
    for each in (role, text, *(value for value in entries.values() if isinstance(value, str))):
        check_unicode(what, each)
    for key, value in entries.items():
        if not isinstance(key, str) or not isinstance(value, str | bool | int | float):
            raise BayesKLRLError(
                f"{what} has the entry {key!r}: {value!r}. Entries beside role and content are for the chat template, and are "
                "texts or numbers. Leave it out."
            )
    return {"role": role, "content": text, **entries}


def _refuse_tools_and_media(what: str, role: str, entries: dict[str, Any]) -> None:
    """Refuse a message of a tool, with calls of tools, or with media; leave out such entries where they are empty."""
    used = [f"the entry {key!r}" for key in _TOOLS if entries.pop(key, None)]
    if role in _TOOL_ROLES:
        used.append(f"the role {role!r}")
    if used:
        raise BayesKLRLError(
            f"{what} has {used[0]}. Calls of tools are not supported: a completion here is one turn of text. Leave such "
            "messages out, or write the tool's answer as the text of a user's turn."
        )
    if media := [key for key in _MEDIA if entries.pop(key, None)]:
        raise BayesKLRLError(
            f"{what} has the entry {media[0]!r}. Only text is supported: leave images and other media out."
        )


def _text(what: str, content: Any) -> str:
    """Return the content of a message as one text."""
    if isinstance(content, str):
        return content
    if content is None:
        raise BayesKLRLError(f"{what} has no content. Give a text; '' is one.")
    if not isinstance(content, list | tuple):
        raise BayesKLRLError(f"{what} has the content {content!r}. Give a text.")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise BayesKLRLError(
                f"{what} has a part of type {kind!r} in its content. Only text is supported: leave images and other media out."
                if kind != "text"
                else f"{what} has a part without text in its content: {part!r}. Give a text."
            )
        texts.append(text)
    return "\n".join(texts)
