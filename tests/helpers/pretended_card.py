"""A CUDA card that is only pretended: tensors that say they are on it, computed on the CPU, with every transfer counted.

    with PretendedCard() as card:
        lm = bk.TorchLM(model, device="cuda")        # its parameters are `OnCard` from here on
        ...
    card.waits, card.sends

What a real card would refuse is refused here too: an operation on tensors of both devices, and NumPy of a tensor that is on
the card. So code that runs here has its tensors on the right device, and the host waits for the card as often as it would
there:

* a *wait* is a copy to the host, the number or truth of a tensor, a result whose shape depends on values (`nonzero`, an index
  by a mask), and a copy to the card that is not `non_blocking`;
* a *send* is a copy to the card that does not wait.
"""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["OnCard", "PretendedCard", "register"]

CPU = torch.device("cpu")
aten = torch.ops.aten

VALUE_SHAPED = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal, aten.unique_consecutive}
"""Operations whose result's shape, or whose answer, the host learns from values."""


class OnCard(Tensor):
    """A tensor that says it is on the card; `inner` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[OnCard], inner: Tensor) -> OnCard:
        made: OnCard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("card", 0),
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard({self.inner!r})"

    def tolist(self) -> Any:
        """Return the numbers, which the host waits for."""
        active().waits["tolist"] += 1
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as torch does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().run(func, args, kwargs or {})


class PretendedCard(TorchDispatchMode):
    """See the module. Attributes: `waits` and `sends`, Counters by the operation's name; `places`, where they came from."""

    _active: list[PretendedCard] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.sends: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> PretendedCard:
        register()
        # these two copy behind the back of modes
        for name in ("tensor", "as_tensor"):
            self._patches.setattr(torch, name, functools.partial(made, getattr(torch, name)))
        self._active.append(self)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._active.remove(self)
        self._patches.undo()

    def reset(self) -> None:
        """Count from 0."""
        for counter in (self.waits, self.sends, self.places):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the CPU, and count what it would make the host wait for."""
        on_card = any(isinstance(each, OnCard) for each in tree_iter((args, kwargs)))
        device = kwargs.get("device")
        packet = func.overloadpacket
        to_card = device is not None and torch.device(device).type == "card"
        if packet is aten._to_copy:
            return self._copy(func, args, kwargs, to_card or (device is None and on_card))
        if not on_card and not to_card:
            return func(*args, **kwargs)
        if packet is aten._local_scalar_dense or packet in VALUE_SHAPED:
            self._wait(packet)
        if packet is aten.copy_:
            target, source = args[0], args[1]
            if isinstance(target, OnCard) != isinstance(source, OnCard):
                self._moved(
                    packet, isinstance(target, OnCard), bool(args[2:] and args[2]) or kwargs.get("non_blocking", False)
                )
        elif packet in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._wait(packet)
                elif index is not None and not isinstance(index, OnCard):
                    self._moved(packet, True, False)
        else:
            self._refuse_mixtures(func, args, kwargs)
        plain = tree_map(lambda each: each.inner if isinstance(each, OnCard) else each, (args, kwargs))
        if to_card:
            plain[1]["device"] = CPU
        found = func(*plain[0], **plain[1])
        if packet is aten.copy_ and not isinstance(args[0], OnCard):
            return args[0]
        wrapped = tree_map(lambda each: OnCard(each) if isinstance(each, Tensor) else each, found)
        if to_card and not on_card:
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], to_card: bool) -> Any:
        source = args[0]
        from_card = isinstance(source, OnCard)
        if from_card != to_card:
            self._moved(func.overloadpacket, to_card, kwargs.get("non_blocking", False))
        plain = dict(kwargs)
        if "device" in plain:
            plain["device"] = CPU
        found = func(source.inner if from_card else source, **plain)
        return OnCard(found) if to_card else found

    def _moved(self, packet: Any, to_card: bool, non_blocking: bool) -> None:
        if to_card and non_blocking:
            self.sends[str(packet)] += 1
            self.places[f"send {place()}"] += 1
        else:
            self._wait(packet)

    def _wait(self, packet: Any) -> None:
        self.waits[str(packet)] += 1
        self.places[f"wait {place()}"] += 1

    def _refuse_mixtures(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for each in tree_iter((args, kwargs)):
            if isinstance(each, Tensor) and not isinstance(each, OnCard) and each.dim() > 0:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {func} got one of {tuple(each.shape)} on cpu"
                )


class CardModule:
    """What torch asks a device's module."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = set_rng_state = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.zeros(0))


@functools.cache
def register() -> None:
    """Let torch know the device; once per process, and for good, so that tests do it in a process of their own."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("card", backend_module=CardModule())


def made(make: Any, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Return what `torch.tensor` or `torch.as_tensor` makes: on the CPU first, then copied to the device, as torch does."""
    if device is None or torch.device(device).type != "card" or isinstance(data, OnCard):
        return make(data, dtype=dtype, **({} if device is None else {"device": device}))  # type: ignore[no-any-return]
    found: Tensor = make(data, dtype=dtype).to("card")
    return found.requires_grad_() if requires_grad else found


def active() -> PretendedCard:
    """Return the card that is pretended now."""
    return PretendedCard._active[-1]


def place() -> str:
    """Return the newest line of the package on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/bayes_klrl/" in frame.filename and not frame.filename.endswith("arrays.py"):
            return f"{frame.filename.rpartition('/bayes_klrl/')[2]}:{frame.lineno} {frame.line}"
    return "?"
