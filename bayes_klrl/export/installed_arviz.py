"""The installed ArviZ, imported where it is first needed: its import takes seconds."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["installed_arviz"]


def installed_arviz() -> Any:
    """Return the module `arviz`, of whichever version is installed, without its notice about the next version.

    ArviZ 0.23 writes a file at its first import of a day. Of two processes that do this at once, one fails; it is tried again.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\nArviZ is undergoing a major refactor", FutureWarning)
        try:
            import arviz
        except FileNotFoundError:
            import arviz
    return arviz
