"""Tiny Hugging Face models with random weights, made in milliseconds: no download, no file."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers as hf

__all__ = ["tiny_gpt2", "tiny_llama", "tiny_other", "tiny_t5", "tiny_tokenizer"]


def tiny_gpt2(vocab_size: int = 5, eos_token_id: int | list[int] | None = 0, seed: int = 0, **options: Any) -> Any:
    """Return a GPT-2 of two layers and 16 dimensions, whose next-token distributions are far from uniform."""
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0} | options
    return seeded(hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=vocab_size, eos_token_id=eos_token_id, **settings), seed)


def tiny_llama(vocab_size: int = 5, eos_token_id: int | list[int] | None = 0, seed: int = 0, **options: Any) -> Any:
    """Return a Llama of two layers and 16 dimensions, two query heads for each key head."""
    settings = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
    } | options
    return seeded(
        hf.LlamaForCausalLM,
        hf.LlamaConfig(vocab_size=vocab_size, eos_token_id=eos_token_id, **settings),
        seed,
    )


def tiny_t5(vocab_size: int = 5, eos_token_id: int | list[int] | None = 0, seed: int = 0, **options: Any) -> Any:
    """Return a T5 whose decoder starts with the EOS token: the trap is that it is then no EOS."""
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2} | options
    config = hf.T5Config(
        vocab_size=vocab_size, eos_token_id=eos_token_id, pad_token_id=0, decoder_start_token_id=0, **settings
    )
    return seeded(hf.T5ForConditionalGeneration, config, seed)


def tiny_other(name: str, vocab_size: int = 5, seed: int = 0) -> Any:
    """Return a tiny model of an architecture that the tight forward does not know."""
    common = {"vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    configs: dict[str, Any] = {
        "opt": lambda: hf.OPTConfig(**common, **ids, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**common, **ids, intermediate_size=24, max_position_embeddings=32),
        "bloom": lambda: hf.BloomConfig(vocab_size=vocab_size, hidden_size=16, n_layer=2, n_head=2, **ids),
        "mamba": lambda: hf.MambaConfig(
            vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, state_size=4, **ids
        ),
        "gemma2": lambda: hf.Gemma2Config(
            **common, **ids, intermediate_size=24, num_key_value_heads=1, head_dim=8, sliding_window=4
        ),
        "bart": lambda: hf.BartConfig(
            vocab_size=vocab_size,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
            **ids,
        ),
    }
    config = configs[name]()
    factory = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    return seeded(factory.from_config, config, seed)


def tiny_tokenizer(vocab_size: int = 5, adds_eos: bool = False) -> Any:
    """Return a tokenizer of words a, b, c, ... after "<eos>", id 0."""
    words = {"<eos>": 0} | {chr(ord("a") + index): index + 1 for index in range(vocab_size - 1)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if adds_eos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 0)]
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def seeded(build: Any, config: Any, seed: int) -> Any:
    """Return the model with weights drawn under their own seed, large enough for sharp distributions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.35)
    return model.eval()
