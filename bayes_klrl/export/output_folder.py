"""Folders of results: the package marks its own, and writes into no other that holds something; names of what is saved."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from bayes_klrl.errors import BayesKLRLError

__all__ = ["check_group_name", "check_output", "prepare_output"]

_MARK = ".bayes-klrl"
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
    """Return the path if we may write there: it does not exist, is empty, or was written by this package.

    Raises
    ------
    BayesKLRLError
        If it is a file, or a folder that holds something and was not written by this package.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise BayesKLRLError(f"The output folder {str(path)!r} is a file. Choose another with --out.")
    if path.is_dir() and any(path.iterdir()) and not (path / _MARK).exists():
        raise BayesKLRLError(
            f"The output folder {str(path)!r} exists and was not written by bayes-klrl; nothing was overwritten. Choose "
            "another with --out, or empty it."
        )
    return path


def prepare_output(folder: str | Path) -> Path:
    """Create and mark the folder, and delete results of an earlier run in it; refuses the same folders as `check_output`."""
    path = check_output(folder)
    path.mkdir(parents=True, exist_ok=True)
    for pattern in _OURS:
        for old in path.glob(pattern):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    (path / _MARK).write_text("Written by bayes-klrl; files in here may be overwritten by it.\n", encoding="utf-8")
    return path
