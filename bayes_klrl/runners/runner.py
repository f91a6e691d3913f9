"""What a runner is: it calls tasks, wherever it likes, and hands back their outcomes as they come.

How work is split into tasks depends on the posterior and the algorithm only, never on the runner. Every runner therefore makes
the same calls with the same seeds, and the draws are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.progress import Advance

__all__ = ["Outcome", "Runner", "Task", "outcomes_of", "values_of"]


@dataclass(frozen=True, eq=False)
class Task:
    """One call: `function(*arguments, progress=...)`.

    Parameters
    ----------
    name
        What errors and the progress display call it, such as the name of a row.
    function, arguments
        The function and its arguments; whatever is random in it depends on a seed among the arguments.
    shared
        Objects of the arguments that the result may refer to. They come back as the very objects that they are here, not as
        copies.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    shared: tuple[Any, ...] = field(default=(), repr=False)

    def __call__(self, progress: bool = False) -> Any:
        """Return the result of the call."""
        return self.function(*self.arguments, progress=progress)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a task: its value, or the error that ended it.

    Parameters
    ----------
    index
        The task's place among those that were given.
    value
        What the function returned; None if there is an error.
    error
        What it raised; a `RunnerError` if its worker died. None if all went well.
    """

    index: int
    value: Any = None
    error: Exception | None = None


@runtime_checkable
class Runner(Protocol):
    """Something that runs tasks: `SerialRunner`, `ProcessRunner`, `RayRunner`, or one of your own.

    Examples
    --------
    A runner that begins with the last task; the draws are the same:

    >>> import numpy as np, bayes_klrl as bk
    >>> from bayes_klrl.runners.runner import Outcome
    >>> class Backwards:
    ...     num_workers = 1
    ...     def map(self, tasks, *, progress=False):
    ...         for index in reversed(range(len(tasks))):
    ...             yield Outcome(index, tasks[index](progress))
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, prompts=[[0], [0, 0]], max_new_tokens=3)
    >>> rows = {"prior IS": bk.ImportanceSampling(600), "SMC": bk.SMC(600)}
    >>> forward, backward = (bk.compare(posterior, rows, seed=0, runner=each) for each in (None, Backwards()))
    >>> all(bool((forward[name].log_weights == backward[name].log_weights).all()) for name in rows)
    True
    """

    @property
    def num_workers(self) -> int:
        """How many tasks are run at a time."""

    def map(self, tasks: Sequence[Task], *, progress: bool = False) -> Iterator[Outcome]:
        """Run the tasks and yield one outcome for each, in any order.

        What a task raises is the `error` of its outcome and ends no other task. An iterator that is closed early, by Ctrl-C
        for instance, stops what is still running. `progress` lets tasks show what they are at, where that can be seen.
        """


def outcomes_of(
    runner: Runner, tasks: Sequence[Task], *, progress: bool = False, advance: Advance | None = None
) -> list[Outcome]:
    """Return the outcomes of all tasks, in their order. `advance(status=name)` is called after each.

    Raises
    ------
    Exception
        What a task raised, if it is no `BayesKLRLError`: it is a mistake in code, and the other tasks are stopped.
    """
    found: dict[int, Outcome] = {}
    if not tasks:
        return []
    with closing(runner.map(tasks, progress=progress)) as outcomes:  # type: ignore[type-var]
        for outcome in outcomes:
            if outcome.error is not None and not isinstance(outcome.error, BayesKLRLError):
                raise outcome.error
            found[outcome.index] = outcome
            if advance is not None:
                advance(status=tasks[outcome.index].name)
    return [found[index] for index in range(len(tasks))]


def values_of(
    runner: Runner, tasks: Sequence[Task], *, progress: bool = False, advance: Advance | None = None
) -> list[Any]:
    """Return the values of all tasks, in their order; raise the error of the first that has one."""
    outcomes = outcomes_of(runner, tasks, progress=progress, advance=advance)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.value for outcome in outcomes]
