"""What an example needs beside the package itself, asked for before any long work."""

from __future__ import annotations

from importlib.util import find_spec

from bayes_klrl.errors import MissingPackageError

__all__ = ["need"]


def need(*names: str) -> None:
    """Refuse to begin if one of these packages of the extra `gallery` is not installed.

    Examples
    --------
    >>> need("numpy")
    >>> need("no_such_package")
    Traceback (most recent call last):
    bayes_klrl.errors.MissingPackageError: This example needs the package no_such_package: pip install 'bayes_klrl[gallery]'
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingPackageError("This example", name, "gallery")
