"""The models that are measured: random weights in the shapes of GPT-2 small and of a Llama of 1.2 billion parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

PROMPT = list(range(1, 17))


@dataclass(frozen=True)
class Shape:
    """A configuration of transformers, the precision of its weights, and the sizes of its runs."""

    name: str
    config: Any
    dtype: torch.dtype
    num_tokens: int
    adapter: str | None  # what SVI trains; None: all weights

    def model(self, device: str) -> Any:
        """Return the model with random weights on the device."""
        torch.manual_seed(0)
        with torch.device(device):
            made = hf.AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        return made.to(device).eval()


def gpt2(name: str, num_tokens: int, **sizes: Any) -> Shape:
    """Return GPT-2 small, or a GPT-2 of other sizes, in float32."""
    config = hf.GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0, **sizes)
    return Shape(name, config, torch.float32, num_tokens, None)


def llama(name: str, num_tokens: int, **sizes: Any) -> Shape:
    """Return a Llama of 1.2 billion parameters (the shape of Llama 3.2 1B), or of other sizes, in bfloat16."""
    whole: dict[str, Any] = {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    config = hf.LlamaConfig(**(whole | sizes), bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return Shape(name, config, torch.bfloat16, num_tokens, "lora")


def shapes(*, tiny: bool) -> list[Shape]:
    """Return the shapes that are measured."""
    if not tiny:
        return [gpt2("GPT-2 small", 64), llama("Llama 1B", 64)]
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return [
        gpt2("tiny GPT-2", 6, n_embd=32, n_layer=2, n_head=2, vocab_size=300),
        llama("tiny Llama", 6, **small, **heads),
    ]


def checked_models(*, tiny: bool) -> dict[str, Any]:
    """Return the models of the checks on the CPU, in float32: large enough for a card's kernels, small enough for a CPU."""
    width, layers, vocab = (32, 2, 100) if tiny else (128, 4, 1000)
    torch.manual_seed(1)
    first = hf.GPT2Config(n_embd=width, n_layer=layers, n_head=4, vocab_size=vocab, eos_token_id=0, bos_token_id=0)
    second = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=0,
    )
    return {"GPT-2": hf.GPT2LMHeadModel(first).eval(), "Llama": hf.LlamaForCausalLM(second).eval()}
