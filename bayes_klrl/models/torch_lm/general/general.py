"""Networks that call a Hugging Face model's own forward: any causal LM, and encoder-decoder ones.

The features are the hidden states before the head, if the head with one known step after it (`Head`) gives the model's own
logits; then logits are made of the rows that are asked for only. Otherwise the features are the logits. There are four
networks:

* `CachedNetwork`: left padding, attention mask, explicit positions and the model's own cache;
* `PlainNetwork`: no cache and no padding; rows of equal length are run together, and all tokens are read at every step;
* `EncoderDecoderNetwork`: the encoder reads the prompt; the decoder starts from its start token;
* `PlainEncoderDecoderNetwork`: the same without cache and padding.

The cached ones are faster. They are used if they pass the self-check (`self_check`). So a model is not affected by padding
that leaks, by positions that it computes itself or by a cache of an unknown kind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from bayes_klrl.models.torch_lm.general.heads import Head, head_of
from bayes_klrl.models.torch_lm.network import (
    Network,
    accepted,
    base_model,
    decoder_start,
    forward_parameters,
    has_virtual_tokens,
    left_padded,
    model_device,
)
from bayes_klrl.typing import TokenIds

__all__ = [
    "CachedNetwork",
    "EncoderDecoderNetwork",
    "PlainEncoderDecoderNetwork",
    "PlainNetwork",
    "general_networks",
]


def general_networks(module: nn.Module, vocab_size: int) -> Iterator[Network]:
    """Yield the general networks of a model, the fastest first; the last one needs neither a cache nor padding.

    An adapter of virtual tokens (prompt tuning, P-tuning, prefix tuning) changes what a position is, and only the model's own
    forward knows how. Its models get the last one alone.
    """
    cached, plain = (
        (EncoderDecoderNetwork, PlainEncoderDecoderNetwork)
        if base_model(module).config.is_encoder_decoder
        else (CachedNetwork, PlainNetwork)
    )
    head = head_of(module, vocab_size)
    if not has_virtual_tokens(module):
        if head is not None:
            yield cached(module, vocab_size, head)
        yield cached(module, vocab_size)
    if head is not None:
        yield plain(module, vocab_size, head)
    yield plain(module, vocab_size)


class PlainNetwork:
    """See `Network`. The cache is the list of each row's tokens."""

    def __init__(self, module: nn.Module, vocab_size: int, head: Head | None = None) -> None:
        self.module, self.vocab_size, self.head = module, vocab_size, head
        self.width = vocab_size if head is None else head.widest
        self.device = model_device(module)
        self.options = accepted(module, {"use_cache": False, "return_dict": True})
        # with virtual tokens the model has more positions than the text, and an index from the left would be shifted
        self.keeps_last = "logits_to_keep" in forward_parameters(module) and not has_virtual_tokens(module)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, list[list[int]]]:
        """See `Network.prefill`."""
        rows = [list(prompt) for prompt in prompts]
        return self._last_logits(rows), rows

    @torch.no_grad()
    def step(self, cache: list[list[int]], tokens: Tensor) -> tuple[Tensor, list[list[int]]]:
        """See `Network.step`."""
        rows = [[*row, token] for row, token in zip(cache, tokens.tolist(), strict=True)]
        return self._last_logits(rows), rows

    def select(self, cache: list[list[int]], rows: Tensor) -> list[list[int]]:
        """See `Network.select`."""
        return [cache[row] for row in rows.tolist()]

    def features(self, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
        """See `Network.features`."""
        lengths = [len(prompts[owner]) for owner in owners.tolist()]
        parts = []
        for length, rows in equal_lengths(lengths, self.device):
            texts = [list(prompts[owner]) for owner in owners[rows].tolist()]
            prompt_tokens = torch.tensor(texts, dtype=torch.long, device=self.device).view(len(rows), length)
            parts.append((rows, self._logits(torch.cat([prompt_tokens, tokens[rows, :-1]], 1), tokens.shape[1])))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat([logits for _, logits in parts])[order]

    def logits(self, features: Tensor) -> Tensor:
        """See `Network.logits`."""
        return features.float() if self.head is None else self.head.logits(features)

    def _last_logits(self, rows: list[list[int]]) -> Tensor:
        logits = None
        for length, chosen in equal_lengths([len(row) for row in rows], self.device):
            tokens = torch.tensor([rows[row] for row in chosen.tolist()], dtype=torch.long, device=self.device)
            last = self._logits(tokens.view(len(chosen), length), 1)[:, -1]
            logits = last.new_empty((len(rows), last.shape[1])) if logits is None else logits
            logits[chosen] = last
        assert logits is not None
        return logits

    def _logits(self, tokens: Tensor, num_last: int) -> Tensor:
        keep = {"logits_to_keep": last_positions(tokens, num_last)} if self.keeps_last else {}
        if self.head is not None:
            hidden: Tensor = self.head.body(input_ids=tokens, **self.options).last_hidden_state
            return hidden[:, -num_last:]
        logits: Tensor = self.module(input_ids=tokens, **keep, **self.options).logits
        return logits[:, -num_last:]


@dataclass(frozen=True, eq=False)
class CachedRows:
    """A Hugging Face cache, which is never extended in place, and the padding of each row."""

    cache: Any
    padding: Tensor  # (R,)
    length: int


class CachedNetwork:
    """See `Network`. It runs one padded batch, with the model's own cache, which is copied before it grows."""

    def __init__(self, module: nn.Module, vocab_size: int, head: Head | None = None) -> None:
        self.module, self.vocab_size, self.head = module, vocab_size, head
        self.width = vocab_size if head is None else head.widest
        self.device = model_device(module)
        self.parameters = forward_parameters(module)
        self.config = base_model(module).config

    @torch.no_grad()
    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, CachedRows]:
        """See `Network.prefill`."""
        tokens, padding = left_padded(prompts, self.device)
        cache = DynamicCache(config=self.config)
        logits = self._logits(tokens, padding, 0, 1, past_key_values=cache, use_cache=True)
        if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            raise NotImplementedError("a cache that may be written in place cannot be shared between states")
        return logits[:, -1], CachedRows(cache, padding, tokens.shape[1])

    @torch.no_grad()
    def step(self, cache: CachedRows, tokens: Tensor) -> tuple[Tensor, CachedRows]:
        """See `Network.step`."""
        grown = shallow_copy(cache.cache)
        logits = self._logits(tokens[:, None], cache.padding, cache.length, 1, past_key_values=grown, use_cache=True)
        return logits[:, -1], CachedRows(grown, cache.padding, cache.length + 1)

    def select(self, cache: CachedRows, rows: Tensor) -> CachedRows:
        """See `Network.select`."""
        chosen = shallow_copy(cache.cache)
        chosen.batch_select_indices(rows)
        return CachedRows(chosen, cache.padding[rows], cache.length)

    def features(self, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
        """See `Network.features`."""
        prompt_tokens, padding = left_padded(prompts, self.device)
        whole = torch.cat([prompt_tokens[owners], tokens[:, :-1]], dim=1)
        return self._logits(whole, padding[owners], 0, tokens.shape[1], use_cache=False)

    def logits(self, features: Tensor) -> Tensor:
        """See `Network.logits`."""
        return features.float() if self.head is None else self.head.logits(features)

    def _logits(self, tokens: Tensor, padding: Tensor, start: int, num_last: int, **cache: Any) -> Tensor:
        """Return the logits at the last positions of `tokens` (R, S), whose positions start at `start`."""
        positions = torch.arange(start + tokens.shape[1], device=self.device) - padding[:, None]
        options = {
            "attention_mask": (positions >= 0).long(),
            "position_ids": positions[:, start:].clamp(min=0),
            "logits_to_keep": last_positions(tokens, num_last),
            "return_dict": True,
        }
        if self.head is not None:
            del options["logits_to_keep"]
        options = {name: value for name, value in options.items() if name in self.parameters}
        if self.head is not None:
            hidden: Tensor = self.head.body(input_ids=tokens, **options, **cache).last_hidden_state
            return hidden[:, -num_last:]
        logits: Tensor = self.module(input_ids=tokens, **options, **cache).logits
        return logits[:, -num_last:]


@dataclass(frozen=True, eq=False)
class DecoderRows:
    """The encoder's output for each row's prompt, and the decoder's cache."""

    encoded: Tensor  # (R, L, D)
    encoder_mask: Tensor  # (R, L)
    cache: Any
    length: int


class EncoderDecoderNetwork:
    """See `Network`. The decoder reads its start token first, which is never part of a completion, even if it is EOS."""

    def __init__(self, module: nn.Module, vocab_size: int, head: Head | None = None) -> None:
        self.module, self.vocab_size, self.head = module, vocab_size, head
        self.width = vocab_size if head is None else head.widest
        self.device = model_device(module)
        self.start = decoder_start(module)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, DecoderRows]:
        """See `Network.prefill`."""
        encoded, mask = self._encode(prompts)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return self.step(DecoderRows(encoded, mask, cache, 0), self._starts(len(prompts)))

    @torch.no_grad()
    def step(self, cache: DecoderRows, tokens: Tensor) -> tuple[Tensor, DecoderRows]:
        """See `Network.step`."""
        grown = EncoderDecoderCache(
            shallow_copy(cache.cache.self_attention_cache), shallow_copy(cache.cache.cross_attention_cache)
        )
        logits = self._decode(cache.encoded, cache.encoder_mask, tokens[:, None], past_key_values=grown, use_cache=True)
        return logits[:, -1], DecoderRows(cache.encoded, cache.encoder_mask, grown, cache.length + 1)

    def select(self, cache: DecoderRows, rows: Tensor) -> DecoderRows:
        """See `Network.select`."""
        halves = [shallow_copy(cache.cache.self_attention_cache), shallow_copy(cache.cache.cross_attention_cache)]
        for half in halves:
            half.batch_select_indices(rows)
        return DecoderRows(cache.encoded[rows], cache.encoder_mask[rows], EncoderDecoderCache(*halves), cache.length)

    def features(self, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
        """See `Network.features`."""
        encoded, mask = self._encode(prompts)
        read = torch.cat([self._starts(len(owners))[:, None], tokens[:, :-1]], dim=1)
        return self._decode(encoded.index_select(0, owners), mask[owners], read, use_cache=False)

    def logits(self, features: Tensor) -> Tensor:
        """See `Network.logits`."""
        return features.float() if self.head is None else self.head.logits(features)

    def _encode(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        # encoders are bidirectional and pad on the right: positions then need no correction
        length = max(map(len, prompts))
        rows = [list(prompt) + [0] * (length - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(rows, dtype=torch.long, device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask = (torch.arange(length, device=self.device) < lengths[:, None]).long()
        encoder = base_model(self.module).get_encoder()
        encoded: Tensor = encoder(input_ids=tokens, attention_mask=mask, return_dict=True).last_hidden_state
        return encoded, mask

    def _decode(self, encoded: Tensor, encoder_mask: Tensor, tokens: Tensor, **cache: Any) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        called = self.module if self.head is None else self.head.body
        output = called(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=encoder_mask,
            decoder_input_ids=tokens,
            return_dict=True,
            **cache,
        )
        found: Tensor = output.logits if self.head is None else output.last_hidden_state
        return found

    def _starts(self, num_rows: int) -> Tensor:
        return torch.full((num_rows,), self.start, dtype=torch.long, device=self.device)


class PlainEncoderDecoderNetwork:
    """See `Network`. The model's own forward on prompts of one length at a time; all tokens are read at every step."""

    def __init__(self, module: nn.Module, vocab_size: int, head: Head | None = None) -> None:
        self.module, self.vocab_size, self.head = module, vocab_size, head
        self.width = vocab_size if head is None else head.widest
        self.device = model_device(module)
        self.options = accepted(module, {"use_cache": False, "return_dict": True})
        self.start = decoder_start(module)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, list[tuple[list[int], list[int]]]]:
        """See `Network.prefill`."""
        rows = [(list(prompt), [self.start]) for prompt in prompts]
        return self._last_logits(rows), rows

    @torch.no_grad()
    def step(
        self, cache: list[tuple[list[int], list[int]]], tokens: Tensor
    ) -> tuple[Tensor, list[tuple[list[int], list[int]]]]:
        """See `Network.step`."""
        rows = [(prompt, [*read, token]) for (prompt, read), token in zip(cache, tokens.tolist(), strict=True)]
        return self._last_logits(rows), rows

    def select(self, cache: list[tuple[list[int], list[int]]], rows: Tensor) -> list[tuple[list[int], list[int]]]:
        """See `Network.select`."""
        return [cache[row] for row in rows.tolist()]

    def features(self, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
        """See `Network.features`."""
        starts = torch.full((len(tokens), 1), self.start, dtype=torch.long, device=self.device)
        return self._logits([prompts[owner] for owner in owners.tolist()], torch.cat([starts, tokens[:, :-1]], dim=1))

    def logits(self, features: Tensor) -> Tensor:
        """See `Network.logits`."""
        return features.float() if self.head is None else self.head.logits(features)

    def _last_logits(self, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        read = torch.tensor([tokens for _, tokens in rows], dtype=torch.long, device=self.device)
        return self._logits([prompt for prompt, _ in rows], read)[:, -1]

    def _logits(self, prompts: Sequence[TokenIds], read: Tensor) -> Tensor:
        parts, order = [], []
        for _, rows in equal_lengths([len(prompt) for prompt in prompts], self.device):
            texts = torch.tensor([list(prompts[row]) for row in rows.tolist()], dtype=torch.long, device=self.device)
            called = self.module if self.head is None else self.head.body
            output = called(input_ids=texts, decoder_input_ids=read[rows], **self.options)
            parts.append(output.logits if self.head is None else output.last_hidden_state)
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]


def last_positions(tokens: Tensor, num_last: int) -> Tensor:
    """Return the last columns of (R, S) tokens as indices.

    A single number, which the model also accepts, would make a slice. Torch multiplies a slice by one kernel if the head is
    trainable and by another if it is frozen; a new adapter would then differ from its prior in the last bit.
    """
    return torch.arange(tokens.shape[1] - num_last, tokens.shape[1], device=tokens.device)


def shallow_copy(cache: Any) -> Any:
    """Return a cache that can grow without a change to the given one: its layers replace their tensors and never write."""
    duplicate = copy.copy(cache)
    duplicate.layers = [copy.copy(layer) for layer in cache.layers]
    return duplicate


def equal_lengths(lengths: Sequence[int], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield each length, and the indices of the rows of that length."""
    for length in sorted(set(lengths)):
        rows = [row for row, other in enumerate(lengths) if other == length]
        yield length, torch.tensor(rows, dtype=torch.long, device=device)
