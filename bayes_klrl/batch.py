"""The table of completions that reward functions see, and the rules for calling them.

`Batch` is the table that a posterior hands to its likelihood, `TextCall` reads a function's signature against the columns of
that table, and `to_floats` accepts nothing but one number per completion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bayes_klrl.arrays import to_host
from bayes_klrl.errors import RewardError
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, TokenIds

__all__ = [
    "RESERVED_NAMES",
    "Batch",
    "Setting",
    "TextCall",
    "accepts",
    "called_on_text",
    "called_on_tokens",
    "check_reads_completions",
    "completion_texts",
    "first_failing_row",
    "parameters",
    "to_floats",
]

_BATCH_NAMES = ("prompts", "completions", "completion_ids", "finished")
RESERVED_NAMES = frozenset(
    {*_BATCH_NAMES, "tokens", "lengths", "prompt_index", "prior", "likelihood", "max_new_tokens", "self"}
)
_TRAINER_NAMES = frozenset({"prompt", "environments", "trainer_state", "log_extra", "log_metric"})
"""Names that TRL has for other things than completions: its datasets' prompt, and what its trainers give to rewards."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Every part of a posterior except its likelihood: this is what a factor may depend on, see `Likelihood.bind`.

    Parameters
    ----------
    prior
        The pretrained language model p0.
    prompts, prompt_ids
        The P prompts as the user gave them, and the same prompts as token ids.
    columns
        Further data about the prompts, each column of length P.
    max_new_tokens
        T, the largest number of tokens in a completion, EOS included.
    """

    prior: LanguageModel
    prompts: tuple[Any, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    columns: Mapping[str, tuple[Any, ...]]
    max_new_tokens: int


@dataclass(frozen=True, eq=False)
class Batch:
    """M completions as reward functions see them.

    Parameters
    ----------
    tokens, lengths
        The token ids, shape (M, T) with T = max_new_tokens, and the number of tokens of each completion, shape (M,).
        Positions past a length hold the EOS id (0 if there is none).
    prompt_index
        Index of the prompt that each completion follows, shape (M,), values below P.
    prompts
        The P prompts, as given to the posterior (texts, or token ids).
    columns
        Further data about the prompts, each column of length P.
    prior
        The language model, which decodes the completions and knows EOS.
    prompt_ids
        The P prompts as token ids; None: the completions are decoded without their prompts.
    """

    tokens: IntArray
    lengths: IntArray
    prompt_index: IntArray
    prompts: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    prior: LanguageModel
    prompt_ids: Sequence[TokenIds] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def sequences(self) -> Sequences:
        """The completions as if they all followed one prompt: tokens (1, M, T)."""
        return Sequences(self.tokens[None], self.lengths[None])

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        """The ids of each completion up to and including EOS."""
        return self.sequences.lists()

    @cached_property
    def completions(self) -> list[str]:
        """The text of each completion as it follows its prompt, special tokens skipped."""
        known = self.prompt_ids
        prompts: list[TokenIds] = [() if known is None else known[p] for p in self.prompt_index]
        return completion_texts(self.prior, prompts, self.completion_ids)

    def named(self, name: str) -> Sequence[Any]:
        """Return the column that a reward function asks for by `name`, one entry per completion."""
        if name == "completions":
            return list(self.completions)  # copies: a function may sort what it is given
        if name == "completion_ids":
            return [list(ids) for ids in self.completion_ids]
        if name == "finished":
            finished: list[bool] = self.sequences.finished(self.prior.eos_token_ids).ravel().tolist()
            return finished
        column = self.prompts if name == "prompts" else self.columns[name]
        return [column[p] for p in self.prompt_index]

    def describe(self, row: int) -> str:
        """Return the words by which an error message names completion `row` of the M."""
        ids = self.completion_ids[row]
        prompt = self.prompts[self.prompt_index[row]]
        text = f" {self.completions[row]!r}" if self.prior.tokenizer is not None else ""
        return f"completion {row}{text} (ids {ids}, prompt {prompt!r})"


def completion_texts(lm: LanguageModel, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
    """Return the text of each completion as it follows its prompt: by the model's `decode_after`, if it has one."""
    after = getattr(lm, "decode_after", None)
    return list(lm.decode(ids) if after is None else after(prompts, ids))


@dataclass(frozen=True)
class TextCall:
    """A text function with the names of the arguments it asks for.

    `positional` says that its sole required parameter has another name and receives the completions.
    """

    fn: Callable[..., Any]
    names: tuple[str, ...]
    positional: bool

    @classmethod
    def of(cls, fn: Callable[..., Any], columns: frozenset[str], label: str) -> TextCall:
        """Read the function's signature against the names that this posterior offers."""
        known = {*_BATCH_NAMES, *columns}
        required, optional, open_ended = parameters(fn)
        if len(required) == 1 and required[0] in (RESERVED_NAMES | _TRAINER_NAMES) - known:
            raise _reserved(label, required[0], known)
        if len(required) == 1 and required[0] not in known:
            others = sorted(known - {"completions"})
            extra = others if open_ended else [name for name in optional if name in others]
            return cls(fn, ("completions", *extra), positional=True)
        unknown = [name for name in required if name not in known]
        if unknown:
            raise RewardError(
                f"Reward {label!r} asks for {unknown}, but this posterior offers {sorted(known)}. Give the missing "
                "ones as columns: bk.Posterior(..., name=[one value per prompt])."
            )
        names = [*required, *(name for name in optional if name in known)]
        if open_ended:
            names += sorted(known - set(names))
        return cls(fn, tuple(names or ("completions",)), positional=not names)

    @property
    def reads_text(self) -> bool:
        """Whether the completions' text is required (not merely taken by `**kwargs`)."""
        required, optional, open_ended = parameters(self.fn)
        swept_up = open_ended and not self.positional and "completions" not in (*required, *optional)
        return "completions" in self.names and not swept_up

    def without_text(self) -> TextCall:
        """Return the same call with nothing that needs decoding."""
        return TextCall(self.fn, tuple(name for name in self.names if name != "completions"), self.positional)

    def __call__(self, arguments: Mapping[str, Sequence[Any]]) -> Any:
        """Call the function with whole columns."""
        if not self.positional:
            return self.fn(**arguments)
        named = {name: value for name, value in arguments.items() if name != "completions"}
        return self.fn(arguments["completions"], **named)


def _reserved(label: str, name: str, known: set[str]) -> RewardError:
    """Return the error about a function whose only parameter has a name that stands for something else than completions."""
    owner = "TRL gives to something else" if name in _TRAINER_NAMES else "is reserved"
    return RewardError(
        f"Reward {label!r} asks for {name!r}, a name that {owner}; it does not receive the completions. Names that can be "
        f"asked for are {sorted(known)}. Call the parameter `completions` if it is to receive them. A function of tokens and "
        "lengths is a bk.TokenReward, and further data are columns: bk.Posterior(..., name=[one value per prompt])."
    )


def called_on_text(fn: Callable[..., Any], label: str, batch: Batch) -> Any:
    """Return what a text function gives for whole columns; if it raises, the error names the completion that made it raise."""
    call = TextCall.of(fn, frozenset(batch.columns), label)
    if batch.prior.tokenizer is None:  # **kwargs would otherwise decode what has no text
        call = call.without_text()
    arguments = {name: batch.named(name) for name in call.names}
    try:
        return call(arguments)
    except Exception as error:  # whatever a user's function raises
        row = first_failing_row(
            len(batch), lambda rows: call({name: column[rows] for name, column in arguments.items()})
        )
        raise RewardError(
            f"Reward {label!r} raised {type(error).__name__}: {error} -- at {batch.describe(row)}."
        ) from error


def called_on_tokens(fn: Callable[..., Any], label: str, batch: Batch) -> Any:
    """Return what a function of token arrays gives; if it raises, the error names the completion that made it raise."""
    required, optional, _ = parameters(fn)
    asked_for = ("prompt_index",) if "prompt_index" in (*required, *optional) else ()

    def call(rows: slice) -> Any:
        extra = {name: batch.prompt_index[rows].copy() for name in asked_for}
        return fn(batch.tokens[rows].copy(), batch.lengths[rows].copy(), **extra)

    try:
        return call(slice(None))
    except Exception as error:  # whatever a user's function raises
        row = first_failing_row(len(batch), call)
        raise RewardError(
            f"TokenReward {label!r} raised {type(error).__name__}: {error} -- at {batch.describe(row)}; the tokens had "
            f"shape {batch.tokens.shape}."
        ) from error


def parameters(fn: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Return (required names, optional names, takes **kwargs) of a function; a function without a signature has no names."""
    try:
        signature = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return [], [], False
    named = [p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty]
    optional = [p.name for p in named if p.default is not p.empty]
    return required, optional, any(p.kind is p.VAR_KEYWORD for p in signature)


def accepts(fn: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    """Return whether a function can be called with these arguments; true if it has no signature to check."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


def check_reads_completions(fn: Any, label: str, columns: Iterable[str]) -> None:
    """Refuse a function whose one parameter has the name of a column: it would receive the column and no completions."""
    required, optional, open_ended = parameters(fn)
    if len(required) == 1 and required[0] in columns and not open_ended and not set(optional) & set(_BATCH_NAMES):
        raise RewardError(
            f"Reward {label!r} asks for {required[0]!r} alone, which is a column of the rows, so it would not see the "
            "completions. Call its parameter `completions` if it is to receive them; otherwise rename or drop the column."
        )


def first_failing_row(num_rows: int, call_on: Callable[[slice], object]) -> int:
    """Return the first completion on which a function raises by itself; 0 if it takes several to make it raise."""
    for row in range(num_rows):
        try:
            call_on(slice(row, row + 1))
        except Exception:  # the search for the culprit: any exception is the answer
            return row
    return 0


def to_floats(outcome: Any, label: str, batch: Batch) -> FloatArray:
    """Return what a reward function returned as float64 (M,), refusing None, strings and wrong lengths."""
    num_rows = len(batch)
    if isinstance(outcome, Mapping | set | frozenset):
        raise RewardError(f"Reward {label!r} returned a {type(outcome).__name__}, which has no order; return a list.")
    if hasattr(outcome, "detach"):  # a torch tensor: with or without gradient, of any precision
        outcome = to_host(outcome.double())
    if hasattr(outcome, "__array__") and not isinstance(outcome, np.ndarray | np.generic):
        outcome = np.asarray(outcome)  # a JAX array, say: to read it number by number takes a thousand times longer
    if outcome is None or isinstance(outcome, str | bytes) or not hasattr(outcome, "__len__"):
        raise RewardError(
            f"Reward {label!r} returned {outcome!r} for {num_rows} completions. It must return one float per completion."
        )
    shape = np.shape(outcome) if isinstance(outcome, np.ndarray) else (len(outcome),)
    if shape != (num_rows,):
        raise RewardError(
            f"Reward {label!r} returned {'shape ' + str(shape) if len(shape) != 1 else f'{shape[0]} values'} for "
            f"{num_rows} completions. It must return one float per completion, in order."
        )
    if isinstance(outcome, np.ndarray) and outcome.dtype.kind in "fiub":
        return outcome.astype(np.float64)
    values = np.empty(num_rows)
    for row, value in enumerate(outcome):
        try:
            if value is None or isinstance(value, str | bytes | complex | np.complexfloating):
                raise TypeError
            values[row] = float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError, OverflowError):
            raise RewardError(
                f"Reward {label!r} returned {value!r} for {batch.describe(row)}. A reward is a finite number, or -inf "
                "for what is impossible."
            ) from None
    return values
