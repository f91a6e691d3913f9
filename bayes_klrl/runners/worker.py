"""What happens in a worker: it loads all tasks of a run once, calls those that it is asked for, and sends back the results."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayes_klrl.errors import BayesKLRLError, RunnerError
from bayes_klrl.runners.runner import Task
from bayes_klrl.runners.transport import Mapped, Packed, Reference, packed, read_packed, unpacked, write_packed

__all__ = ["Load", "Reply", "Settings", "answer", "begin", "loaded", "work"]

_MOST_IN_A_PIPE = 2048
"""Bytes of a reply that go through the pipe; others go through a file. So few are written at once or not at all: of a larger
reply a worker that is killed leaves a half, and the parent would wait for the other half for ever."""

_loads: dict[str, tuple[Load, Mapped | None]] = {}  # the run that this worker is at, by the name of its file
_folders: list[Path] = []  # where the files of that run are


@dataclass(frozen=True)
class Settings:
    """What of the parent's state numbers depend on.

    Parameters
    ----------
    num_threads
        torch's threads in the worker; None: as torch finds them.
    default_dtype
        The name of torch's default precision; None: it has none, for torch is not loaded.
    jax_enable_x64
        Whether JAX computes in float64; None: JAX is not loaded.
    """

    num_threads: int | None = None
    default_dtype: str | None = None
    jax_enable_x64: bool | None = None

    @classmethod
    def of_this_process(cls, num_threads: int | None) -> Settings:
        """Return what holds here; `num_threads` stands for torch's own number if it is not None."""
        torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
        return cls(
            num_threads if num_threads is not None or torch is None else torch.get_num_threads(),
            None if torch is None else str(torch.get_default_dtype()).removeprefix("torch."),
            None if jax is None else bool(jax.config.jax_enable_x64),
        )

    def apply(self) -> None:
        """Make it hold here, as far as the libraries are loaded."""
        torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
        if torch is not None and self.num_threads is not None and torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)
        if torch is not None and self.default_dtype is not None:
            torch.set_default_dtype(getattr(torch, self.default_dtype))
        if jax is not None and self.jax_enable_x64 is not None:
            jax.config.update("jax_enable_x64", self.jax_enable_x64)


@dataclass(frozen=True, eq=False)
class Load:
    """All that a run needs: its tasks, and the objects that come back as what they are."""

    tasks: Sequence[Task]
    shared: Sequence[Any]


@dataclass(frozen=True, eq=False)
class Reply:
    """What a task returned or raised, with the warnings that were given, packed; or the file in which that lies."""

    sent: Packed | Path
    failed: bool = False


def begin(folder: Path) -> None:
    """Prepare a worker process: Ctrl-C is for the parent, and neither a worker nor a folder of files outlives it."""
    _folders.append(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            for each in _folders:  # a parent that was killed could not remove it
                shutil.rmtree(each, ignore_errors=True)
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def work(file: Path, index: int, settings: Settings) -> Reply:
    """Return the reply to one task of the run in a file."""
    if str(file) not in _loads:
        _loads.clear()  # the run before is over
        _folders[:] = [file.parent]
        try:
            mapped = read_packed(file)
            _loads[str(file)] = (loaded(mapped.packed, settings), mapped)
        except RunnerError as error:
            return Reply(packed((error, [])), failed=True)
    load, mapped_file = _loads[str(file)]
    reply = answer(load, index, mapped_file)
    assert isinstance(reply.sent, Packed)
    if not reply.sent.buffers and reply.sent.num_bytes <= _MOST_IN_A_PIPE:
        return reply
    out = file.with_name(f"reply-{index}-{os.getpid()}")
    write_packed(reply.sent, out)
    return Reply(out, reply.failed)


def loaded(sent: Packed, settings: Settings) -> Load:
    """Return the tasks of a run in this worker.

    Raises
    ------
    RunnerError
        If a package is missing here, or another version of it.
    """
    try:
        load: Load = unpacked(sent)
    except ImportError as error:
        name = getattr(error, "name", None)
        raise RunnerError(
            f"A worker cannot import {name!r}, which the tasks need ({error}). Install it for {sys.executable} on every "
            "machine that works, put its folder on PYTHONPATH, or use bk.SerialRunner()."
        ) from error
    except AttributeError as error:
        raise RunnerError(
            f"A worker has another version of a module than this process: {error}. Install the same versions on every machine "
            "that works."
        ) from error
    settings.apply()
    return load


def answer(load: Load, index: int, mapped: Mapped | None) -> Reply:
    """Return the reply to one task, its memory not yet moved."""
    with warnings.catch_warnings(record=True) as seen:
        failed, value = False, None
        try:
            value = load.tasks[index]()
        except Exception as error:
            failed, value = True, error
            if not isinstance(error, BayesKLRLError):  # a mistake in code: where it is would be lost
                error.add_note(f"In a worker:\n{traceback.format_exc()}")
        warned = [(str(each.message), each.category) for each in seen]
        try:
            sent = packed((value, warned), load.shared, mapped)
            if failed and not any(isinstance(each, Reference) for each in sent.buffers):
                unpacked(sent, load.shared)  # many exceptions can be pickled, but not made again
        except Exception as error:
            sent, failed = packed((_unsendable(load.tasks[index].name, value, error), [])), True
    return Reply(sent, failed)


def _unsendable(name: str, value: Any, error: Exception) -> Exception:
    """Return the error for a result that cannot leave the worker.

    An exception stays what it is for `outcomes_of`: of this package, or a mistake in code, with the place where it is.
    """
    if isinstance(value, Exception):
        words = f"{name!r} raised {type(value).__name__} in a worker: {value}"
        if isinstance(value, BayesKLRLError):
            return RunnerError(words)
        mistake = RuntimeError(words)
        for note in value.__notes__:
            mistake.add_note(note)
        return mistake
    return RunnerError(
        f"What {name!r} returned, a {type(value).__name__}, cannot be sent back from its worker: {error}. Use "
        "bk.SerialRunner(), or let it hold no open files, locks or connections."
    )
