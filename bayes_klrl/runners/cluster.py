"""Tasks on a ray cluster: `RayRunner`."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bayes_klrl.errors import RunnerError, needs
from bayes_klrl.runners.processes import load_of, reply_outcome
from bayes_klrl.runners.runner import Outcome, Task
from bayes_klrl.runners.transport import Packed, packed
from bayes_klrl.runners.worker import Load, Reply, Settings, answer, loaded

__all__ = ["RayRunner"]

_SECONDS_TO_REACH = 5.0

_loads: dict[str, tuple[Load, list[Any]]] = {}  # in a worker: the run that it is at, and the memory of its arrays


class RayRunner:
    """Runs tasks on a ray cluster, or on a local ray, with the same draws to the bit as one process gives.

    Models are put into ray's object store once per call, and the workers of one machine read them from there without copies.
    ray replaces a worker that dies and tries its task once more; if that one dies too, the task fails by name. Ctrl-C cancels
    what is running.

    Parameters
    ----------
    address
        The address of the cluster, as `ray.init` takes it: "auto", "host:6379" or "ray://host:10001". None: the cluster to
        which this process is connected, that of the environment variable RAY_ADDRESS, or a new ray of this machine.
    num_cpus_per_task
        Cores that each task reserves: `num_cpus` of ray's.
    num_gpus_per_task
        Cards that each task reserves: `num_gpus` of ray's. ray hides the cards from a task that reserves none, so give 1 if
        the prior is on a card.
    threads_per_process
        torch's threads in each worker; None: as many as in this process.

    Raises
    ------
    ImportError
        If ray is not installed.
    RunnerError
        If the cluster cannot be reached.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> runner = bk.RayRunner("head-node:6379")  # doctest: +SKIP
    >>> bk.compare(posterior, {"SMC": bk.SMC(256)}, seed=0, runner=runner)  # doctest: +SKIP
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        num_cpus_per_task: float = 1,
        num_gpus_per_task: float = 0,
        threads_per_process: int | None = None,
    ) -> None:
        with needs("bk.RayRunner", "ray", "ray"):
            import ray
        self.address, self.threads_per_process = address, threads_per_process
        self.num_cpus_per_task, self.num_gpus_per_task = num_cpus_per_task, num_gpus_per_task
        if not ray.is_initialized():
            _connect(ray, address)

    def __repr__(self) -> str:
        return f"RayRunner({'' if self.address is None else repr(self.address)})"

    @property
    def num_workers(self) -> int:
        """Tasks that the cluster's cores and cards take at a time."""
        import ray

        found = ray.cluster_resources()
        places = [found.get("CPU", 1) / self.num_cpus_per_task]
        if self.num_gpus_per_task:
            places.append(found.get("GPU", 0) / self.num_gpus_per_task)
        return max(1, int(min(places)))

    def map(self, tasks: Sequence[Task], *, progress: bool = False) -> Iterator[Outcome]:
        """See `Runner.map`; the tasks themselves show no progress.

        Raises
        ------
        RunnerError
            If a task cannot be sent to another process; nothing is run then.
        """
        import ray

        load, sent = load_of(tasks)
        arrays = [np.frombuffer(each, dtype=np.uint8) for each in sent.buffers]
        run = ray.put((sent.data, arrays))
        settings = Settings.of_this_process(self.threads_per_process)
        remote = ray.remote(_work).options(
            num_cpus=self.num_cpus_per_task, num_gpus=self.num_gpus_per_task, max_retries=1
        )
        name = run.hex()
        waiting = {remote.remote(run, name, index, settings): index for index in range(len(tasks))}
        warned: set[str] = set()
        try:
            while waiting:
                done, _ = ray.wait(list(waiting))
                for each in done:
                    index = waiting.pop(each)
                    yield _outcome(ray, each, index, tasks[index].name, load, warned)
        finally:
            for each in waiting:
                ray.cancel(each, force=True)


def _outcome(ray: Any, reference: Any, index: int, name: str, load: Load, warned: set[str]) -> Outcome:
    """Return what a worker sent back."""
    try:
        reply = ray.get(reference)
    except ray.exceptions.WorkerCrashedError as error:
        return Outcome(index, error=RunnerError(f"The worker died twice at the task {name!r}: {_first_line(error)}"))
    except ray.exceptions.OutOfMemoryError as error:
        return Outcome(index, error=RunnerError(f"The task {name!r} takes too much memory: {_first_line(error)}"))
    except ray.exceptions.RayError as error:  # such as a worker that cannot import this package
        return Outcome(
            index,
            error=RunnerError(
                f"The task {name!r} could not be run on the cluster: {_first_line(error)}. Install bayes_klrl and what "
                "the reward needs, in the versions of this process, on every node."
            ),
        )
    writable = Packed(reply.sent.data, [np.array(each) for each in reply.sent.buffers])
    return reply_outcome(index, replace(reply, sent=writable), load.shared, None, warned)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _work(run: tuple[bytes, list[np.ndarray]], name: str, index: int, settings: Settings) -> Reply:
    """Return the reply to one task; this runs in a worker, which reads each run once."""
    if name not in _loads:
        _loads.clear()
        try:
            _loads[name] = (loaded(Packed(run[0], run[1]), settings), run[1])
        except RunnerError as error:
            return Reply(packed((error, [])), failed=True)
    reply = answer(_loads[name][0], index, None)
    assert isinstance(reply.sent, Packed)
    moved = [
        np.frombuffer(each, dtype=np.uint8) for each in reply.sent.buffers
    ]  # ray's own pickle takes them as they are
    return Reply(Packed(reply.sent.data, moved), reply.failed)


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start a local ray.

    Raises
    ------
    RunnerError
        If there is nobody at the address.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():  # ray itself tries for half a minute
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_REACH).close()
        except OSError as error:
            raise _unreachable(address, error) from error
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
    except Exception as error:  # of several kinds, by version and by address
        raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> RunnerError:
    where = "ray could not be started on this machine" if address is None else f"There is no ray cluster at {address!r}"
    return RunnerError(
        f"{where}: {_first_line(error)}. Start one with `ray start --head` and give its address, leave the address out for a "
        "ray of this machine, or use bk.ProcessRunner()."
    )
