"""Progress of long computations: one live display, however deep the calls are nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Advance", "progress_display", "track"]

Advance = Callable[..., None]

_display: ContextVar[Progress | None] = ContextVar("bayes_klrl_progress", default=None)


@contextmanager
def progress_display(enabled: bool) -> Iterator[None]:
    """Open a live display on standard error, into which every `track` inside draws its line."""
    if not enabled or _display.get() is not None:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


@contextmanager
def track(description: str, total: int, enabled: bool) -> Iterator[Advance]:
    """Give a function `advance(steps=1, status="")` that moves one line of the display.

    Parameters
    ----------
    description
        Text in front of the line, which says what is being done.
    total
        Number of steps until the work is done.
    enabled
        Whether to show the line. False: `advance` does nothing.
    """
    with progress_display(enabled):
        display = _display.get()
        if not enabled or display is None:
            yield lambda steps=1, status="": None
            return
        task = display.add_task(description, total=total, status="")
        yield lambda steps=1, status="": display.update(task, advance=steps, status=status)
        display.update(task, completed=total)
