"""A damaged file of draws is refused by name before HDF5 reads it, and other programs read a whole one as ever."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

import bayes_klrl as bk
from bayes_klrl.draws import Draws
from bayes_klrl.export import sealed_files
from bayes_klrl.export.datatree import comparison_to_datatree, draws_to_datatree
from bayes_klrl.export.sealed_files import check_sealed, write_sealed
from tests.export.test_datatree import POSTERIOR, assert_same

DRAWS = bk.SMC(64).run(POSTERIOR, seed=0)
END = 19 + 9 + 64 + 1  # "\nbayes_klrl.sealed/1", " sha256 ", the digits, "\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return DRAWS.save(tmp_path_factory.mktemp("whole") / "draws.nc").read_bytes()


@pytest.fixture
def file(whole: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "draws.nc"
    path.write_bytes(whole)
    return path


def damages(whole: bytes, num: int) -> Iterator[tuple[str, bytes]]:
    """Damaged copies by what was done: cut, bits flipped, a range zeroed, two blocks swapped, bytes appended."""
    rng = np.random.default_rng(12)
    for number in range(num):
        content, kind = bytearray(whole), ("cut", "flipped", "zeroed", "swapped", "appended")[number % 5]
        start, length = int(rng.integers(0, len(whole) - 600)), int(rng.integers(1, 512))
        if kind == "cut":
            del content[start + length :]
        elif kind == "flipped":
            for place in rng.integers(0, len(whole), int(rng.integers(1, 5))):
                content[place] ^= 1 << int(rng.integers(8))
        elif kind == "zeroed":
            content[start : start + length] = bytes(length)
        elif kind == "swapped":
            block = 512
            one, other = (int(i) * block for i in rng.choice(len(whole) // block, 2, replace=False))
            content[one : one + block], content[other : other + block] = (
                content[other : other + block],
                content[one : one + block],
            )
        else:
            content += rng.bytes(length)
        yield f"{kind} {number}", bytes(content)


def test_a_damaged_file_is_refused_or_has_the_same_numbers(
    whole: bytes, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 of them. None is given to HDF5 in this process, where some hang for ever and some crash it."""
    monkeypatch.setattr(xr, "open_datatree", lambda *_, **__: pytest.fail("HDF5 was asked"))
    changed = [(what, content) for what, content in damages(whole, 200) if content != whole]
    assert len(changed) > 150  # zeros may be written where zeros are
    for what, content in changed:
        file.write_bytes(content)
        start = time.process_time()
        with pytest.raises(bk.CheckpointError, match=r"draws\.nc"):
            Draws.load(file)
        assert time.process_time() - start < 1, what


def test_zeros_in_the_middle_are_refused_at_once(file: Path) -> None:
    """HDF5 looks for the end of some of these files for ever."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(100)
    file.write_bytes(content)
    start = time.process_time()
    with pytest.raises(bk.CheckpointError, match=r"draws\.nc' is damaged: its checksum"):
        Draws.load(file)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("change", ["cut", "appended", "written anew"])
def test_a_file_that_has_lost_its_checksum_is_refused(change: str, whole: bytes, file: Path) -> None:
    if change == "cut":
        file.write_bytes(whole[:-END])
    elif change == "appended":
        file.write_bytes(whole + b"\n")
    else:
        tree = draws_to_datatree(DRAWS)
        with xr.open_datatree(file, engine="h5netcdf") as opened:
            tree.attrs = opened.attrs
        tree.to_netcdf(file, engine="h5netcdf")
    with pytest.raises(bk.CheckpointError, match=r"draws\.nc' is damaged: the checksum .* is missing"):
        Draws.load(file)


def test_the_last_line_is_the_checksum(whole: bytes) -> None:
    """As `sha256sum` would find it."""
    line = whole[-END + 1 :].decode().split()
    assert line == ["bayes_klrl.sealed/1", "sha256", hashlib.sha256(whole[:-END]).hexdigest()]


def test_other_programs_read_a_sealed_file(file: Path) -> None:
    for engine in ("h5netcdf", None):
        with xr.open_datatree(file, engine=engine) as tree:
            np.testing.assert_array_equal(tree["weighted/log_weights"], DRAWS.log_weights)
            assert "sealed" in tree.attrs
    with h5py.File(file) as opened:
        np.testing.assert_array_equal(opened["weighted/tokens"], DRAWS.tokens)


def test_the_tree_that_is_written_does_not_change(tmp_path: Path) -> None:
    tree = comparison_to_datatree({"SMC": DRAWS})
    before = dict(tree.attrs)
    write_sealed(tree, tmp_path / "draws.nc")
    assert tree.attrs == before
    assert check_sealed(tmp_path / "draws.nc")
    with pytest.raises(bk.CheckpointError, match=r"a comparison of \['SMC'\]"):
        Draws.load(tmp_path / "draws.nc")


def unsealed(file: Path) -> Path:
    """A file as earlier versions wrote it."""
    draws_to_datatree(DRAWS).to_netcdf(file, engine="h5netcdf")
    return file


@pytest.mark.slow
def test_files_of_earlier_versions_are_read_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"old\.nc' has no checksum"):
        loaded = Draws.load(unsealed(tmp_path / "old.nc"))
    assert_same(loaded, DRAWS)


@pytest.mark.slow
def test_an_old_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    file = unsealed(tmp_path / "old.nc")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(bk.CheckpointError, match=r"old\.nc' cannot be read to its end"):
        Draws.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, message",
    [("while True: pass", "not read to its end in 2 seconds"), ("import os; os.abort()", "reading it crashes")],
)
def test_an_old_file_that_hangs_or_crashes_is_refused(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed_files, "_READ", code)
    monkeypatch.setattr(sealed_files, "_PATIENCE", 2.0)
    with pytest.raises(bk.CheckpointError, match=message):
        Draws.load(unsealed(tmp_path / "old.nc"))
