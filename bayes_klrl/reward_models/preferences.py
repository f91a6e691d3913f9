"""Preferences between completions, and scores of completions: the data of a reward model.

Invalid data are refused here, before any model is run, and the error gives the index of the wrong entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from bayes_klrl.batch import RESERVED_NAMES, Batch
from bayes_klrl.errors import BayesKLRLError, TextRewardError
from bayes_klrl.prompts.chat import Conversation, conversation, is_messages
from bayes_klrl.prompts.context import encoded_prompts
from bayes_klrl.prompts.lists import as_prompts
from bayes_klrl.sequences import Sequences, pad_token
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["Preferences", "Scores", "training_batch"]

_TRL = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, eq=False)
class Preferences:
    """n pairs of completions of one prompt each, of which the first was preferred to the second.

    Parameters
    ----------
    prompts
        n prompts, texts, lists of token ids or lists of messages; or one prompt for all pairs.
    chosen, rejected
        The n preferred and the n other completions, all texts or all lists of token ids (EOS included where there is one). A
        list of one message of the assistant stands for its text.
    columns
        Further data about the pairs, each column of length n, which feature functions may ask for by name.

    Raises
    ------
    BayesKLRLError
        If there are no pairs, lengths differ, a completion is neither text nor token ids, or a pair is a tie.

    Examples
    --------
    >>> pairs = Preferences("Say hello.", chosen=["Hello!", "Hi!"], rejected=["No.", "Hello."])
    >>> len(pairs), pairs[[1]].chosen
    (2, ('Hi!',))
    """

    prompts: Sequence[Any]
    chosen: Sequence[Any]
    rejected: Sequence[Any]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen, rejected = _completions("chosen", self.chosen), _completions("rejected", self.rejected)
        if len(chosen) != len(rejected):
            raise BayesKLRLError(
                f"{len(chosen)} chosen completions and {len(rejected)} rejected ones: a preference is a pair, give as many."
            )
        _check_not_empty(len(chosen), "preferences")
        _check_one_kind([*chosen, *rejected])
        _set_common(self, len(chosen))
        object.__setattr__(self, "chosen", chosen)
        object.__setattr__(self, "rejected", rejected)
        for i, pair in enumerate(zip(chosen, rejected, strict=True)):
            if pair[0] == pair[1]:
                raise BayesKLRLError(
                    f"Pair {i} is a tie: {pair[0]!r} was both chosen and rejected, which says nothing. Remove the pair."
                )

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Preferences:
        """Return the preferences in rows of TRL's format, {"prompt", "chosen", "rejected"}, such as a dataset's.

        All other keys of the rows become columns. In the conversational format the prompt is a list of messages, and each
        completion one message of the assistant.
        """
        listed = list(rows)
        _check_not_empty(len(listed), "preferences")
        for i, row in enumerate(listed):
            missing = [name for name in _TRL if name not in row]
            if missing:
                raise BayesKLRLError(f"Row {i} has no {missing}: a row is {{'prompt', 'chosen', 'rejected'}}.")
        names = sorted(set(listed[0]) - set(_TRL) - RESERVED_NAMES)
        columns = {name: [row.get(name) for row in listed] for name in names}
        prompts, chosen, rejected = ([row[name] for row in listed] for name in _TRL)
        return cls(prompts, chosen, rejected, columns)

    @classmethod
    def labelled(cls, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], labels: Any) -> Preferences:
        """Return preferences from labels: 1 (or True) where the first completion was preferred, 0 where the second was."""
        marks = _numbers("labels", labels)
        if not len(first) == len(second) == len(marks):
            raise BayesKLRLError(
                f"{len(first)} first completions, {len(second)} second ones and {len(marks)} labels: give as many of each."
            )
        if (undecided := ~np.isin(marks, (0.0, 1.0))).any():
            i = int(undecided.argmax())
            why = "a tie, which says nothing: remove the pair" if marks[i] == 0.5 else "neither 0 nor 1"
            raise BayesKLRLError(f"Label {i} is {marks[i]}: {why}. A label is 1 (the first won) or 0 (the second).")
        pairs = [(a, b) if won else (b, a) for a, b, won in zip(first, second, marks == 1, strict=True)]
        return cls(prompts, [winner for winner, _ in pairs], [loser for _, loser in pairs])

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: int | Sequence[int] | slice) -> Preferences:
        """Return some of the pairs, by an index, a list of indices or a slice."""
        kept = np.atleast_1d(np.arange(len(self))[rows])
        columns = {name: [values[i] for i in kept] for name, values in self.columns.items()}
        parts = (self.prompts, self.chosen, self.rejected)
        prompts, chosen, rejected = ([part[i] for i in kept] for part in parts)
        return Preferences(prompts, chosen, rejected, columns)

    def check_winners(self) -> None:
        """Refuse data in which one completion wins every comparison."""
        if len(set(self.chosen)) == 1:
            raise BayesKLRLError(
                f"One winner only: {self.chosen[0]!r} wins every comparison ({len(self)}). The likelihood then has no "
                "maximum, and the prior alone would limit the weights. Add comparisons that other completions win."
            )

    def batch(self, prior: LanguageModel) -> Batch:
        """Return all 2n completions as the batch that feature functions see: the chosen ones, then the rejected ones."""
        return training_batch(prior, self.prompts, [*self.chosen, *self.rejected], self.columns)


@dataclass(frozen=True, eq=False)
class Scores:
    """n completions with one score each, an observation of r(x) with Gaussian noise.

    Parameters
    ----------
    prompts
        n prompts, texts, lists of token ids or lists of messages; or one prompt for all completions.
    completions
        n completions, all texts or all lists of token ids.
    scores
        The n scores, finite numbers.
    noise
        Standard deviation of the scores about the reward: one number for all, or n numbers. None: it is inferred.
    columns
        Further data about the completions, each column of length n, which feature functions may ask for by name.

    Raises
    ------
    BayesKLRLError
        If there are no scores, lengths differ, a score is not finite, all scores are equal, or the noise is not positive.

    Examples
    --------
    >>> rated = Scores("Say hello.", ["Hello!", "Hi!", "No."], scores=[5, 4, 1], noise=0.5)
    >>> len(rated), rated.scores, rated.noise
    (3, array([5., 4., 1.]), array([0.5, 0.5, 0.5]))
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    scores: FloatArray
    noise: FloatArray | float | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        completions, scores = _completions("completions", self.completions), _numbers("scores", self.scores)
        if len(completions) != len(scores):
            raise BayesKLRLError(f"{len(completions)} completions and {len(scores)} scores: give a score for each.")
        _check_not_empty(len(completions), "scores")
        _check_one_kind(completions)
        _set_common(self, len(completions))
        if (bad := ~np.isfinite(scores)).any():
            i = int(bad.argmax())
            raise BayesKLRLError(f"Score {i} is {scores[i]}: a score is a finite number. Remove it, or correct it.")
        if len(scores) < 2 or np.ptp(scores) == 0:
            raise BayesKLRLError(f"All scores are {scores[0]}: nothing can be learned from what does not vary.")
        object.__setattr__(self, "completions", completions)
        object.__setattr__(self, "scores", scores)
        if self.noise is not None:
            object.__setattr__(self, "noise", _positive_noise(self.noise, len(scores)))

    def __len__(self) -> int:
        return len(self.completions)

    def batch(self, prior: LanguageModel) -> Batch:
        """Return the completions as the batch that feature functions see."""
        return training_batch(prior, self.prompts, self.completions, self.columns)


@dataclass(frozen=True, eq=False)
class _GivenTexts(Batch):
    """A batch of completions that were given as texts; feature functions see exactly these texts."""

    texts: tuple[str, ...] = ()

    @cached_property
    def completions(self) -> list[str]:
        """See `Batch.completions`."""
        return list(self.texts)


def training_batch(
    prior: LanguageModel, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> Batch:
    """Return completions as the batch that feature functions see; they follow the n prompts in order, again and again.

    A text is encoded by the prior's tokenizer and ends with EOS. A BOS that the tokenizer adds is removed, because it belongs
    to the prompt.
    """
    texts = isinstance(completions[0], str)
    ids = _encoded(prior, completions) if texts else [list(row) for row in completions]
    longest = max(len(row) for row in ids)
    padded = Sequences.from_lists(ids, max_new_tokens=longest, pad_token=pad_token(prior.eos_token_ids))
    index = np.tile(np.arange(len(prompts)), len(completions) // len(prompts))
    tokens, lengths = padded.tokens[0], padded.lengths[0]
    if texts:
        return _GivenTexts(tokens, lengths, index, prompts, columns, prior, texts=tuple(completions))
    return Batch(tokens, lengths, index, prompts, columns, prior, _prompt_ids(prior, prompts))


def _prompt_ids(prior: LanguageModel, prompts: Sequence[Any]) -> list[Any]:
    """Return the prompts as token ids; of texts without a tokenizer, no ids."""
    if any(map(is_messages, prompts)):
        return list(encoded_prompts(tuple(prompts), prior))
    if not all(isinstance(prompt, str) for prompt in prompts):
        return list(prompts)
    return prior.encode(list(prompts)) if prior.tokenizer is not None else [() for _ in prompts]


def _encoded(prior: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts as completions: no BOS, EOS at the end."""
    if prior.tokenizer is None:
        raise TextRewardError(
            f"Completion 0 is the text {texts[0]!r}, but the prior has no tokenizer. Give token ids, or the model a tokenizer."
        )
    bos = getattr(prior, "bos_token_id", None)
    eos = sorted(prior.eos_token_ids)[:1]
    rows = [ids[1:] if ids and ids[0] == bos else ids for ids in prior.encode(list(texts))]
    return [[*ids, *eos] if ids or eos else [pad_token(())] for ids in rows]


def _completions(name: str, values: Any) -> tuple[Any, ...]:
    """Return completions as a tuple of texts or of tuples of token ids."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise BayesKLRLError(f"{name} is a list of completions; got {values!r}.")
    return tuple(_completion(name, i, value) for i, value in enumerate(values))


def _completion(name: str, i: int, value: Any) -> Any:
    """Return a text, or token ids as a tuple; of the assistant's one message, its text."""
    if isinstance(value, str):
        return value
    if is_messages(value):
        messages = conversation(f"{name}[{i}]", value)
        if len(messages) != 1 or not messages.is_begun:
            raise BayesKLRLError(
                f"{name}[{i}] must be one message of the assistant; it has the roles {[each['role'] for each in messages]}."
            )
        return messages[0]["content"]
    ids = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(ids, list | tuple) or not ids or not all(_is_id(token) for token in ids):
        raise BayesKLRLError(f"{name}[{i}] must be a text or a non-empty list of token ids; got {value!r}.")
    return tuple(int(token) for token in ids)


def _is_id(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool) and bool(token >= 0)


def _check_not_empty(num: int, what: str) -> None:
    """Refuse an empty set."""
    if num == 0:
        raise BayesKLRLError(f"The set of {what} is empty: there is nothing to learn from. Give at least two.")


def _check_one_kind(completions: Sequence[Any]) -> None:
    """Refuse texts among token ids."""
    kinds = [isinstance(each, str) for each in completions]
    if any(kinds) and not all(kinds):
        i = kinds.index(not kinds[0])
        raise BayesKLRLError(
            f"Completions must be all texts or all token ids; number {i} is {completions[i]!r}, number 0 {completions[0]!r}."
        )


def _set_common(data: Preferences | Scores, num: int) -> None:
    """Set prompts and columns of a frozen data set, one entry per row; other lengths and reserved names are refused."""
    prompts: Any = as_prompts(data.prompts)
    listed = None if isinstance(prompts, str | Conversation) else prompts
    if isinstance(prompts, str | Conversation) or (listed and all(_is_id(token) for token in listed)):
        listed = [prompts] * num
    if listed is None or len(listed) != num:
        raise BayesKLRLError(
            f"prompts is one prompt for all, or a list of {num}, one per row; got "
            f"{repr(prompts) if listed is None else str(len(listed)) + ' of them'}."
        )
    if not any(all(isinstance(prompt, kind) for prompt in listed) for kind in (str, Conversation)):
        listed = [tuple(int(token) for token in prompt) if _all_ids(prompt) else prompt for prompt in listed]
        for i, prompt in enumerate(listed):
            if not isinstance(prompt, tuple) or isinstance(prompt, Conversation):
                raise BayesKLRLError(
                    f"prompts[{i}] must be of one kind with the others, text, token ids or messages; got {prompt!r}."
                )
    if not isinstance(data.columns, Mapping):
        raise BayesKLRLError(f"columns is a dictionary, each column a list of {num} values; got {data.columns!r}.")
    for name, values in data.columns.items():
        if name in RESERVED_NAMES or isinstance(values, str) or not hasattr(values, "__len__") or len(values) != num:
            raise BayesKLRLError(
                f"Column {name!r} needs one value per row, {num} in a list, and a name that is not reserved; got {values!r}."
            )
    object.__setattr__(data, "prompts", tuple(listed))
    object.__setattr__(data, "columns", {name: tuple(values) for name, values in data.columns.items()})


def _all_ids(prompt: Any) -> bool:
    """Whether a prompt is a sequence of token ids."""
    return isinstance(prompt, list | tuple | np.ndarray) and all(_is_id(token) for token in prompt)


def _numbers(name: str, values: Any) -> FloatArray:
    """Return a list of numbers as float64 (n,); the error names the first entry that is not a number."""
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise BayesKLRLError(f"{name} is a list of numbers; got {values!r}.")
    numbers = np.empty(len(values))
    for i, value in enumerate(values):
        try:
            if value is None or isinstance(value, str | bytes):
                raise TypeError
            numbers[i] = float(value)
        except (TypeError, ValueError):
            raise BayesKLRLError(f"{name}[{i}] must be a number; got {value!r}.") from None
    return numbers


def _positive_noise(noise: Any, num: int) -> FloatArray:
    """Return the noise of each score, shape (n,), refusing values that are not positive and finite."""
    each = [noise] * num if np.ndim(noise) == 0 else noise
    sds = _numbers("noise", each)
    if sds.shape != (num,) or not (np.isfinite(sds) & (sds > 0)).all():
        raise BayesKLRLError(
            f"noise is a positive standard deviation, one for all or one for each of the {num} scores; got {noise!r}. For "
            "noise that is not known leave it out: it is inferred."
        )
    return sds
