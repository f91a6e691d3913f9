"""The token ids of prompts for a model, and the room that they leave in its context."""

from __future__ import annotations

from typing import Any

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.chat import is_messages
from bayes_klrl.prompts.template import rendered_ids
from bayes_klrl.typing import LanguageModel

__all__ = ["check_context", "encoded_prompts"]


def encoded_prompts(prompts: tuple[Any, ...], prior: LanguageModel) -> tuple[tuple[int, ...], ...]:
    """Return the prompts' token ids; an empty prompt becomes BOS where the model has one.

    A conversation has the ids of its rendered text, see `template`.
    """
    if any(map(is_messages, prompts)):
        return _checked(rendered_ids(prompts, prior), prior)
    texts = all(isinstance(prompt, str) for prompt in prompts)
    if texts and prior.tokenizer is None and any(prompts):
        raise BayesKLRLError(
            f"The prompt {next(p for p in prompts if p)!r} is text, but the prior has no tokenizer. Give token ids, or "
            "the model a tokenizer."
        )
    ids = prior.encode(list(prompts)) if texts and prior.tokenizer is not None else [list(p) for p in prompts]
    return _checked(ids, prior)


def _checked(ids: list[list[int]], prior: LanguageModel) -> tuple[tuple[int, ...], ...]:
    """Return ids of prompts that the model can read; an empty prompt becomes BOS where the model has one."""
    bos = getattr(prior, "bos_token_id", None)
    for p, row in enumerate(ids):
        outside = [token for token in row if not 0 <= token < prior.vocab_size]
        if outside:
            raise BayesKLRLError(
                f"Prompt {p} has the token id {outside[0]}, outside the vocabulary 0..{prior.vocab_size - 1}."
            )
        if not row and bos is None and not getattr(prior, "accepts_empty_prompt", False):
            raise BayesKLRLError(
                f"Prompt {p} is empty, and the model has no BOS token to start from. Give a prompt of at least one token."
            )
    return tuple(tuple(row) if row or bos is None else (int(bos),) for row in ids)


def check_context(prompt_ids: tuple[tuple[int, ...], ...], max_new_tokens: int, lm: LanguageModel) -> None:
    """Refuse a prompt and completion that do not fit into the model's context."""
    context = getattr(lm, "context_length", None)
    longest = max(len(row) for row in prompt_ids)
    apart = getattr(lm, "prompt_apart", False)
    needed = max(longest, max_new_tokens) if apart else longest + max_new_tokens
    if context is not None and needed > context:
        raise BayesKLRLError(
            f"A prompt of {longest} tokens and max_new_tokens = {max_new_tokens} exceed the model's context of {context} "
            "tokens. Shorten one of them."
        )
