"""Tiny classifiers with random weights and a tokenizer of single characters, and what they say of a text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
import torch
import transformers as hf

import bayes_klrl as bk

__all__ = ["CHARACTERS", "MAKERS", "PRIOR", "alone", "bert", "characters", "gpt2", "llama", "plain"]

CHARACTERS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh <>:"]
PRIOR = bk.NgramLM.fit(["ab", "ba", "aab", "b"], order=2)
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
_NAMES = {"id2label": {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}}


def characters(*, pad: bool = True, side: str = "right", cls_and_sep: bool = False) -> Any:
    """Return a tokenizer of one token per character."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: n for n, token in enumerate(CHARACTERS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    if cls_and_sep:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, padding_side=side, **special, **({"pad_token": "[PAD]"} if pad else {})
    )


def seeded(factory: Any, config: Any) -> Any:
    """Return a model whose logits are far from 0 and different for every text."""
    torch.manual_seed(0)
    model = factory(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.6)
    return model.eval()


def bert(num_labels: int = 2, **options: Any) -> Any:
    """Return a bidirectional classifier, which reads its first token."""
    settings = _SMALL | {"max_position_embeddings": 24, "num_labels": num_labels} | options
    return seeded(hf.BertForSequenceClassification, hf.BertConfig(vocab_size=len(CHARACTERS), **settings))


def gpt2(num_labels: int = 1, **options: Any) -> Any:
    """Return a causal classifier without a padding token, which refuses batches."""
    settings = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 24, "num_labels": num_labels} | options
    config = hf.GPT2Config(vocab_size=len(CHARACTERS), bos_token_id=1, eos_token_id=2, **settings)
    return seeded(hf.GPT2ForSequenceClassification, config)


def llama(num_labels: int = 3, **options: Any) -> Any:
    """Return a causal classifier with three named labels."""
    settings = _SMALL | {"num_key_value_heads": 1, "num_labels": num_labels, "pad_token_id": 0} | options
    settings |= _NAMES if num_labels == 3 else {}
    config = hf.LlamaConfig(vocab_size=len(CHARACTERS), bos_token_id=1, eos_token_id=2, **settings)
    return seeded(hf.LlamaForSequenceClassification, config)


def plain(num_labels: int = 2) -> Any:
    """Return a classifier that reads its last position, padding or not."""
    config = hf.XLNetConfig(
        vocab_size=len(CHARACTERS), d_model=8, n_layer=1, n_head=2, d_inner=8, num_labels=num_labels
    )
    return seeded(hf.XLNetForSequenceClassification, config)


MAKERS: dict[str, Any] = {
    "bert": bert,
    "gpt2": gpt2,
    "gpt2 whose padding is a letter": lambda: gpt2(pad_token_id=CHARACTERS.index("b")),
    "llama": llama,
    "xlnet": plain,
}


def alone(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> np.ndarray:
    """The logits of each text by a forward pass of its own, shape (M, K)."""
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt", **options)).logits[0] for text in texts]
    logits: np.ndarray = torch.stack(rows).double().numpy()
    return logits
