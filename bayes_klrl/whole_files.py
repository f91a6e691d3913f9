"""Files and folders that are written whole or not at all: all that the package writes goes through here.

A file is written beside its place under another name, pushed to the disk, and then renamed, which a file system does in one
step. Who reads sees the file of before or the new one, also after a full disk, a kill or a loss of power. A new folder is
written and renamed in the same way. Into a folder that is there, with files of others in it, the new files are moved one by
one; the file without which it is no model's folder (`last`) goes first and comes last, so that a half one is refused by name.

What a kill leaves beside is called `.unfinished-...`, and may be deleted.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bayes_klrl.errors import BayesKLRLError, OutputError

__all__ = ["UNFINISHED", "check_folder", "named_path", "whole_file", "whole_folder", "write_whole"]

UNFINISHED = ".unfinished-"
"""How the names of files and folders begin that are not yet written whole."""

_MARKS = ("config.json", "adapter_config.json")
_MOST_TRIES = 20
_SYSTEM_ERROR = re.compile(r"\b(?:os error |errno = |Errno )(\d+)")  # Rust's libraries, HDF5, and Python
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FULL_CURE = "Free some space, or save to another disk."
_OTHER_CURE = "Choose a place that is there and that you may write to."


def named_path(path: str | os.PathLike[str]) -> Path:
    """Return the path to write to, if it can be one: a text or a path that is not empty and that the system can name.

    Raises
    ------
    OutputError
        If it is not.

    Examples
    --------
    >>> named_path("draws.nc").name
    'draws.nc'
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise OutputError(f"The place to write to must be a text or a pathlib.Path; got {path!r}.")
    text = os.fspath(path)
    if not text.strip():
        raise OutputError("The name of the file or folder to write is empty. Give it a name.", Path(path))
    try:
        is_name = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise OutputError(
            f"{text!r} cannot be written: no name of a file has a NUL or a lone surrogate in it. Choose another name."
        )
    return Path(path)


def write_whole(file: str | Path, content: bytes | str) -> Path:
    """Write a file with this content, text as UTF-8, whole or not at all, and return its path.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    with whole_file(file) as unfinished:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(file)


@contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """Yield the path to write to, with the same endings; afterwards the file is put into its place.

    Nothing is put there if the block raises. A file that was there keeps its permissions; a link still leads where it led; a
    device or a pipe, such as /dev/stdout, is written to directly.

    Raises
    ------
    OutputError
        If the block, or the library that writes in it, meets an error of the system, such as a full disk.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with whole_file(f"{folder}/numbers.csv") as unfinished:
    ...         _ = unfinished.write_text("1, 2, 3")
    ...     Path(f"{folder}/numbers.csv").read_text()
    '1, 2, 3'
    """
    place = Path(os.path.realpath(named_path(file)))
    with _output_errors(Path(file)):
        if place.exists() and not place.is_dir() and not place.is_file():
            yield place
            return
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unfinished = place.with_name(_new_name(place))
        try:
            yield unfinished
            _push(unfinished)
            if place.exists():
                shutil.copymode(place, unfinished)
            unfinished.replace(place)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _push_names(place.parent)


@contextmanager
def whole_folder(folder: str | Path, *, last: Collection[str] = _MARKS, replaces: str | None = None) -> Iterator[Path]:
    """Yield an empty folder to write into; afterwards its files are put into `folder`, which is made if it is not there.

    Parameters
    ----------
    folder
        The folder. What it holds under other names stays.
    last
        Names of files without which the folder is not read. If the folder is there already, they are removed before the first
        new file comes and are put back last.
    replaces
        Pattern of files of before that go, whatever the new ones are called; None: only those of the same names.

    Raises
    ------
    OutputError
        If the block, or the library that writes in it, meets an error of the system, such as a full disk.
    """
    place = Path(os.path.realpath(named_path(folder)))
    with _output_errors(Path(folder)):
        there = place.exists()
        if there and not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = (place if there else place.parent) / _new_name(place)  # inside: on the same disk for certain
        unfinished.mkdir()
        try:
            yield unfinished
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            for file in files:
                _push(file)
            if there:
                _merge(unfinished, files, place, last, replaces)
            else:
                unfinished.rename(place)
                _push_names(place.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be made or written into, by doing both; nothing is left of it.

    Raises
    ------
    OutputError
        If it cannot be made, or cannot be a path; see `named_path`.
    """
    path = named_path(folder)
    new = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    with _output_errors(path):
        try:
            for tries_left in reversed(range(_MOST_TRIES)):
                probe = path / _new_name(path)
                try:
                    path.mkdir(parents=True, exist_ok=True)
                    probe.touch()
                except FileNotFoundError:  # another process has checked it too, and left nothing
                    if not tries_left:
                        raise
                    continue
                probe.unlink()
                break
        finally:
            for each in new:
                with suppress(OSError):  # not made, or somebody has put something into it since
                    each.rmdir()


def _merge(unfinished: Path, files: list[Path], place: Path, last: Collection[str], replaces: str | None) -> None:
    """Move files into a folder that is there, marks first out and last in."""
    names = [file.relative_to(unfinished) for file in files]
    marks = [name for name in names if str(name) in last]
    old = [place / name for name in marks] + ([] if replaces is None else sorted(place.glob(replaces)))
    for path in old:
        path.unlink(missing_ok=True)
    for name in [*(name for name in names if name not in marks), *marks]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).replace(place / name)
    _push_names(place)


def _new_name(place: Path) -> str:
    """Return a name for what is not whole yet: short, and with the endings of the place, since libraries go by them."""
    return f"{UNFINISHED}{secrets.token_hex(4)}{''.join(place.suffixes[-2:])}"


def _push(file: Path) -> None:
    """Return when the content of a file is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _push_names(folder: Path) -> None:
    """Return when the names in a folder are on the disk, where the system knows how."""
    with suppress(OSError):  # Windows opens no folders, and some file systems push none
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system into one that names the path; libraries in Rust and C give its number in their text."""
    try:
        yield
    except BayesKLRLError:
        raise
    except Exception as error:
        found = _SYSTEM_ERROR.search(str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if number is None:
            raise
        raise OutputError(
            f"{str(path)!r} cannot be written: {os.strerror(number)}. No half file was left. "
            f"{_FULL_CURE if number in _FULL else _OTHER_CURE}",
            path,
        ) from error
