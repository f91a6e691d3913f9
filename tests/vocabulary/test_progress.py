"""Progress in a terminal, in a notebook and in a log."""

import io
import sys
import types
from typing import Any

import pytest

from bayes_klrl import progress
from bayes_klrl.progress import progress_display, track


class Stream(io.StringIO):
    """Standard error, as a terminal or as a file."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


class Handle:
    """What IPython's `display(..., display_id=True)` returns."""

    def __init__(self) -> None:
        self.frames: list[str] = []

    def update(self, shown: str) -> None:
        self.frames.append(shown)


class ZMQInteractiveShell:
    """The class that is asked for by its name to find out about a kernel."""


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """A notebook, as rich and IPython present it."""
    found = Handle()
    module: Any = types.ModuleType("IPython.display")
    module.HTML = str

    def display(shown: str, display_id: bool) -> Handle:
        assert display_id
        return found

    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    return found


def work(steps: int = 500) -> None:
    """A piece of work with a short part, inside a display."""
    with progress_display(True), track("all methods", steps, True) as advance:
        for _ in range(steps):
            advance(status="ELBO <1.2>")
        with track("a part", 3, True) as part:
            part(3)


def stream(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> Stream:
    found = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", found)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return found


def test_a_terminal_gets_moving_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stream(monkeypatch, is_terminal=True)
    work()
    assert "\x1b[" in found.getvalue()
    assert "500/500" in found.getvalue()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", None])
def test_a_log_gets_a_line_and_no_control_characters(monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    found = stream(monkeypatch, is_terminal=False)
    if variable is not None:  # as hosted CI sets them, whose output is a file nevertheless
        monkeypatch.setenv(variable, "1")
    work()
    printed = found.getvalue()
    assert not {"\r", "\x1b"} & set(printed)
    assert printed.splitlines() == ["all methods: 500/500, 0 s, ELBO <1.2>"]


def test_a_log_of_long_work_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stream(monkeypatch, is_terminal=False)
    now = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    work(steps=200)
    lines = found.getvalue().splitlines()
    assert 3 <= len(lines) <= 2 * 200 / 30 + 2
    assert lines[-1].startswith("all methods: 200/200")
    assert any(line.startswith("a part: 3/3") for line in lines)


def test_a_notebook_gets_bars_in_one_output_without_widgets(monkeypatch: pytest.MonkeyPatch, handle: Handle) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    found = stream(monkeypatch, is_terminal=False)
    work()
    assert not found.getvalue()
    assert len(handle.frames) < 20
    assert handle.frames[-1].count("<progress") == 2
    assert '<progress value="500" max="500"></progress> all methods: 500/500' in handle.frames[-1]
    assert "ELBO &lt;1.2&gt;" in handle.frames[-1]


def test_a_notebook_shows_what_moves_and_little_of_what_is_done(handle: Handle) -> None:
    with progress_display(True), track("all", 60, True):
        for number in range(50):
            with track(f"part {number}", 1, True):
                pass
    assert handle.frames[-1].count("<progress") == 9
    assert "all: " in handle.frames[-2]


def test_what_is_not_asked_for_is_not_shown(monkeypatch: pytest.MonkeyPatch, handle: Handle) -> None:
    found = stream(monkeypatch, is_terminal=False)
    with track("quiet", 3, False) as advance:
        advance(3)
    assert not found.getvalue()
    assert not handle.frames
