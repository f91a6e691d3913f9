"""Folders of results: the package marks its own, and writes into no other that holds something; names of what is saved."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayes_klrl.errors import BayesKLRLError, OutputError
from bayes_klrl.whole_files import UNFINISHED, check_folder, named_path, write_whole

__all__ = [
    "check_group_name",
    "check_output",
    "command_line",
    "command_of",
    "naming_what_is_safe",
    "prepare_output",
]

_MARK = ".bayes-klrl"
_COMMAND = "Command: "
_OURS = (
    "training",
    "draws.nc",
    "table.csv",
    "comparison.png",
    "amortisation.png",
    "prompts.csv",
    "training*.png",
    "policy",
    "policy-[0-9]*",
    "certificate*.txt",
    "certificate*.csv",
    "certificate*.png",
    "frontier.csv",
    "frontier.png",
    "suite.png",
    "report*.html",
    f"{UNFINISHED}*",
)

_NO_GROUP = re.compile(
    r"|\.{1,2}|.*[/\x00\ud800-\udfff].*", re.DOTALL
)  # paths have "/", ".", ".."; HDF5 names end at NUL


def check_group_name(name: object) -> None:
    """Refuse a method's name that cannot be the name of a group in a file of draws."""
    if not isinstance(name, str) or _NO_GROUP.fullmatch(name):
        raise BayesKLRLError(
            f"A method's name becomes the name of a group in draws.nc, and {name!r} cannot be one: it must be a text that is "
            "not empty, not '.' or '..', and has no '/', no NUL and no lone surrogate in it. Rename the method."
        )


def check_output(folder: str | Path) -> Path:
    """Return the path if we can and may write there: it can be made, is empty, or was written by this package.

    Raises
    ------
    BayesKLRLError
        If it is a file, or a folder that holds something and was not written by this package.
    OutputError
        If it cannot be made or written into, or its name is empty.
    """
    path = named_path(folder)
    if path.exists() and not path.is_dir():
        raise BayesKLRLError(f"The output folder {str(path)!r} is a file. Choose another with --out.")
    if path.is_dir() and any(path.iterdir()) and not (path / _MARK).exists():
        raise BayesKLRLError(
            f"The output folder {str(path)!r} exists and was not written by bayes-klrl; nothing was overwritten. Choose "
            "another with --out, or empty it."
        )
    check_folder(folder)
    return path


def prepare_output(folder: str | Path) -> Path:
    """Create and mark the folder, and delete results of an earlier run in it; refuses the same folders as `check_output`."""
    path = check_output(folder)
    path.mkdir(parents=True, exist_ok=True)  # it could be made a moment ago
    for pattern in _OURS:
        for old in path.glob(pattern):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_whole(
        path / _MARK, f"Written by bayes-klrl; files in here may be overwritten by it.\n{_COMMAND}{command_line()}\n"
    )
    return path


def command_line() -> str:
    """Return the command line of this process, as it is typed into a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else ""


def command_of(folder: Path) -> str:
    """Return the command that wrote a folder; "" if it is not known."""
    mark = folder / _MARK
    lines = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    return next((line.removeprefix(_COMMAND) for line in lines if line.startswith(_COMMAND)), "")


@contextmanager
def naming_what_is_safe(folder: Path) -> Iterator[None]:
    """Add to an `OutputError` of the block the names of the results in the folder that were written whole before it.

    They are those of this run, since `prepare_output` has deleted others.
    """
    try:
        yield
    except OutputError as error:
        written = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        safe = f"Written whole before it: {', '.join(written)}" if written else "No result was written before it"
        raise OutputError(f"{error} {safe}.", error.file, written) from error.__cause__
