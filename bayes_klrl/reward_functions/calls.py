"""Calling the functions that users write. If one raises, the error names the completion that made it raise."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bayes_klrl.arrays import no_gradient
from bayes_klrl.batch import Batch
from bayes_klrl.errors import RewardError
from bayes_klrl.reward_functions.coroutines import awaited
from bayes_klrl.reward_functions.signatures import TextCall, module_of, parameters

__all__ = ["called_on_text", "called_on_tokens", "called_together", "evaluating", "first_failing_row"]


def called_on_text(fn: Callable[..., Any], label: str, batch: Batch) -> Any:
    """Return what a text function gives for whole columns; an async one is awaited."""
    return called_together((fn,), (label,), batch)[0]


def called_together(fns: Sequence[Callable[..., Any]], labels: Sequence[str], batch: Batch) -> list[Any]:
    """Return what each of several text functions gives for the same columns.

    Each gets what its own signature asks for. They are called in order, and the async ones are then awaited concurrently.

    Raises
    ------
    RewardError
        If one of them raises; the message names the completion. `SystemExit` and `KeyboardInterrupt` are raised as they are.
    """
    calls = [TextCall.of(fn, frozenset(batch.columns), label) for fn, label in zip(fns, labels, strict=True)]
    if batch.prior.tokenizer is None:  # **kwargs would otherwise decode what has no text
        calls = [call.without_text() for call in calls]
    columns: list[dict[str, Sequence[Any]]] = [{name: batch.named(name) for name in call.names} for call in calls]
    outcomes: list[Any] = []
    for call, arguments in zip(calls, columns, strict=True):
        try:
            outcomes.append(_called(call, arguments))
        except (Exception, asyncio.CancelledError) as error:  # whatever a user's function raises
            outcomes.append(error)
    waiting = [index for index, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
    for index, result in zip(waiting, awaited([outcomes[index] for index in waiting]), strict=True):
        outcomes[index] = result
    for call, label, arguments, outcome in zip(calls, labels, columns, outcomes, strict=True):
        if isinstance(outcome, Exception | asyncio.CancelledError):  # cancelled: a task of the function's own
            raise _raised(call, label, arguments, outcome, batch) from outcome
        if isinstance(outcome, BaseException):  # SystemExit or KeyboardInterrupt
            raise outcome
    return outcomes


def called_on_tokens(fn: Callable[..., Any], label: str, batch: Batch) -> Any:
    """Return what a function of token arrays gives; if it raises, the error names the completion that made it raise."""
    required, optional, _ = parameters(fn)
    asked_for = ("prompt_index",) if "prompt_index" in (*required, *optional) else ()

    def call(rows: slice) -> Any:
        extra = {name: batch.numbers[rows].copy() for name in asked_for}
        return fn(batch.tokens[rows].copy(), batch.lengths[rows].copy(), **extra)

    try:
        return call(slice(None))
    except Exception as error:  # whatever a user's function raises
        row = first_failing_row(len(batch), call)
        raise RewardError(
            f"TokenReward {label!r} raised {type(error).__name__}: {error} -- at {batch.describe(row)}; the tokens had "
            f"shape {batch.tokens.shape}."
        ) from error


def first_failing_row(num_rows: int, call_on: Callable[[slice], object]) -> int:
    """Return the first completion on which a function raises by itself; 0 if it takes several to make it raise."""
    for row in range(num_rows):
        try:
            call_on(slice(row, row + 1))
        except Exception:  # the search for the culprit: any exception is the answer
            return row
    return 0


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Put an `nn.Module` into evaluation mode, without gradients, and leave it afterwards as it was.

    A reward with dropout would be another number each time.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with no_gradient():
            yield
    finally:
        for part, was_training in modes:
            part.training = was_training


def _called(call: TextCall, arguments: Mapping[str, Sequence[Any]]) -> Any:
    """Return what a function gives: a result, or what is to be awaited."""
    module = module_of(call.fn)
    if module is None:
        return call(arguments)
    with evaluating(module):
        return call(arguments)


def _raised(
    call: TextCall, label: str, arguments: Mapping[str, Sequence[Any]], error: BaseException, batch: Batch
) -> RewardError:
    """Return the error about a function that raised another one."""

    def call_on(rows: slice) -> None:
        try:
            outcome = _called(call, {name: column[rows] for name, column in arguments.items()})
            results = awaited([outcome]) if inspect.isawaitable(outcome) else []
            if results and isinstance(results[0], BaseException):
                raise results[0]
        except asyncio.CancelledError as cancelled:
            raise RewardError("cancelled") from cancelled

    row = first_failing_row(len(batch), call_on)
    return RewardError(f"Reward {label!r} raised {type(error).__name__}: {error} -- at {batch.describe(row)}.")
