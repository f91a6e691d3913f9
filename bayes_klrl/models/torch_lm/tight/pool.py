"""Main memory for keys and values that is used again, by the next decoding or the next copy of a cache.

Memory that is given back to the operating system and asked for again is cleared page by page on its first use. For a small
model this took a tenth of the time of decoding. A slab of the pool is lent as a tensor; once no tensor refers to its memory
any more, it is free for the next one. The pool keeps at most `MOST_KEPT` bytes that are not lent.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty"]

MOST_KEPT = 2**27
"""Number of bytes that are kept for later (128 MB)."""

LEAST = 2**16
"""Number of bytes from which memory comes from the pool."""

_ALIGNED = 64  # bytes, as torch's own memory is: the width of a cache line

_free: list[np.ndarray] = []
_lock = (
    threading.RLock()
)  # it may be taken twice: memory may be given back while some is taken, by the garbage collector


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor in main memory with arbitrary numbers, of a shape and of the precision of another tensor."""
    num_bytes = math.prod(shape) * like.element_size()
    if num_bytes < LEAST:
        return like.new_empty(shape)
    slab = taken(num_bytes + _ALIGNED)
    start = -slab.ctypes.data % _ALIGNED
    lent = slab[start : start + num_bytes]
    weakref.finalize(lent, give_back, slab).atexit = False
    return torch.from_numpy(lent).view(like.dtype).view(*shape)


def taken(num_bytes: int) -> np.ndarray:
    """Return the smallest free slab of at least so many bytes and at most twice as many, or a new one."""
    with _lock:
        fitting = [(len(slab), place) for place, slab in enumerate(_free) if num_bytes <= len(slab) <= 2 * num_bytes]
        if fitting:
            return _free.pop(min(fitting)[1])
    return np.empty(num_bytes, dtype=np.uint8)


def give_back(slab: np.ndarray) -> None:
    """Keep a slab that is no longer lent, unless too much is kept already."""
    with _lock:
        if sum(map(len, _free)) + len(slab) <= MOST_KEPT:
            _free.append(slab)
