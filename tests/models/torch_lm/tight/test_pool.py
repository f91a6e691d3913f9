"""Memory that is used again: never by two tensors at once, and no more of it than was promised."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from bayes_klrl.models.torch_lm.tight import pool

LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pool, "_free", [])
    yield
    gc.collect()


def kept() -> int:
    return sum(map(len, pool._free))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 40, 64, 4, 32), (0, 5), (1, 2**16 + 1)])
def test_a_tensor_has_the_shape_and_precision_and_holds_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = pool.empty(shape, LIKE.to(dtype))
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0 or tensor.numel() < 2**13
    numbers = torch.randn(shape, dtype=dtype)
    assert torch.equal(tensor.copy_(numbers), numbers)


def test_memory_is_used_again_once_no_view_of_it_is_left() -> None:
    first = pool.empty((2**16,), LIKE).fill_(1.0)
    address, view = first.data_ptr(), first[100:200].view(10, 10)
    del first
    second = pool.empty((2**16,), LIKE).fill_(2.0)
    assert second.data_ptr() != address
    assert (view == 1.0).all()
    del view
    assert kept() > 0
    third = pool.empty((2**15 + 2**10,), LIKE)  # a little smaller, in the same place
    assert third.data_ptr() == address
    assert (second == 2.0).all()
    assert kept() == 0


def test_what_is_much_larger_is_not_lent_and_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_KEPT", 2**20)
    large = pool.empty((2**17,), LIKE)  # half of it
    address = large.data_ptr()
    del large
    assert 2**19 <= kept() < 2**20
    assert pool.empty((2**14,), LIKE).data_ptr() != address
    several = [pool.empty((2**16,), LIKE) for _ in range(10)]
    del several
    assert kept() <= 2**20


def test_threads_never_share_memory() -> None:
    """Each writes its own number everywhere, again and again, and must find nothing else."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(150):
            tensors = [pool.empty((2**14 + 2**10 * (turn % 5),), LIKE).fill_(float(number)) for _ in range(3)]
            wrong.extend(number for tensor in tensors if not bool((tensor == number).all()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool._free
