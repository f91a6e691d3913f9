"""Turns of threads: Pyro and NumPyro keep one stack of effect handlers for the whole process.

A program of one thread that runs while another thread's handlers are on the stack is seen by those, so that plates, traces and
random states get mixed up. Whoever runs a program here holds the backend's turn while it does. A turn may be taken again by
the thread that has it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["NUMPYRO_TURN", "PYRO_TURN", "in_turn"]

PYRO_TURN = threading.RLock()
NUMPYRO_TURN = threading.RLock()

Given = ParamSpec("Given")
Result = TypeVar("Result")


def in_turn(turn: threading.RLock) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Return a decorator of functions that run programs: they wait for the turn, and hold it until they return."""

    def decorator(function: Callable[Given, Result]) -> Callable[Given, Result]:
        @wraps(function)
        def waiting(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            with turn:
                return function(*args, **kwargs)

        return waiting

    return decorator
