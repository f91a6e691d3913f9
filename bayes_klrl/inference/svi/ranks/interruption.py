"""Ctrl-C among ranks: the step that runs is finished, and all ranks end their training after the same one.

A terminal sends its interrupt to all processes, each of which would stop somewhere else in a step and leave the others
waiting. So an interrupt is noted while ranks train together, and asked about after each step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from bayes_klrl.inference.svi.ranks.group import Ranks

__all__ = ["Interruption"]


class Interruption:
    """A context in which an interrupt of one rank becomes a `KeyboardInterrupt` of all, after a step.

    In a group of one, and in a thread that is not the main one, nothing is changed.

    Parameters
    ----------
    ranks
        The group.

    Examples
    --------
    >>> from bayes_klrl.inference.svi.ranks.group import ALONE
    >>> with Interruption(ALONE) as interruption:
    ...     interruption.check()
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.asked = ranks, False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if self._ranks.size > 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def check(self) -> None:
        """Raise `KeyboardInterrupt` on all ranks if one of them was interrupted."""
        if self._ranks.size > 1 and self._ranks.any(self.asked):
            raise KeyboardInterrupt
