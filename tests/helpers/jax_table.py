"""A logit table on JAX: the smallest language model that a NumPyro program traces, and every gradient of it is enumerable."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bayes_klrl as bk

__all__ = ["JaxTable"]


class JaxTable:
    """log p(a | h) = log_softmax(logits[h])[a], h the last order - 1 tokens; starts as an `NgramLM`."""

    accepts_empty_prompt = True

    def __init__(self, prior: bk.NgramLM) -> None:
        self.start = prior
        self.parameters = {"logits": jnp.asarray(prior.log_probs.reshape(-1, prior.vocab_size))}
        self.place = prior.vocab_size ** np.arange(prior.order - 2, -1, -1)

    def with_parameters(self, parameters: Any) -> JaxTable:
        other = copy.copy(self)
        other.parameters = parameters
        return other

    def to_ngram(self) -> bk.NgramLM:
        table = np.asarray(self.parameters["logits"], dtype=np.float64)
        table = table - np.log(np.exp(table).sum(axis=-1, keepdims=True))
        shape = (self.vocab_size,) * self.start.order
        return bk.NgramLM(table.reshape(shape), eos_token_id=self.eos_token_ids, tokenizer=self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name in {"start", "parameters"} or name.startswith("__"):
            raise AttributeError(name)
        if name in {"prefill", "append", "select", "next_log_probs", "token_log_probs"}:
            return getattr(self.to_ngram(), name)
        if name in {"vocab_size", "eos_token_ids", "full_support", "tokenizer", "encode", "decode"}:
            return getattr(self.start, name)
        raise AttributeError(name)

    def pad_prompts(self, prompts: Sequence[Sequence[int]]) -> Any:
        return self.start.prefill(prompts)

    def sample_tokens(self, contexts: Any, uniforms: Any) -> Any:
        table = jax.nn.log_softmax(self.parameters["logits"])
        cumulated = jnp.cumsum(jnp.exp(table), axis=-1)

        def step(carry: Any, uniform: Any) -> Any:
            context, done = carry
            row = (context * self.place).sum(-1)
            cumulative = cumulated[row]
            drawn = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(axis=-1)
            token = jnp.where(done, min(self.eos_token_ids, default=0), drawn)
            score = jnp.where(done, 0.0, table[row, drawn])
            context = jnp.concatenate([context[..., 1:], token[..., None]], axis=-1)
            return (context, done | self._ends(token)), (token, score)

        start = jnp.broadcast_to(contexts[:, None], (*uniforms.shape[:2], contexts.shape[-1]))
        carry = (start, jnp.zeros(uniforms.shape[:2], dtype=bool))
        _, (tokens, scores) = jax.lax.scan(step, carry, jnp.moveaxis(uniforms, 2, 0))
        return jnp.moveaxis(tokens, 0, 2).astype(jnp.int32), jnp.moveaxis(scores, 0, 2)

    def score_positions(self, contexts: Any, tokens: Any) -> Any:
        rows, inside = self._read(contexts, tokens)
        return jnp.where(inside[..., None], jax.nn.log_softmax(self.parameters["logits"])[rows], 0.0)

    def score_tokens(self, contexts: Any, tokens: Any) -> Any:
        rows, inside = self._read(contexts, tokens)
        return jnp.where(inside, jax.nn.log_softmax(self.parameters["logits"])[rows, tokens], 0.0)

    def _read(self, contexts: Any, tokens: Any) -> tuple[Any, Any]:
        """The table's row at every position, and whether the completion has not ended before it; both (P, N, T)."""
        num_tokens, width = tokens.shape[2], contexts.shape[-1]
        before = jnp.broadcast_to(contexts[:, None], (*tokens.shape[:2], width))
        read = jnp.concatenate([before, tokens], axis=2)
        rows = sum(place * read[..., t : t + num_tokens] for t, place in enumerate(self.place.tolist()))
        ends = self._ends(tokens)
        return rows, jnp.cumsum(ends, axis=2) - ends == 0

    def _ends(self, tokens: Any) -> Any:
        ends = jnp.zeros(tokens.shape, dtype=bool)
        for token in self.eos_token_ids:
            ends |= tokens == token
        return ends
