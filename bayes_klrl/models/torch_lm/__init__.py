"""Any Hugging Face language model in torch, sampled and scored by one and the same forward.

Read `lm` first (`TorchLM`), then `hugging_face` (what a model's configuration and tokenizer say), `network` (the interface
of a network to `TorchLM`), `tight` (our own forward for GPT-2 and Llama relatives), `general` (the model's own forward, for
all others, and gradient checkpointing), `self_check` with its texts in `probes` (which of them a model gets, and whether its
numbers are right), `scoring` (teacher-forced log-probs), `on_device` (drawing on a card without a round trip for every
token) and `sizes` (what a token takes in memory). `sources` knows where models come from, `checkpoint` loads and saves,
`adapters` makes guides from a prior (`adapter_kinds` knows which kinds can be one), `offsets` makes policies at an offset
from its parameters, and `table` is an n-gram table as trainable logits.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `lm`, and with it transformers, for its name alone: `table` and `scoring` need torch only."""
    if name == "TorchLM":
        from bayes_klrl.models.torch_lm.lm import TorchLM

        return TorchLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
