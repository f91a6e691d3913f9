"""Conversations rendered by the chat template of a tokenizer: once, when a posterior is made.

The template writes the role of every turn and opens the assistant's turn (`add_generation_prompt=True`). Where the last
message is the assistant's, the completion continues it (`continue_final_message=True`), as TRL renders its data sets of
prompts. The text holds every special token, BOS included, so it is encoded without adding any. It is kept, because a template
need not give the same text twice: some write the date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.chat import Conversation, Rendering, as_message
from bayes_klrl.typing import LanguageModel

__all__ = ["check_end_of_turn", "end_of_turn", "rendered_ids", "rendered_prompts"]

_OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "tools")
_PROBE = "Probe"
_WRITTEN_OUT = "{'type': 'text'"
"""What a template writes that takes a list of parts for a text."""


def rendered_prompts(
    prompts: Sequence[Any], prior: LanguageModel, options: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Return the prompts with every conversation rendered; texts and token ids as they are.

    A conversation that this template rendered before, with these options, keeps its text.

    Parameters
    ----------
    prompts
        The prompts, as `prompt_list` returns them.
    prior
        The language model whose tokenizer has the template.
    options
        Arguments of the template, such as `enable_thinking=False`; None: those of an earlier rendering, else none.

    Raises
    ------
    BayesKLRLError
        If there is no tokenizer or no template, if the template refuses a conversation, or an option is not one of a template.
    """
    if not any(isinstance(prompt, Conversation) for prompt in prompts):
        if options is not None:
            raise BayesKLRLError(
                f"chat_template_kwargs = {options!r} is for prompts that are conversations, and these are not. Leave it out, "
                "or give lists of messages."
            )
        return tuple(prompts)
    _check_options(options)
    digest = _digest(prior)
    return tuple(_rendered(p, prompt, prior, digest, options) for p, prompt in enumerate(prompts))


def rendered_ids(prompts: Sequence[Conversation], prior: LanguageModel) -> list[list[int]]:
    """Return the token ids of conversations, rendered by this model's template if they are not yet."""
    texts = [prompt.rendering.text for prompt in rendered_prompts(prompts, prior)]
    return [_encoded(prior.tokenizer, text) for text in texts]


def check_end_of_turn(prompts: Sequence[Any], prior: LanguageModel) -> None:
    """Refuse conversations whose turns end with a token that does not end the prior's completions.

    Completions would run on into turns that the model writes for the user. The EOS ids of a model are one frozen set, which
    sampling and scoring share, and the prior of texts too; so the model has to be made with them.
    """
    first = next((prompt for prompt in prompts if isinstance(prompt, Conversation)), None)
    end = None if first is None else end_of_turn(prior.tokenizer, first)
    if end is None or end in prior.eos_token_ids:
        return
    loads = f"bk.{type(prior).__name__}.from_pretrained(..., {{}})" if hasattr(prior, "from_pretrained") else "{}"
    made = loads.format(f"eos_token_id={sorted({*prior.eos_token_ids, end})}")
    raise BayesKLRLError(
        f"The chat template ends a turn with {_word(prior.tokenizer, end)!r} (id {end}), which is not one of the prior's EOS "
        f"ids {sorted(prior.eos_token_ids)}: completions would go on past their turn. Make the prior with it: {made}."
    )


def end_of_turn(tokenizer: Any, prompt: Conversation) -> int | None:
    """Return the token that the template writes after an assistant's turn; None if it is not a special token.

    Found by rendering the conversation with an answer: it is the first special token after the answer's text.
    """
    answered = [*(prompt.messages()[:-1] if prompt.is_begun else prompt.messages()), *as_message(_PROBE)]
    options = {} if prompt.rendering is None else prompt.rendering.options
    try:
        text = _applied(tokenizer, answered, **options)
    except Exception:  # a template may refuse whatever it likes: then it does not tell how it ends a turn
        return None
    special = _special_ids(tokenizer)
    rest = "" if text is None else text.rpartition(_PROBE)[2]
    return next((token for token in _encoded(tokenizer, rest) if token in special), None)


def _rendered(
    p: int, prompt: Any, prior: LanguageModel, digest: str, options: Mapping[str, Any] | None
) -> Conversation:
    """Return conversation number p with its rendering."""
    before = prompt.rendering
    if before is not None and before.template == digest and options in (None, before.options):
        return prompt  # type: ignore[no-any-return]
    used = dict((before.options if before is not None else {}) if options is None else options)
    turns = {"add_generation_prompt": not prompt.is_begun, "continue_final_message": prompt.is_begun}
    try:
        text = _applied(prior.tokenizer, prompt.messages(), **turns, **used)
    except Exception as error:  # jinja2's TemplateError, and whatever else a template or a tokenizer raises
        roles = [message["role"] for message in prompt]
        raise BayesKLRLError(
            f"The chat template refuses the conversation of prompt {p}, with the roles {roles}: {error}"
        ) from error
    if text is None or not _encoded(prior.tokenizer, text):
        raise BayesKLRLError(
            f"The chat template leaves out the last message of prompt {p}, {prompt[-1]!r}: what it writes does not contain it."
        )
    return Conversation(prompt, Rendering(text, digest, used))


def _applied(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """Return what a template writes, None if the content of the last message is not in it.

    Templates of models that see images may read the content of a message only as a list of parts, and drop one that is a text
    without a word, or fail. Then the parts are given to it.
    """
    said = messages[-1]["content"].strip()
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        if said in text:
            return str(text)
        refusal = None
    except Exception as error:  # whatever a template raises; the caller says it with the number of the prompt
        refusal = error
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    with suppress(Exception):  # as above: the template does not read parts either
        text = tokenizer.apply_chat_template(in_parts, tokenize=False, **options)
        if said in text and _WRITTEN_OUT not in text:
            return str(text)
    if refusal is not None:
        raise refusal
    return None


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that holds its special tokens already."""
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def _digest(prior: LanguageModel) -> str:
    """Return the digest of the template of a model's tokenizer, and of the special tokens that it may write."""
    tokenizer = prior.tokenizer
    if tokenizer is None:
        raise BayesKLRLError(
            "The prompts are conversations, but the prior has no tokenizer. Give the model the tokenizer of an "
            "instruction-tuned checkpoint, which has a chat template; or give token ids."
        )
    template = None
    if hasattr(tokenizer, "apply_chat_template"):
        try:
            template = tokenizer.get_chat_template()
        except (AttributeError, ValueError):  # not set, or several of which none is the default
            template = getattr(tokenizer, "chat_template", None)
            template = None if isinstance(template, Mapping) else template
    if not template:
        raise BayesKLRLError(
            "The prompts are conversations, but the prior's tokenizer has no chat template. Take an instruction-tuned "
            "checkpoint, set the template that the model was tuned with, prior.tokenizer.chat_template = '...', or give texts."
        )
    words = {key: str(word) for key, word in dict(getattr(tokenizer, "special_tokens_map", {})).items()}
    return hashlib.sha256(json.dumps([template, words], sort_keys=True).encode()).hexdigest()[:16]


def _check_options(options: Mapping[str, Any] | None) -> None:
    """Refuse options that are not arguments of a template, and values that cannot be kept in a file."""
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise BayesKLRLError(
            f"chat_template_kwargs is a dictionary, such as {{'enable_thinking': False}}; got {options!r}."
        )
    for name, value in options.items():
        if name in _OURS:
            raise BayesKLRLError(
                f"chat_template_kwargs has {name!r}. That one is not the template's to choose here; leave it out."
            )
        if not isinstance(name, str) or not (value is None or isinstance(value, str | bool | int | float)):
            raise BayesKLRLError(
                f"chat_template_kwargs has {name!r}: {value!r}. The value of an argument is a text, a number, a bool or None."
            )


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens, also of those that have no role of their own."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        *getattr(tokenizer, "all_special_ids", ()),
        *(i for i, token in added.items() if getattr(token, "special", False)),
    }


def _word(tokenizer: Any, token: int) -> str:
    """Return the text of a special token."""
    return str(tokenizer.convert_ids_to_tokens(token)) if hasattr(tokenizer, "convert_ids_to_tokens") else str(token)
