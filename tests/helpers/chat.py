"""A tokenizer with a chat template, and tiny language models that have it."""

from __future__ import annotations

from typing import Any

import tokenizers
import transformers as hf

import bayes_klrl as bk
from tests.helpers.tiny_models import tiny_llama

__all__ = ["BOS", "END", "EOS", "TEMPLATE", "chat_lm", "chat_tokenizer"]

EOS, BOS, END = 0, 1, 2
WORDS = ("<eos>", "<bos>", "<end>", "system", "user", "assistant", "a", "b", "c")
TEMPLATE = (
    "{{ bos_token }} "
    "{% for m in messages %}"
    "{% if m['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('No role ' + m['role']) }}{% endif %}"
    "{{ m['role'] + ' ' + m['content'] + ' <end> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
    "{% if thought is defined %}{{ thought + ' ' }}{% endif %}"
)
"""Turns end with <end>, which is another token than EOS; BOS is written by the template."""


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Return a tokenizer of nine words, which puts BOS before a text, with a chat template."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", extra_special_tokens=["<end>"]
    )
    made.chat_template = template
    return made


def chat_lm(eos_token_id: Any = (EOS, END), template: str | None = TEMPLATE) -> Any:
    """Return a tiny Llama with random weights and that tokenizer."""
    return bk.TorchLM(tiny_llama(len(WORDS)), chat_tokenizer(template), eos_token_id=eos_token_id, check=False)
