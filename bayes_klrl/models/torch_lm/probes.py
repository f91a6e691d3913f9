"""The texts on which a model's numbers are checked: special ids, last tokens that differ, lengths past each threshold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from bayes_klrl.models.torch_lm.network import base_model, context_limit, nested
from bayes_klrl.sequences import Sequences

__all__ = ["LONGEST", "Probe", "long_probe", "named_lengths", "random_text", "short_probe"]

LONGEST, MOST_WORK = 1024, 500_000_000
"""Largest length, and largest length times number of parameters, at which the check reads a long text."""

_LENGTH = re.compile(r"window|chunk|original_max_position|capacity|block_size")


@dataclass(frozen=True)
class Probe:
    """A small batch, and the places (row, position) at which the model's own forward is asked."""

    prompts: list[list[int]]
    owners: list[int]  # ascending
    tokens: list[list[int]]
    places: list[tuple[int, int]]


def short_probe(vocab_size: int, special_ids: Sequence[int], limit: int, *, thorough: bool) -> Probe:
    """Return completions that hold the special ids, of two prompts of different lengths, one of which holds the first one.

    Parameters
    ----------
    vocab_size, special_ids
        The number of ids, and those that the completions must hold (the first four at most).
    limit
        Largest number of tokens that the model reads.
    thorough
        True: the model's own forward is asked at every position; False: at two, for large models.
    """
    special = list(dict.fromkeys(token for token in special_ids if 0 <= token < vocab_size))[: 4 if thorough else 2]
    ids = ordinary_ids(vocab_size, special)
    middle = [ids[5]] if thorough else []
    num_prompt = min(3 if thorough else 2, max(1, limit - 2))
    num_tokens = max(2, min(len(special) + len(middle) + (3 if thorough else 2), limit - num_prompt))
    first = [ids[4], *special, *middle, ids[1], ids[6]][-num_tokens:]
    second = [ids[6], ids[0], *special, ids[7], ids[2]][-num_tokens:]
    others = [[*first[:-2], ids[7], ids[0]]] + ([[*first[:-1], ids[3]]] if thorough else [])
    tokens = [first, *others, second]
    last = num_tokens - 1
    both = [(row, t) for row in (0, len(tokens) - 1) for t in range(num_tokens)]
    places = [*both, (1, last)] if thorough else [(0, last), (len(tokens) - 1, last)]
    prompt = [ids[0], *(special or ids[1:])[:1], ids[2]][:num_prompt]
    return Probe([prompt, ids[3:4]], [0] * (len(tokens) - 1) + [1], tokens, places)


def long_probe(vocab_size: int, length: int, encoder_decoder: bool) -> Probe:
    """Return a completion that crosses `length`, counted with its prompt, next to a short text.

    The decoder of an encoder-decoder model counts the completion alone. So there the completion is this long, too.
    """
    ids = ordinary_ids(vocab_size, [])
    text = [ids[(7 * place + place // 3) % len(ids)] for place in range(2 * length + 8)]
    num_tokens = length + 3 if encoder_decoder else 5
    tokens = [text[length : length + num_tokens], text[1 : 1 + num_tokens]]
    return Probe(
        [text[: max(1, length - 2)], ids[3:4]], [0, 1], tokens, [(0, 0), (0, num_tokens - 1), (1, num_tokens - 1)]
    )


def ordinary_ids(vocab_size: int, special: Sequence[int]) -> list[int]:
    """Return eight ids spread over the vocabulary; different ones, and not special, if there are enough."""
    spread = [index * vocab_size // 29 for index in range(29)]
    others = list(dict.fromkeys(token for token in spread if token not in special)) or [0]
    step = max(1, len(others) // 8)
    return [others[index * step % len(others)] for index in range(8)]


def named_lengths(module: nn.Module, num_parameters: int) -> tuple[list[int], dict[str, int]]:
    """Return the lengths that the configuration names and that are cheap to cross, and those that are not, by name."""
    config = base_model(module).config
    limit = context_limit(module)
    longest = LONGEST if not config.is_encoder_decoder else LONGEST // 8
    longest = min(longest, LONGEST if limit is None else limit - 8, MOST_WORK // max(1, num_parameters))
    found = {
        name: length
        for name, length in lengths_in(config.to_dict())
        if length > 1 and (limit is None or length < limit)
    }
    cheap = [length for length in found.values() if length <= longest]
    return cheap, {name: length for name, length in found.items() if length > longest}


def lengths_in(entries: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the names and values of entries that are lengths, in nested configurations, too."""
    for name, value in ((str(name), value) for config in nested(entries) for name, value in config.items()):
        numbers = value if isinstance(value, list | tuple) else [value]
        integers = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
        if integers and _LENGTH.search(name):
            yield name, max(integers)


def random_text(vocab_size: int, context_length: int | None) -> tuple[list[list[int]], Sequences]:
    """Return a prompt and eight completions of random tokens: by their log-probs a model is compared with its saved copy."""
    rng = np.random.default_rng(0)
    prompt, tokens = rng.integers(0, vocab_size, 2).tolist(), rng.integers(0, vocab_size, (1, 8, 4))
    limit = context_length or 6
    tokens = tokens[..., : max(1, min(4, limit - 2))]
    return [prompt[: max(1, limit - 1)]], Sequences(tokens, np.full((1, 8), tokens.shape[2]))
