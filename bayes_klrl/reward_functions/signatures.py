"""The arguments that a reward function asks for, read from its signature against the columns that a posterior offers."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayes_klrl.batch import BATCH_NAMES, RESERVED_NAMES
from bayes_klrl.errors import RewardError

__all__ = [
    "TextCall",
    "accepts",
    "check_reads_completions",
    "function_name",
    "is_reward_model",
    "module_of",
    "parameters",
]

_LOGGING_NAMES = ("log_extra", "log_metric")
"""Functions that TRL's trainers give to rewards which ask for them, to write numbers into the trainer's log."""
_TRAINER_NAMES = frozenset({"prompt", "environments", "trainer_state", *_LOGGING_NAMES})
"""Names that TRL has for other things than completions: its datasets' prompt, and what its trainers give to rewards."""


@dataclass(frozen=True)
class TextCall:
    """A text function with the names of the arguments it asks for.

    Parameters
    ----------
    fn
        The function.
    names
        The columns that it gets.
    positional
        Whether its sole required parameter has another name and receives the completions.
    logs
        Which of TRL's logging functions it asks for by name. It gets one that does nothing.
    """

    fn: Callable[..., Any]
    names: tuple[str, ...]
    positional: bool
    logs: tuple[str, ...] = ()

    @classmethod
    def of(cls, fn: Callable[..., Any], columns: frozenset[str], label: str) -> TextCall:
        """Read the function's signature against the names that this posterior offers."""
        known = {*BATCH_NAMES, *columns}
        required, optional, open_ended = parameters(fn)
        logs = tuple(name for name in (*required, *optional) if name in _LOGGING_NAMES and name not in known)
        required = [name for name in required if name not in logs] or required
        if len(required) == 1 and required[0] in (RESERVED_NAMES | _TRAINER_NAMES) - known:
            raise _reserved(label, required[0], known)
        if len(required) == 1 and required[0] not in known:
            others = sorted(known - {"completions"})
            extra = others if open_ended else [name for name in optional if name in others]
            return cls(fn, ("completions", *extra), positional=True, logs=logs)
        unknown = [name for name in required if name not in known]
        if unknown:
            raise _unknown(label, unknown, known)
        names = [*required, *(name for name in optional if name in known)]
        if open_ended:
            names += sorted(known - set(names))
        return cls(fn, tuple(names or ("completions",)), positional=not names, logs=logs)

    @property
    def reads_text(self) -> bool:
        """Whether the completions' text is required (not merely taken by `**kwargs`)."""
        required, optional, open_ended = parameters(self.fn)
        swept_up = open_ended and not self.positional and "completions" not in (*required, *optional)
        return "completions" in self.names and not swept_up

    def without_text(self) -> TextCall:
        """Return the same call with nothing that needs decoding."""
        names = tuple(name for name in self.names if name != "completions")
        return TextCall(self.fn, names, self.positional, self.logs)

    def __call__(self, arguments: Mapping[str, Sequence[Any]]) -> Any:
        """Call the function with whole columns."""
        named = {**arguments, **dict.fromkeys(self.logs, _no_log)}
        return self.fn(named.pop("completions"), **named) if self.positional else self.fn(**named)


def parameters(fn: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Return (required names, optional names, takes **kwargs) of a function; a function without a signature has no names."""
    signature = _signature(fn)
    given = () if signature is None else signature.parameters.values()
    named = [p for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty]
    optional = [p.name for p in named if p.default is not p.empty]
    return required, optional, any(p.kind is p.VAR_KEYWORD for p in given)


def accepts(fn: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    """Return whether a function can be called with these arguments; true if it has no signature to check."""
    signature = _signature(fn)
    if signature is None:
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


def module_of(fn: Any) -> Any | None:
    """Return the `nn.Module` that is called, if it is one: its `__call__` takes anything and passes it on to `forward`."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    torch = sys.modules.get("torch")  # without torch there is none
    return fn if torch is not None and isinstance(fn, torch.nn.Module) else None


def is_reward_model(fn: object) -> bool:
    """Return whether TRL would take this for a reward model: the name of a checkpoint, or a model of transformers."""
    return isinstance(fn, str | os.PathLike) or hasattr(module_of(fn), "base_model_prefix")


def function_name(fn: object) -> str:
    """Return a function's own name; for an object that can be called, the name of its class.

    Examples
    --------
    >>> function_name(len), function_name(functools.partial(max, 3))
    ('len', 'max')
    """
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


def check_reads_completions(fn: Any, label: str, columns: Iterable[str]) -> None:
    """Refuse a function whose one parameter has the name of a column: it would receive the column and no completions."""
    for each in fn if isinstance(fn, tuple) else (fn,):
        required, optional, open_ended = parameters(each)
        if len(required) == 1 and required[0] in columns and not open_ended and not set(optional) & set(BATCH_NAMES):
            raise RewardError(
                f"Reward {label!r} asks for {required[0]!r} alone, which is a column of the rows, so it would not see the "
                "completions. Call its parameter `completions` if it is to receive them; otherwise rename or drop the column."
            )


def _signature(fn: Any) -> inspect.Signature | None:
    """Return a function's signature, that of `forward` for a module; None if it has none."""
    module = module_of(fn)
    if module is not None:
        forward = getattr(module, "_orig_mod", module).forward  # torch.compile keeps the module there
        fn = functools.partial(forward, *fn.args, **fn.keywords) if isinstance(fn, functools.partial) else forward
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None


def _no_log(*arguments: Any, **named: Any) -> None:
    """Stand for TRL's `log_extra` and `log_metric`: there is no trainer whose log could be written to."""


def _reserved(label: str, name: str, known: set[str]) -> RewardError:
    """Return the error about a function whose only parameter has a name that stands for something else than completions."""
    owner = "TRL gives to something else" if name in _TRAINER_NAMES else "is reserved"
    return RewardError(
        f"Reward {label!r} asks for {name!r}, a name that {owner}; it does not receive the completions. Names that can be "
        f"asked for are {sorted(known)}. Call the parameter `completions` if it is to receive them. A function of tokens and "
        "lengths is a bk.TokenReward, and further data are columns: bk.Posterior(..., name=[one value per prompt])."
    )


def _unknown(label: str, unknown: list[str], known: set[str]) -> RewardError:
    """Return the error about a function that asks for what nobody can give it."""
    trainers = sorted(_TRAINER_NAMES.intersection(unknown))
    cure = (
        f"{trainers} would come from a trainer of TRL, and there is none: a posterior's reward is the same at all times. Give "
        f"the parameter a default, such as {trainers[0]}=None."
        if trainers
        else "Give the missing ones as columns: bk.Posterior(..., name=[one value per prompt])."
    )
    return RewardError(f"Reward {label!r} asks for {unknown}, but this posterior offers {sorted(known)}. {cure}")
