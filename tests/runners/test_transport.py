"""What is sent comes back as it was: numbers, strides, ties and identity, with large arrays as shared pages, not as copies."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from bayes_klrl.runners.by_value import unfindable
from bayes_klrl.runners.transport import Packed, Reference, finder, packed, read_packed, unpacked, write_packed


def there(value: object, folder: Path) -> object:
    """An object as another process gets it."""
    write_packed(packed(value), folder / "file")
    return unpacked(read_packed(folder / "file").packed)


def test_large_arrays_lie_beside_the_pickle_and_small_ones_in_it() -> None:
    sent = packed({"large": np.arange(10_000.0), "small": np.arange(10.0)})
    assert [len(each) for each in sent.buffers] == [80_000]
    assert len(sent.data) < 1000


def test_arrays_come_as_pages_of_the_file_whose_changes_stay_private(tmp_path: Path) -> None:
    first = there(np.arange(10_000.0), tmp_path)
    assert isinstance(first, np.ndarray)
    assert np.array_equal(first, np.arange(10_000.0))
    assert str(tmp_path / "file") in Path("/proc/self/maps").read_text()
    first[:] = -1.0
    second = unpacked(read_packed(tmp_path / "file").packed)
    assert second[3] == 3.0


def test_what_may_not_be_written_to_may_not_be_there_either(tmp_path: Path) -> None:
    array = np.arange(10_000.0)
    array.flags.writeable = False
    sent = there([array, np.arange(10_000)], tmp_path)
    assert [each.flags.writeable for each in sent] == [False, True]  # type: ignore[attr-defined]


def test_what_the_receiver_has_comes_back_as_itself(tmp_path: Path) -> None:
    """An object by its place in a list, an array by its place in the file, a part of an array too."""
    model, own = object(), np.arange(10_000.0)
    sent = packed([own])
    places = write_packed(sent, tmp_path / "file")
    mapped = read_packed(tmp_path / "file")
    (theirs,) = unpacked(mapped.packed)
    reply = packed({"model": model, "all": theirs, "part": theirs[1000:9000]}, [model], mapped)
    assert [type(each) for each in reply.buffers] == [Reference, Reference]
    back = unpacked(Packed(reply.data, reply.buffers), [model], finder(places, sent.buffers))
    assert back["model"] is model
    assert np.shares_memory(back["all"], own)
    assert np.array_equal(back["part"], own[1000:9000])
    assert np.shares_memory(back["part"], own)


def test_tensors_keep_strides_ties_and_attributes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.randn(100, 100)
    tied = torch.nn.Parameter(base, requires_grad=False)
    tied.mark = "kept"
    half = torch.randn(3000).to(torch.bfloat16)
    turned, *rest = there([base.t(), base[10:20], tied, tied, half, torch.tensor(3)], tmp_path)  # type: ignore[misc]
    part, first, second, low, scalar = rest
    assert turned.stride() == (1, 100)
    assert torch.equal(turned, base.t())
    assert torch.equal(part, base[10:20])
    assert first is second
    assert (first.mark, first.requires_grad, type(first)) == ("kept", False, torch.nn.Parameter)
    assert first.data_ptr() == turned.data_ptr()  # one storage
    assert torch.equal(low, half)
    assert scalar.item() == 3


def test_functions_of_this_module_and_lambdas_are_sent_with_their_code(tmp_path: Path) -> None:
    offset = 3
    assert there(lambda x: x + offset, tmp_path)(4) == 7  # type: ignore[operator]
    names = {module.__name__.partition(".")[0] for module in unfindable()}
    assert not names & {"numpy", "bayes_klrl", "pytest", "importlib", "google"}


MODULES = {
    "klrl_one.py": "import klrl_two, klrl_space.inner\nfrom klrl_whole import deep\n"
    "def f(x): return klrl_two.g(x) + deep.h.i(x) + klrl_space.inner.j(x)",
    "klrl_two.py": "import klrl_one, re\nbase = 40\n"
    "def g(x): return base + x + klrl_one.klrl_two.zero()\ndef zero(): return 0",
    "klrl_whole/__init__.py": "",
    "klrl_whole/deep/__init__.py": "from . import h",
    "klrl_whole/deep/h.py": "from .. import deep\ndef i(x): return 100 * x if deep.h else 0",
    "klrl_space/inner.py": "def j(x): return 1000 * x",
}


def test_modules_that_no_import_would_find_are_sent_with_all_that_they_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beside a posterior file: imported whole, each by the other, in packages with and without __init__.py."""
    for name, code in MODULES.items():
        (tmp_path / "beside" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "beside" / name).write_text(code + "\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "beside")
        one = importlib.import_module("klrl_one")
    own = {name: module for name, module in sys.modules.items() if name.startswith("klrl_")}
    try:
        sent = packed((one, lambda x: one.f(x) + 1))
        for name in own:
            del sys.modules[name]
        module, function = unpacked(sent)
    finally:
        for name in own:
            sys.modules.pop(name, None)
    assert one.f(2) == 40 + 2 + 200 + 2000
    assert module.f(2) == one.f(2) == function(2) - 1
    assert module.klrl_two.klrl_one is module
    assert module is not one


def test_arrays_of_jax_come_as_arrays_of_jax(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    large, small = jax.numpy.arange(5000, dtype=jax.numpy.bfloat16), jax.numpy.float32(3)
    sent = there({"large": large, "small": small}, tmp_path)
    assert isinstance(sent, dict)
    assert isinstance(sent["large"], jax.Array)
    assert sent["large"].dtype == large.dtype
    assert bool((sent["large"] == large).all())
    assert float(sent["small"]) == 3.0
