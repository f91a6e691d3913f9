"""Which token sequences begin others: a causal model scores a sequence and all its beginnings in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["owners_of"]


def owners_of(sequences: Sequence[tuple[int, ...]]) -> list[int]:
    """Return for each sequence the index of a longest one that begins with it: itself, if no other does.

    In alphabetic order a sequence that begins any other one begins its successor.

    Examples
    --------
    >>> owners_of([(1,), (1, 2), (3,), (1, 2, 4), (1, 5)])
    [3, 3, 2, 3, 4]
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    owners = list(range(len(sequences)))
    for index, following in reversed(list(pairwise(order))):
        if sequences[following][: len(sequences[index])] == sequences[index]:
            owners[index] = owners[following]
    return owners
