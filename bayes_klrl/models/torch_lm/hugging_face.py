"""What a Hugging Face model's configuration and tokenizer say: vocabulary, ends, limits and texts, and whether it is loaded.

Nothing here runs the network, so all of it holds for a model on torch's device "meta" too, which has shapes and no weights:
the prior of a plan (`bk.plan`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.checkpoint_files import eos_union
from bayes_klrl.models.memory import SHARE, free_memory
from bayes_klrl.models.out_of_memory import halving
from bayes_klrl.models.token_ids import (
    check_length,
    check_prompts,
    check_tokenizer_fits,
    decoded,
    decoded_after,
    encoded,
    first_token,
    require_tokenizer,
    resolved_eos,
)
from bayes_klrl.models.torch_lm.network import base_model, context_limit, model_device
from bayes_klrl.models.torch_lm.sizes import Sizes, sizes_of
from bayes_klrl.typing import TokenIds

__all__ = ["HuggingFaceModel", "output_size"]


class HuggingFaceModel:
    """The part of `TorchLM` that its model's configuration and its tokenizer determine; see there for the parameters."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None,
        eos_token_id: int | Collection[int] | None,
        device: str | torch.device | None,
        particles_per_pass: int | None,
    ) -> None:
        if particles_per_pass is not None:
            check_count("particles_per_pass", particles_per_pass)
        self._vocab_size = output_size(model)
        self._module = model
        if device is not None and not (self.unloaded and torch.device(device).type == "meta"):
            self.require_weights(f"moved to {str(device)!r}")
            self._module = model.to(device)
        self._module.eval()
        self._tokenizer = tokenizer
        self._config: Any = base_model(model).config
        self.particles_per_pass = particles_per_pass
        self._most_scored: dict[bool, int] = {}  # with a gradient or without: rows that are known to fit
        check_tokenizer_fits(tokenizer, self._vocab_size)
        configured = eos_union(*(getattr(source, "eos_token_id", None) for source in self._configurations()))
        self._eos_token_ids = resolved_eos(eos_token_id, configured, tokenizer, self._vocab_size)

    @property
    def module(self) -> nn.Module:
        """The `transformers` model."""
        return self._module

    @property
    def device(self) -> torch.device:
        """The device of token ids and log-probs."""
        return model_device(self._module)

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel`: the width of the logits, which may exceed the tokenizer's size."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel`."""
        return self._eos_token_ids

    @property
    def full_support(self) -> bool:
        """True: a softmax of finite logits leaves nothing out."""
        return True

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel`."""
        return self._tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """The token that replaces an empty prompt: the tokenizer's BOS, else the configuration's, else None."""
        sources = (self._tokenizer, self._config, self._config.get_text_config())
        return first_token([getattr(source, "bos_token_id", None) for source in sources], self._vocab_size)

    @cached_property
    def context_length(self) -> int | None:
        """Largest number of tokens of prompt and completion together; None if the model has no limit.

        Where a longer text has other log-probs for its first tokens, it is the length up to which it has not: the original
        length of rotary embeddings of the type "longrope", for instance. It is read once, since every token asks for it.
        """
        return context_limit(self._module)

    @property
    def half_precision(self) -> bool:
        """True if weights have fewer bits than float32: decoded and scored log-probs then differ noticeably."""
        return any(parameter.dtype.itemsize < 4 for parameter in self._module.parameters())

    @property
    def prompt_apart(self) -> bool:
        """True if `context_length` is for prompt and completion separately, as in an encoder-decoder model."""
        return bool(self._config.is_encoder_decoder)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters."""
        return (parameter for parameter in self._module.parameters() if parameter.requires_grad)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel`. A final EOS that the tokenizer adds is kept only for an encoder-decoder model."""
        tokenizer = require_tokenizer(self, "encode")
        return encoded(tokenizer, texts, keep_eos=self._config.is_encoder_decoder)

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return decoded(require_tokenizer(self, "decode"), ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`. The completion of an encoder-decoder model is a text of its own."""
        if self.prompt_apart:
            return self.decode(ids)
        return decoded_after(require_tokenizer(self, "decode"), self.decode, prompts, ids)

    @property
    def unloaded(self) -> bool:
        """True if the model is on torch's device "meta": it has shapes and no weights, and can be planned but not run."""
        return any(parameter.device.type == "meta" for parameter in self._module.parameters())

    @property
    def sizes(self) -> Sizes | None:
        """What a token takes in memory, by the configuration; None if it does not name layers and heads."""
        return sizes_of(self._module)

    def row_bytes(self, num_tokens: int) -> int | None:
        """Return the bytes that a completion takes in decoding, prompt and completion of so many tokens together."""
        sizes = self.sizes
        return None if sizes is None else sizes.row_bytes(num_tokens)

    def prompt_bytes(self, num_tokens: int) -> int | None:
        """Return the bytes that reading a prompt of so many tokens takes."""
        sizes = self.sizes
        return None if sizes is None else sizes.prompt_bytes(num_tokens)

    def free_bytes(self) -> int | None:
        """Return the free memory of the model's device in bytes; None if it is not known."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return free_memory() if self.device.type == "cpu" else None

    def rows_per_chunk(self, prompts: Sequence[TokenIds], num_tokens: int, *, recompute: bool = False) -> int | None:
        """Return the number of completions of so many tokens that are scored at once; None if memory does not limit it.

        More than these are scored one chunk after the other. If a gradient is needed, each chunk is computed again in the
        backward pass, so that the activations of one chunk alone are stored.
        """
        gradient = torch.is_grad_enabled()
        found = [rows for rows in (self.particles_per_pass, self._most_scored.get(gradient)) if rows is not None]
        sizes, free = self.sizes, self.free_bytes()
        if self.particles_per_pass is None and sizes is not None and free is not None:
            longest = max((len(prompt) for prompt in prompts), default=0)
            each = sizes.scoring_bytes(longest, num_tokens, gradient=gradient, recompute=recompute)
            found.append(max(1, int(SHARE * free) // each))
        return min(found, default=None)

    def halve_scored(self, num_rows: int, *, gradient: bool) -> None:
        """Score from here on at most half as many completions at once as now, because memory ran out.

        Parameters
        ----------
        num_rows
            The number of completions that were to be scored.
        gradient
            Whether it ran out with a gradient; the number without one is another.

        Raises
        ------
        DeviceMemoryError
            If they were scored one by one already.
        """
        now = min(num_rows, self.particles_per_pass or num_rows, self._most_scored.get(gradient, num_rows))
        self._most_scored[gradient] = halving(now, "differentiated" if gradient else "scored")

    def require_weights(self, doing: str = "run") -> None:
        """Refuse to do something with a model that is not loaded."""
        if self.unloaded:
            raise BayesKLRLError(
                f"A {type(base_model(self._module)).__name__} on the device 'meta' has no weights, so it can be planned "
                f"(bk.plan) but not {doing}. Load it: bk.TorchLM.from_pretrained(folder), with device='cpu' or 'cuda'."
            )

    def _configurations(self) -> tuple[Any, ...]:
        """Return the model's configuration, that of its text part, and its generation configuration."""
        generation = getattr(base_model(self._module), "generation_config", None)
        return self._config, self._config.get_text_config(), generation

    def _special_ids(self) -> list[int]:
        """Return the padding id, the EOS ids and BOS, as far as they are known."""
        pads = [getattr(source, "pad_token_id", None) for source in (*self._configurations(), self._tokenizer)]
        return [token for token in [*pads, *sorted(self._eos_token_ids), self.bos_token_id] if isinstance(token, int)]

    def _switch_dropout_off(self) -> None:
        if any(module.training for module in self._module.modules()):
            self._module.eval()

    def _check_prompts(self, prompts: Sequence[TokenIds], num_new: int) -> None:
        check_prompts(prompts, self._vocab_size, self.bos_token_id)
        limit, apart = self.context_length, self.prompt_apart
        for prompt in prompts:
            check_length(max(len(prompt), num_new) if apart else len(prompt) + num_new, limit)


def output_size(model: nn.Module) -> int:
    """Return the number of logits of a model.

    Raises
    ------
    CheckpointError
        If it has no language modelling head.
    """
    find_head = getattr(base_model(model), "get_output_embeddings", None)
    if find_head is None or (head := find_head()) is None:
        raise CheckpointError(
            f"A {type(model).__name__} is not a Hugging Face language model: it has no language modelling head. Give an "
            "AutoModelForCausalLM, or call bk.TorchLM.from_pretrained with its folder or name."
        )
    weight = getattr(head, "weight", None)
    if callable(weight):  # a quantised layer
        weight = weight()
    if weight is not None:
        return int(weight.shape[0])
    return int(base_model(model).config.get_text_config().vocab_size)
