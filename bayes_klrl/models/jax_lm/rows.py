"""Rows for the compiled functions: padded on the left, rounded up to buckets, cut into chunks that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayes_klrl.models.jax_lm.decoding import Reading
from bayes_klrl.models.jax_lm.forward import Architecture, Cache, Parameters
from bayes_klrl.models.jax_lm.steps import bucket
from bayes_klrl.typing import Array, IntArray, TokenIds

__all__ = [
    "MIN_BUCKET",
    "MIN_CAPACITY",
    "Buffer",
    "JaxState",
    "chunk_size",
    "cut",
    "joined",
    "left_padded",
    "padded_to",
    "read_rows",
    "widest",
]

MIN_BUCKET = 8
"""The smallest size that lengths, and numbers of decoded rows, are rounded up to."""

MIN_CAPACITY = 32
"""The smallest number of slots of a buffer."""

BUDGET = 2**25
"""Largest number of floats of one chunk of scored rows at its widest layer (128 MB)."""


@dataclass(eq=False)
class Buffer:
    """Keys and values with free slots; the first `filled` are in use. States share a buffer; a write to a slot in use copies.

    The arrays are donated to every step, which writes in place, and replaced by the arrays that it returns.
    """

    arrays: Cache
    filled: int

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return int(self.arrays.keys.shape[3])


@dataclass(frozen=True, eq=False)
class JaxState:
    """The state of R rows, in the first `length` slots of a buffer whose number of rows B >= R is a power of two."""

    features: Array  # (B, D), the hidden states that predict the next tokens
    buffer: Buffer
    length: int
    padding: np.ndarray  # (B,) number of padded slots on the left
    num_tokens: IntArray  # (R,) tokens read so far, prompt included


def widest(architecture: Architecture) -> int:
    """Return the number of floats per token at the widest layer."""
    return max(architecture.vocab_size, architecture.inner_size)


def chunk_size(floats_per_row: int) -> int:
    """Return the number of rows of a chunk: a power of two, at least `MIN_BUCKET`."""
    most = max(MIN_BUCKET, BUDGET // floats_per_row)
    return 1 << (most.bit_length() - 1)


def read_rows(
    reading: Reading,
    architecture: Architecture,
    parameters: Parameters,
    temperature: float,
    prompts: Sequence[TokenIds],
    owners: IntArray,
    tokens: IntArray,
    lengths: IntArray,
) -> list[tuple[Array, int]]:
    """Return the output of a reading for chunks of rows, each (rows or more, T or more, ...), and its true number of rows."""
    width = bucket(tokens.shape[1], MIN_BUCKET)
    size = chunk_size(width * widest(architecture))
    function = reading if len(tokens) <= size else recomputed(reading)
    found = []
    for first in range(0, len(tokens), size):
        chunk = slice(first, first + size)
        own = owners[chunk]
        near = prompts[own[0] : own[-1] + 1]
        prompt_tokens, padding = left_padded(near, bucket(len(near)))
        num_rows = bucket(len(own), MIN_BUCKET)
        inside = np.arange(tokens.shape[1]) < lengths[chunk, None]
        legal = np.zeros((num_rows, width), dtype=np.int32)
        legal[: len(own), : tokens.shape[1]] = np.where(inside, tokens[chunk], 0)
        arguments = (prompt_tokens, padding, padded_to(own - own[0], num_rows), legal)
        counted = padded_to(lengths[chunk], num_rows)
        found.append((function(architecture, parameters, *arguments, counted, temperature), len(own)))
    return found


@cache
def recomputed(reading: Reading) -> Callable[..., Any]:
    """Return the same function, recomputed in the backward pass, so that only the inputs of a chunk are stored."""
    return jax.jit(jax.checkpoint(reading, static_argnums=(0,)), static_argnums=0)


def left_padded(prompts: Sequence[TokenIds], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as `num_rows` rows padded on the left, and the padding of each; surplus rows hold one token."""
    length = bucket(max(map(len, prompts)), MIN_BUCKET)
    tokens = np.zeros((num_rows, length), dtype=np.int32)
    padding = np.full(num_rows, length - 1, dtype=np.int32)
    for row, prompt in enumerate(prompts):
        padding[row] = length - len(prompt)
        tokens[row, padding[row] :] = prompt
    return tokens, padding


def padded_to(values: IntArray, size: int) -> np.ndarray:
    """Return values as int32 with zeros after them, shape (size,)."""
    padded = np.zeros(size, dtype=np.int32)
    padded[: len(values)] = values
    return padded


def cut(array: Array, num_rows: int) -> Array:
    """Return the first rows. Unless the array is traced it is cut on the host, since JAX would compile each new shape."""
    if len(array) == num_rows or isinstance(array, jax.core.Tracer):
        return array[:num_rows]
    return jax.device_put(np.asarray(array)[:num_rows])


def joined(read: list[tuple[Array, int]], shape: tuple[int, int, int]) -> Array:
    """Return the chunks' rows as one array (P, N, T, ...), zeros past their width."""
    width, depth = min(shape[2], read[0][0].shape[1]), read[0][0].shape[2:]
    traced = any(isinstance(array, jax.core.Tracer) for array, _ in read)
    numpy: Any = jnp if traced else np
    rows = numpy.concatenate([numpy.asarray(array)[:count, :width] for array, count in read])
    free = ((0, 0), (0, shape[2] - width), *[(0, 0)] * len(depth))
    padded = numpy.pad(rows, free).reshape(*shape, *depth)
    return padded if traced else jax.device_put(padded)
