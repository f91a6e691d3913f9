"""Tasks in worker processes of this machine: `ProcessRunner`."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayes_klrl.checks import check_count
from bayes_klrl.errors import RunnerError
from bayes_klrl.runners.runner import Outcome, Task
from bayes_klrl.runners.sendable import refusal
from bayes_klrl.runners.transport import Packed, Reference, finder, packed, read_packed, unpacked, write_packed
from bayes_klrl.runners.worker import Load, Reply, Settings, begin, work

__all__ = ["ProcessRunner", "load_of", "num_usable_cores"]

_SHARED_MEMORY = Path("/dev/shm")  # files in main memory, if the system has that
_MOST_COPIED = 2**20  # bytes of a reply; one of more of them stays in its file, which takes a file descriptor


class ProcessRunner:
    """Runs tasks in several processes of this machine, with the same draws to the bit as one process gives.

    Models are not copied: their weights lie in one file of shared memory that all processes map. Processes are started anew
    (not forked), load torch or JAX when the first task needs it (two or three seconds), and serve all calls until `close`,
    the end of a `with` block, or the end of the program. A script needs no `if __name__ == "__main__"`.

    A process that dies, for want of memory perhaps, is replaced, and its task tried once more by itself; if that ends the same
    way, the task fails by name and the others go on. Ctrl-C stops all processes at once.

    Parameters
    ----------
    num_processes
        Number of processes; None: as many as there are usable cores.
    threads_per_process
        torch's threads in each process; None: as many as in this one. Where every core has a process, 1 is fastest: set
        `torch.set_num_threads(1)` here too, or OMP_NUM_THREADS=1, for sums on several threads may differ in the last bit.

    Raises
    ------
    BayesKLRLError
        If a number is not positive.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> rows = {"prior IS": bk.ImportanceSampling(64), "SMC": bk.SMC(64)}
    >>> with bk.ProcessRunner(2) as runner:
    ...     spread = bk.compare(posterior, rows, seed=0, runner=runner)
    >>> here = bk.compare(posterior, rows, seed=0)
    >>> all(bool((spread[name].log_weights == here[name].log_weights).all()) for name in rows)
    True
    """

    def __init__(self, num_processes: int | None = None, *, threads_per_process: int | None = None) -> None:
        for name, value in (("num_processes", num_processes), ("threads_per_process", threads_per_process)):
            if value is not None:
                check_count(name, value)
        self.num_workers = num_usable_cores() if num_processes is None else int(num_processes)
        self.threads_per_process = threads_per_process
        self._pool: ProcessPoolExecutor | None = None
        self._at_exit: weakref.finalize[..., Any] | None = None

    def __repr__(self) -> str:
        return f"ProcessRunner({self.num_workers})"

    def __enter__(self) -> ProcessRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. A later call starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            _end(pool)

    def map(self, tasks: Sequence[Task], *, progress: bool = False) -> Iterator[Outcome]:
        """See `Runner.map`; the tasks themselves show no progress.

        Raises
        ------
        RunnerError
            If a task cannot be sent to another process; nothing is run then.
        """
        load, sent = load_of(tasks)
        with _folder(sent.num_bytes) as folder:
            places = write_packed(sent, folder / "tasks")
            run = _Run(
                tasks, load, folder, finder(places, sent.buffers), Settings.of_this_process(self.threads_per_process)
            )
            try:
                yield from self._outcomes(run)
            except BaseException:  # Ctrl-C, or nobody wants the rest
                self.close()
                raise

    def _outcomes(self, run: _Run) -> Iterator[Outcome]:
        """Yield the outcomes; tasks whose process died are tried again, one at a time, so that the culprit is known."""
        width = self.num_workers + 1  # one task waits, so that no process does
        suspects = yield from self._drain(run, list(range(len(run.tasks))), width)
        while suspects or run.waiting:
            for index in suspects:
                if (yield from self._drain(run, [index], 1)):
                    yield Outcome(index, error=_died(run.tasks[index].name))
            rest, run.waiting = run.waiting, []
            suspects = yield from self._drain(run, rest, width)

    def _drain(self, run: _Run, indices: list[int], width: int) -> Generator[Outcome, None, list[int]]:
        """Yield outcomes until all are there or a process dies; return the tasks that were running then.

        What had not begun is left in `run.waiting`.
        """
        running: dict[Future[Reply], int] = {}
        left = indices[::-1]
        while left or running:
            while left and len(running) < width:
                try:
                    future = self._submit(run, left[-1])
                except BrokenProcessPool:  # it died between two tasks
                    break
                running[future] = left.pop()
            done = wait(running, return_when=FIRST_COMPLETED).done
            broken = not done
            for future in done:
                if isinstance(future.exception(), BrokenProcessPool):
                    broken = True
                else:
                    yield run.outcome(running.pop(future), future)
            if broken:
                wait(running)  # the others break too, but for those that were done just in time
                for future in [each for each in running if not isinstance(each.exception(), BrokenProcessPool)]:
                    yield run.outcome(running.pop(future), future)
                self.close()
                run.waiting += left[::-1]
                return list(running.values())
        return []

    def _submit(self, run: _Run, index: int) -> Future[Reply]:
        """Hand a task to a process, a new one if there are too few."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.num_workers, mp_context=context, initializer=begin, initargs=(run.folder,)
            )
            self._at_exit = weakref.finalize(self, _end, self._pool)
        with _without_main():
            return self._pool.submit(work, run.folder / "tasks", index, run.settings)


@dataclass(eq=False)
class _Run:
    """One call of `map`."""

    tasks: Sequence[Task]
    load: Load
    folder: Path
    original: Callable[[Reference], Any]
    settings: Settings
    waiting: list[int] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    def outcome(self, index: int, future: Future[Reply]) -> Outcome:
        """Return what a process sent back."""
        error = future.exception()
        if error is not None:  # of the executor itself
            return Outcome(index, error=RunnerError(f"The task {self.tasks[index].name!r} could not be run: {error!r}"))
        return reply_outcome(index, future.result(), self.load.shared, self.original, self.warned)


def load_of(tasks: Sequence[Task]) -> tuple[Load, Packed]:
    """Return what a run's workers need, and the same packed.

    Raises
    ------
    RunnerError
        If something cannot be sent; the message names it.
    """
    shared = {id(each): each for task in tasks for each in task.shared}
    load = Load(list(tasks), list(shared.values()))
    try:
        return load, packed(load)
    except Exception as error:
        raise refusal(tasks, error) from error


def reply_outcome(
    index: int,
    reply: Reply,
    shared: Sequence[Any],
    original: Callable[[Reference], Any] | None,
    warned: set[str],
) -> Outcome:
    """Return a reply as an outcome, and pass on warnings that were not given before."""
    sent = reply.sent
    if isinstance(sent, Path):
        file, sent = sent, read_packed(sent).packed
        file.unlink()  # the pages stay as long as someone looks at them
        if sent.num_bytes <= _MOST_COPIED:
            sent = sent.copied()
    value, given = unpacked(sent, shared, original)
    for text, category in given:
        if text not in warned:
            warned.add(text)
            warnings.warn(text, category, stacklevel=2)
    return Outcome(index, error=value) if reply.failed else Outcome(index, value)


def num_usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _died(name: str) -> RunnerError:
    return RunnerError(
        f"the worker process died twice at the task {name!r}, the second time alone: it took too much memory, perhaps, or its "
        "code ends the process. Run it with bk.SerialRunner() to see, or with fewer processes."
    )


def _end(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool at once, whatever they are doing."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _folder(num_bytes: int) -> Iterator[Path]:
    """Give a folder for files in shared memory, or else of the disk, and remove it at the end."""
    has_room = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    has_room = has_room and shutil.disk_usage(_SHARED_MEMORY).free > 2 * num_bytes
    prefix = f"bayes-klrl-{os.getpid()}-"  # so that what a killed process left behind can be told
    with tempfile.TemporaryDirectory(prefix=prefix, dir=_SHARED_MEMORY if has_room else None) as folder:
        yield Path(folder)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module while processes are started: they would run the user's script, and what they need is sent."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
