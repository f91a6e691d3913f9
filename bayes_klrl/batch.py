"""The table of completions that reward functions see.

`Batch` is the table that a posterior hands to its likelihood. How functions are called with its columns is in
`bayes_klrl.reward_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bayes_klrl.prompts.chat import as_message, copied, is_messages
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import IntArray, LanguageModel, TokenIds

__all__ = ["BATCH_NAMES", "RESERVED_NAMES", "Batch", "Setting", "completion_texts"]

BATCH_NAMES = ("prompts", "completions", "completion_ids", "finished")
RESERVED_NAMES = frozenset(
    {
        *BATCH_NAMES,
        "tokens",
        "lengths",
        "prompt_index",
        "prior",
        "likelihood",
        "max_new_tokens",
        "chat_template_kwargs",
        "self",
    }
)


@dataclass(frozen=True, eq=False)
class Setting:
    """Every part of a posterior except its likelihood: this is what a factor may depend on, see `Likelihood.bind`.

    Parameters
    ----------
    prior
        The pretrained language model p0.
    prompts, prompt_ids
        The P prompts as the user gave them, and the same prompts as token ids. A conversation has its rendered text with it.
    columns
        Further data about the prompts, each column of length P.
    max_new_tokens
        T, the largest number of tokens in a completion, EOS included.
    prompt_numbers
        The number by which a reward that asks for `prompt_index` knows each prompt, shape (P,).
    """

    prior: LanguageModel
    prompts: tuple[Any, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    columns: Mapping[str, Any]
    max_new_tokens: int
    prompt_numbers: IntArray


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
        The P prompts, as given to the posterior (texts, token ids, or conversations).
    columns
        Further data about the prompts, each column of length P.
    prior
        The language model, which decodes the completions and knows EOS.
    prompt_ids
        The P prompts as token ids; None: the completions are decoded without their prompts.
    prompt_numbers
        The number by which a reward that asks for `prompt_index` knows each prompt, shape (P,); None: 0, 1, ..., P - 1.
    """

    tokens: IntArray
    lengths: IntArray
    prompt_index: IntArray
    prompts: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    prior: LanguageModel
    prompt_ids: Sequence[TokenIds] | None = None
    prompt_numbers: IntArray | None = None

    @property
    def numbers(self) -> IntArray:
        """The number of each completion's prompt, as a reward that asks for `prompt_index` knows it, shape (M,)."""
        return self.prompt_index if self.prompt_numbers is None else self.prompt_numbers[self.prompt_index]

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
        """Return the column that a reward function asks for by `name`, one entry per completion.

        Where the prompt is a conversation, the prompt is a list of messages, and the completion too, with one message of the
        assistant: the conversational format of TRL's reward functions. `completions` has the plain texts in any case.
        """
        if name == "completions":  # copies: a function may change what it is given
            return [
                as_message(text) if is_messages(self.prompts[p]) else text
                for p, text in zip(self.prompt_index, self.completions, strict=True)
            ]
        if name == "completion_ids":
            return [list(ids) for ids in self.completion_ids]
        if name == "finished":
            finished: list[bool] = self.sequences.finished(self.prior.eos_token_ids).ravel().tolist()
            return finished
        if name == "prompts":
            return [copied(self.prompts[p]) for p in self.prompt_index]
        column = self.columns[name]
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
