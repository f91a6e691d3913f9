"""The checkpoints that all peers read: random weights of given shapes, with a tokenizer whose words are the token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from benchmarks.bench_trainers import word_tokenizer

__all__ = ["SHAPES", "as_text", "num_parameters", "prompts", "random_model", "write_random", "write_task"]

SHAPES: dict[str, dict[str, Any]] = {
    "4x128": {"layers": 4, "hidden": 128, "heads": 4},
    "12x256": {"layers": 12, "hidden": 256, "heads": 8},
    "gpt2": {"layers": 12, "hidden": 768, "heads": 12},
    "smollm2": {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "intermediate": 1536},
}
"""Layers, width and heads. The first three are GPT-2, "smollm2" is a Llama with the configuration of SmolLM2-135M."""

_POSITIONS = 1024


def num_parameters(shape: str, vocab_size: int) -> int:
    """Return the number of parameters, without biases and norms; input and output embeddings are tied.

    Examples
    --------
    >>> num_parameters("gpt2", 50257) // 10**6
    124
    """
    sizes = SHAPES[shape]
    hidden, layers = sizes["hidden"], sizes["layers"]
    if "kv_heads" not in sizes:
        return (vocab_size + _POSITIONS) * hidden + layers * 12 * hidden**2
    attention = 2 * hidden**2 * (1 + sizes["kv_heads"] / sizes["heads"])
    return int(vocab_size * hidden + layers * (attention + 3 * hidden * sizes["intermediate"]))


def random_model(shape: str, vocab_size: int) -> Any:
    """Return a transformer of one of `SHAPES` with random weights and without an EOS token."""
    import torch
    import transformers as hf

    sizes = SHAPES[shape]
    no_ends = {"eos_token_id": None, "bos_token_id": None}
    if "kv_heads" in sizes:
        config: Any = hf.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["intermediate"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"],
            tie_word_embeddings=True,
            **no_ends,
        )
        kind: Any = hf.LlamaForCausalLM
    else:
        config = hf.GPT2Config(
            vocab_size=vocab_size,
            n_positions=_POSITIONS,
            n_embd=sizes["hidden"],
            n_layer=sizes["layers"],
            n_head=sizes["heads"],
            **no_ends,
        )
        kind = hf.GPT2LMHeadModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def write_random(shape: str, vocab_size: int, folder: Path) -> Path:
    """Write a random model and its tokenizer into a folder, unless they are there, and return the folder.

    The last token is the tokenizer's EOS, which genlm-control and llamppl need; the model's configuration has none.
    """
    if not (folder / "config.json").exists():
        random_model(shape, vocab_size).save_pretrained(folder)
        _write_tokenizer(vocab_size, vocab_size - 1, folder)
    return folder


def write_task(posterior: bk.Posterior, folder: Path) -> Path:
    """Write the prior of an enumerable task and its tokenizer into a folder, unless they are there; return the folder."""
    if not (folder / "config.json").exists():
        prior = posterior.prior
        prior.save_pretrained(folder)  # type: ignore[attr-defined]
        _write_tokenizer(prior.vocab_size, posterior.pad_token, folder)
    return folder


def _write_tokenizer(vocab_size: int, eos: int, folder: Path) -> None:
    word_tokenizer(vocab_size, eos).save_pretrained(folder)
    file = folder / "tokenizer_config.json"  # transformers 5 names a class that disco's transformers 4 does not have
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def prompts(vocab_size: int, length: int, num: int) -> list[list[int]]:
    """Return `num` prompts of random tokens of one length, without EOS.

    Examples
    --------
    >>> [len(prompt) for prompt in prompts(50, 8, 2)]
    [8, 8]
    """
    drawn: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size - 1, size=(num, length)).tolist()
    return drawn


def as_text(token_ids: list[int]) -> str:
    """Return token ids as the text that the tokenizer turns into them."""
    return " ".join(map(str, token_ids))
