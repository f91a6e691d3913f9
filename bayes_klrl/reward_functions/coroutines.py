"""Async functions, awaited from code that is not async.

They all run on one event loop in a thread of its own, as in TRL's trainers. So a client that a function keeps between calls
stays usable, because such a client belongs to the loop that it was first used on; and it works inside a running loop, such as
that of a notebook.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Sequence
from typing import Any

__all__ = ["awaited"]

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""The loop of this process, by process id: a forked process has a copy of the loop, but not the thread that runs it."""


def awaited(pending: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return what each of several awaitables gives, or the exception that it raised; they run concurrently.

    `SystemExit`, `KeyboardInterrupt` and `asyncio.CancelledError` are returned like any other exception.

    Examples
    --------
    >>> async def later(value):
    ...     await asyncio.sleep(0)
    ...     return 1 / value
    >>> awaited([later(2), later(0)])
    [0.5, ZeroDivisionError('division by zero')]
    """
    if not pending:
        return []
    loop = _running_loop()
    if _is_inside(loop):  # an async reward that itself asks for rewards: its own loop waits for it
        return _in_another_thread(pending)
    future = asyncio.run_coroutine_threadsafe(_together(pending), loop)
    try:
        return future.result()
    except BaseException:  # an interrupt while we wait
        future.cancel()
        raise


async def _together(pending: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return the results of all, in order; one that fails does not stop the others."""
    return list(await asyncio.gather(*map(_outcome, pending)))


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    """Return what an awaitable gives, or what it raised: a `SystemExit` that left its task would stop the loop."""
    try:
        return await awaitable
    except BaseException as error:  # whatever a user's function raises
        return error


def _in_another_thread(pending: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return the outcomes of all from a loop of their own."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.extend(asyncio.run(_together(pending)))
        except BaseException as error:  # of a task that a user's function made: it stops this loop
            results.extend([error] * len(pending))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped. A task that a user's function made may raise `SystemExit` through it: it goes on."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):  # who awaits the task gets it, too
            continue
        break


def _running_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process, started at the first call."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            thread = threading.Thread(target=_run, args=(loop,), name="bayes_klrl-async-rewards", daemon=True)
            thread.start()
            atexit.register(_stop, loop, thread, os.getpid())
        return loop


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, process: int) -> None:
    """Stop the loop of a process when the process ends."""
    if os.getpid() == process:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=1)


def _is_inside(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether this code runs on the loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
