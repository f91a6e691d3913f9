"""Objects as bytes that many processes can share: a pickle of protocol 5 whose large arrays lie beside it.

NumPy arrays, torch tensors and JAX arrays of more than a few kilobytes are not copied into the pickle. Their memory is written
into one file, which every worker maps: N workers hold one copy of a model between them, and a worker that writes into an array
changes its own copy of that page only. What comes back refers to that file by place, so that frozen weights of the prior
inside of a guide come back as the prior's own memory.

Functions and classes that a worker cannot import, such as a lambda or those of a script, are sent by value (cloudpickle).
Pickles are made and read by processes of one run only; no file that is kept is a pickle.
"""

from __future__ import annotations

import io
import mmap
import pickle
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bayes_klrl.runners.by_value import contents, is_sent_by_value, sent_by_value

__all__ = ["Mapped", "Packed", "Reference", "finder", "packed", "read_packed", "unpacked", "write_packed"]

_SMALL = 4096  # bytes below which an array stays inside of the pickle
_ALIGNMENT = 64
_HEAD = 32


@dataclass(frozen=True)
class Reference:
    """Bytes that the receiver has already: their place in the file that was sent first, and their number."""

    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class Packed:
    """A pickle, and the memory of its large arrays in the order in which it asks for them."""

    data: bytes
    buffers: Sequence[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes that have to be moved."""
        return len(self.data) + sum(len(each) for each in self.buffers if not isinstance(each, Reference))

    def copied(self) -> Packed:
        """Return the same in memory of its own, which may be written to where this may be."""
        buffers = [
            each if isinstance(each, Reference) else bytes(each) if memoryview(each).readonly else bytearray(each)
            for each in self.buffers
        ]
        return Packed(self.data, buffers)


@dataclass(frozen=True, eq=False)
class Mapped:
    """A file of `write_packed` in memory, its pages shared with all other processes that mapped it."""

    packed: Packed
    address: int
    length: int

    def reference(self, view: memoryview) -> Reference | None:
        """Return the place of some bytes in the file; None if they lie elsewhere."""
        offset = _address(view) - self.address
        return Reference(offset, len(view)) if 0 <= offset and offset + len(view) <= self.length else None


def packed(value: Any, shared: Sequence[Any] = (), mapped: Mapped | None = None) -> Packed:
    """Return an object as bytes.

    Parameters
    ----------
    value
        The object.
    shared
        Objects that the receiver has: they are named by their place in this list.
    mapped
        The file from which this process got its arrays; those among them that `value` holds are named by their place in it.

    Raises
    ------
    Exception
        Whatever an object raises that cannot be pickled.
    """
    buffers: list[Any] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if len(view) < _SMALL:
            return True
        buffers.append((mapped and mapped.reference(view)) or view)
        return False

    file = io.BytesIO()
    with sent_by_value():
        _pickler()(file, beside, {id(each): place for place, each in enumerate(shared)}).dump(value)
    return Packed(file.getvalue(), buffers)


def unpacked(sent: Packed, shared: Sequence[Any] = (), original: Callable[[Reference], Any] | None = None) -> Any:
    """Return the object; `original` finds the memory of what was named by its place in the file that was sent first."""
    buffers = [original(each) if original and isinstance(each, Reference) else each for each in sent.buffers]
    unpickler = pickle.Unpickler(io.BytesIO(sent.data), buffers=buffers)  # noqa: S301  (of our own process)
    unpickler.persistent_load = lambda place: shared[place]  # type: ignore[method-assign]
    return unpickler.load()


def write_packed(sent: Packed, file: Path) -> list[tuple[int, int]]:
    """Write everything into one file, and return offset and length of each buffer."""
    places: list[Any] = []
    with file.open("xb") as out:
        out.write(bytes(_HEAD))
        for each in sent.buffers:
            if isinstance(each, Reference):
                places.append(each)
                continue
            out.write(bytes(-out.tell() % _ALIGNMENT))
            places.append((out.tell(), len(each), memoryview(each).readonly))
            out.write(each)
        table = pickle.dumps((sent.data, places))
        start = out.tell()
        out.write(table)
        out.seek(0)
        out.write(start.to_bytes(16, "little") + len(table).to_bytes(16, "little"))
    return [(place.offset, place.length) if isinstance(place, Reference) else place[:2] for place in places]


def read_packed(file: Path) -> Mapped:
    """Return what `write_packed` wrote; the arrays are pages of the file, private once they are written to."""
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    view = memoryview(pages)
    start, length = int.from_bytes(view[:16], "little"), int.from_bytes(view[16:32], "little")
    data, places = pickle.loads(view[start : start + length])  # noqa: S301  (of our own process)
    buffers: list[Any] = []
    for place in places:
        if isinstance(place, Reference):
            buffers.append(place)
        else:
            offset, size, readonly = place
            part = view[offset : offset + size]
            buffers.append(part.toreadonly() if readonly else part)
    return Mapped(Packed(data, buffers), _address(view), len(view))


def finder(places: Sequence[tuple[int, int]], buffers: Sequence[Any]) -> Callable[[Reference], Any]:
    """Return a function that finds the memory behind a place in a file, which these buffers were written to."""
    starts = [offset for offset, _ in places]

    def original(reference: Reference) -> Any:
        which = bisect_right(starts, reference.offset) - 1
        inside = reference.offset - starts[which]
        return memoryview(buffers[which])[inside : inside + reference.length]

    return original


def _address(view: memoryview) -> int:
    """Return where some bytes lie in memory."""
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])


@cache
def _pickler() -> type:
    """Return the class of our pickler; cloudpickle is loaded when something is first sent."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        """Cloudpickle's, with arrays beside the pickle and known objects by their place."""

        def __init__(self, file: Any, beside: Callable[..., bool], known: dict[int, int]) -> None:
            super().__init__(file, protocol=5, buffer_callback=beside)
            self._known = known
            self._storages: dict[int, np.ndarray] = {}

        def persistent_id(self, value: Any) -> int | None:
            return self._known.get(id(value))

        def reducer_override(self, value: Any) -> Any:
            torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
            if isinstance(value, ModuleType) and is_sent_by_value(value):
                # its contents as a state, for they may refer to the module
                return ModuleType, (value.__name__,), contents(value), None, None, fill_module
            if torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter) and _is_dense(torch, value):
                return self._reduced_tensor(torch, value)
            if jax is not None and isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
                is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
                return super().reducer_override(value) if is_key else (jax_array, (np.asarray(value),))
            return super().reducer_override(value)

        def _reduced_tensor(self, torch: Any, value: Any) -> Any:
            device = str(value.device)
            tensor = value.detach().cpu()
            storage = tensor.untyped_storage()
            memory = self._storages.get(storage.data_ptr())
            if memory is None or memory.size != storage.nbytes():  # once for tensors that share their memory
                memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                self._storages[storage.data_ptr()] = memory
            form = (str(tensor.dtype).removeprefix("torch."), tensor.storage_offset(), *map(tuple, _form(tensor)))
            is_parameter = isinstance(value, torch.nn.Parameter)
            return torch_tensor, (memory, form, device, is_parameter, value.requires_grad, vars(value))

    return Pickler


def _is_dense(torch: Any, tensor: Any) -> bool:
    """Return whether a tensor is numbers in memory, at strides."""
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type != "meta"


def _form(tensor: Any) -> tuple[Any, Any]:
    """Return the size and the strides of a tensor."""
    return tensor.size(), tensor.stride()


def torch_tensor(
    memory: np.ndarray,
    form: tuple[Any, ...],
    device: str,
    is_parameter: bool,
    has_gradient: bool,
    attributes: dict[str, Any],
) -> Any:
    """Return a tensor on the memory of its storage, with the strides and attributes that it had."""
    import torch

    dtype, offset, size, stride = form
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only memory: nobody writes into what is shared
        storage = torch.from_numpy(memory).untyped_storage()
    tensor = torch.empty(0, dtype=getattr(torch, dtype)).set_(storage, offset, size, stride).to(device)
    tensor = torch.nn.Parameter(tensor, has_gradient) if is_parameter else tensor.requires_grad_(has_gradient)
    vars(tensor).update(attributes)
    return tensor


def fill_module(module: ModuleType, contents: dict[str, Any]) -> None:
    """Give a module that was sent with its code what it had."""
    vars(module).update(contents)


def jax_array(values: np.ndarray) -> Any:
    """Return values as an array of JAX's default device."""
    import jax

    return jax.device_put(values)
