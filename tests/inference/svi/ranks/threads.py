"""A group of ranks that are threads of one process, so that the pieces are tested without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from bayes_klrl.inference.svi.ranks.group import Ranks

__all__ = ["ThreadRanks", "on_ranks"]

Result = TypeVar("Result")


class ThreadRanks(Ranks):
    """A rank that is a thread; what ranks exchange lies on a common table."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        self._table, self._barrier = table, barrier

    def objects(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait()
        found = list(self._table)
        self._barrier.wait()
        return found

    def gathered_equal(self, part: Any) -> Any:
        found = self.objects(part)
        assert len({each.shape for each in found}) == 1, "a collective of accelerate takes tensors of one shape"
        return torch.cat(found)

    def summed(self, tensor: Any) -> Any:
        return torch.stack(self.objects(tensor.detach().clone())).sum(dim=0)


def on_ranks(size: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """Return what `work` gives on each rank; an error is raised."""
    table, barrier = [None] * size, threading.Barrier(size, timeout=20)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [ThreadRanks(rank, size, table, barrier) for rank in range(size)]))
