"""In words, what of a task cannot be sent to another process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bayes_klrl.errors import RunnerError
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.runner import Task
from bayes_klrl.runners.transport import packed

__all__ = ["refusal"]

_CURE = (
    "Open files, locks and connections inside of the function, when it is called, or define it in a module of its own; "
    "bk.SerialRunner() sends nothing."
)


def refusal(tasks: Sequence[Task], error: Exception) -> RunnerError:
    """Return the error for tasks that cannot be sent: the first piece that cannot be, by its name."""
    for task in tasks:
        for name, piece in _pieces(task):
            try:
                packed(piece)
            except Exception as reason:
                return RunnerError(f"{name} cannot be sent to another process: {reason}. {_CURE}")
    return RunnerError(f"The tasks cannot be sent to another process: {error}. {_CURE}")


def _pieces(task: Task) -> Iterator[tuple[str, Any]]:
    """Yield what a task is made of, the parts of posteriors first: other things may hold them."""
    for value in sorted(task.arguments, key=lambda value: not isinstance(value, Posterior)):
        if isinstance(value, Posterior):
            yield "The prior", value.prior
            for factor in value.likelihood.factors:
                yield f"The {'reward' if factor.alpha is not None else 'constraint'} {factor.label!r}", factor
            for name, column in value.columns.items():
                yield f"The column {name!r}", column
            yield "The posterior", value
        else:
            yield f"{task.name!r}, or what belongs to it ({type(value).__name__}),", value
