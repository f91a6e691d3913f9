"""The decoder of a posterior's draws, which knows the prompts that the completions follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bayes_klrl.batch import completion_texts
from bayes_klrl.typing import IntArray, LanguageModel, TokenIds

__all__ = ["PromptDecoder"]


@dataclass(frozen=True, eq=False)
class PromptDecoder:
    """Texts of completions, alone or as they follow their prompts."""

    lm: LanguageModel
    prompt_ids: Sequence[TokenIds]

    @classmethod
    def of(cls, lm: LanguageModel, prompt_ids: Sequence[TokenIds]) -> PromptDecoder | None:
        """Return the decoder of a model's completions, None if the model has no tokenizer."""
        return cls(lm, prompt_ids) if lm.tokenizer is not None else None

    def __call__(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each completion, decoded alone."""
        return list(self.lm.decode(ids))

    def after(self, prompt_index: IntArray, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each completion as it follows the prompt of its index."""
        return completion_texts(self.lm, [self.prompt_ids[p] for p in prompt_index], ids)
