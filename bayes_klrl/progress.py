"""Progress of long computations: one live display, however deep the calls are nested.

Where one can see it decides what it looks like, as the library `rich` finds out: moving bars in a terminal, bars in the output
of a notebook's cell, and in a log or another stream that is no terminal a plain line now and then, without control characters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Advance", "progress_display", "track"]

Advance = Callable[..., None]

_SECONDS_BETWEEN_LINES = 30.0  # in a log
_SECONDS_OF_SHORT_WORK = 2.0  # which a log does not mention
_SECONDS_BETWEEN_FRAMES = 0.2  # in a notebook
_MOST_FINISHED = 8  # bars of a notebook, beside the first and those that move


class _Display(Protocol):
    """What shows the lines of `track`: of a rich `Progress` the part that is used here."""

    def add_task(self, description: str, *, total: int, status: str) -> Any: ...

    def update(self, task_id: Any, *, advance: float = ..., completed: float = ..., status: str = ...) -> None: ...


_display: ContextVar[_Display | None] = ContextVar("bayes_klrl_progress", default=None)


@contextmanager
def progress_display(enabled: bool) -> Iterator[None]:
    """Open a display on standard error or in the notebook, into which every `track` inside draws its line."""
    if not enabled or _display.get() is not None:
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    with _bars(console) if _can_move(console) else _plain(console) as display:
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


def _can_move(console: Console) -> bool:
    """Return whether lines can be drawn over; a variable such as FORCE_COLOR makes no terminal of a log."""
    return console.is_interactive and not console.is_jupyter and console.file.isatty()


@contextmanager
def _bars(console: Console) -> Iterator[_Display]:
    """Give the moving bars of a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=console) as display:
        yield display


@contextmanager
def _plain(console: Console) -> Iterator[_Display]:
    """Give the display of a notebook, or that of a log."""
    display = _Notebook() if console.is_jupyter else _Log(console)
    try:
        yield display
    finally:
        display.close()


@dataclass(eq=False)
class _Task:
    """One line: how far the work is."""

    description: str
    total: int
    status: str
    started: float
    completed: float = 0.0
    shown: float = 0.0
    """When a line of it was last printed; unused in a notebook."""

    def __str__(self) -> str:
        text = f"{self.description}: {self.completed:.0f}/{self.total}, {time.monotonic() - self.started:.0f} s"
        return f"{text}, {self.status}" if self.status else text

    def move(self, advance: float, completed: float | None, status: str | None) -> None:
        """Move by some steps, or to a step."""
        self.completed = self.completed + advance if completed is None else completed
        self.status = self.status if status is None else status


class _Log:
    """Plain lines: one every half minute, and one for each piece of work that is done, but for short parts of others."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._outermost: _Task | None = None

    def add_task(self, description: str, *, total: int, status: str) -> _Task:
        """Begin a piece of work."""
        now = time.monotonic()
        task = _Task(description, total, status, started=now, shown=now)
        self._outermost = self._outermost or task
        return task

    def update(
        self, task_id: _Task, *, advance: float = 0, completed: float | None = None, status: str | None = None
    ) -> None:
        """Move a piece of work, and print it if it is time."""
        task_id.move(advance, completed, status)
        now = time.monotonic()
        is_worth_it = task_id is self._outermost or now - task_id.started >= _SECONDS_OF_SHORT_WORK
        if now - task_id.shown >= _SECONDS_BETWEEN_LINES or (completed is not None and is_worth_it):
            task_id.shown = now
            self._console.print(str(task_id), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is left open."""


class _Notebook:
    """Bars in one output of the cell, which is replaced as they move; it needs IPython alone and no widgets."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._tasks: list[_Task] = []
        self._shown = time.monotonic()
        self._html = HTML
        self._handle = display(HTML(""), display_id=True)

    def add_task(self, description: str, *, total: int, status: str) -> _Task:
        """Add a bar."""
        self._tasks.append(_Task(description, total, status, started=time.monotonic()))
        self._show()
        return self._tasks[-1]

    def update(
        self, task_id: _Task, *, advance: float = 0, completed: float | None = None, status: str | None = None
    ) -> None:
        """Move a bar, and show all of them if it is time."""
        task_id.move(advance, completed, status)
        if completed is not None or time.monotonic() - self._shown >= _SECONDS_BETWEEN_FRAMES:
            self._show()

    def close(self) -> None:
        """Show where the work ended, also if it was interrupted."""
        self._show()

    def _show(self) -> None:
        """Replace the output; the browser draws the bars in the colours of the theme."""
        self._shown = time.monotonic()
        finished = [task for task in self._tasks if task.completed >= task.total]
        hidden = [task for task in finished[:-_MOST_FINISHED] if task is not self._tasks[0]]
        bars = (
            f'<progress value="{task.completed:.0f}" max="{task.total}"></progress> {escape(str(task))}'
            for task in self._tasks
            if task not in hidden
        )
        if self._handle is not None:
            self._handle.update(self._html(f"<div>{'<br>'.join(bars)}</div>"))
