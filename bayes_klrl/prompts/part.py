"""Some prompts of a posterior, as a posterior that asks the whole one for rewards and twists: how work is split by prompts.

`Posterior.select` makes a new posterior, whose likelihood is bound anew and whose twists and error messages number its prompts
anew. A part keeps what belongs to the whole: the bound likelihood, and the numbers by which twists and messages call a prompt.
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.posterior import Posterior
from bayes_klrl.prompts.words import prompt_words
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["PosteriorPart", "in_whole", "named_prompt", "whole_of"]


class PosteriorPart(Posterior):
    """The posterior of some prompts of another one, with the very same likelihood.

    Parameters
    ----------
    whole
        The posterior of all prompts.
    indices
        The indices of the part's prompts among those of the whole.

    Examples
    --------
    A reward that depends on the number of the prompt pays the same in the part:

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> numbered = bk.TokenReward(lambda tokens, lengths, prompt_index: prompt_index, alpha=1.0)
    >>> whole = bk.Posterior(coin, numbered, prompts=[[0], [0, 0], [0, 0, 0]], max_new_tokens=2)
    >>> part = PosteriorPart(whole, np.array([2]))
    >>> part.prompt_ids, part.reward([[1]])
    (((0, 0, 0),), array([[2.]]))
    """

    def __init__(self, whole: Posterior, indices: IntArray) -> None:
        self.whole, self.indices = whole, indices
        self.prior, self.max_new_tokens = whole.prior, whole.max_new_tokens
        self._given, self.likelihood = whole._given, whole.likelihood
        self.prompts = tuple(whole.prompts[p] for p in indices)
        self.prompt_ids = tuple(whole.prompt_ids[p] for p in indices)
        self.prompt_numbers = whole.prompt_numbers[indices]
        self.columns = {name: tuple(values[p] for p in indices) for name, values in whole.columns.items()}

    def at_alpha(self, alpha: float) -> PosteriorPart:
        """See `Posterior.at_alpha`."""
        return PosteriorPart(self.whole.at_alpha(alpha), self.indices)

    def reward_of_rows(self, tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
        """See `Posterior.reward_of_rows`; `prompt_index` counts the prompts of the part."""
        return self.whole.reward_of_rows(tokens, lengths, self.indices[prompt_index])


def in_whole(posterior: Posterior, prompt_index: IntArray) -> tuple[Posterior, IntArray]:
    """Return the whole posterior and the indices of prompts in it; a posterior that is no part is the whole itself.

    Twists are asked by these, for they are made for all prompts.
    """
    if isinstance(posterior, PosteriorPart):
        return posterior.whole, posterior.indices[prompt_index]
    return posterior, prompt_index


def whole_of(posterior: Posterior) -> Posterior:
    """Return the whole posterior."""
    return posterior.whole if isinstance(posterior, PosteriorPart) else posterior


def named_prompt(posterior: Posterior, p: int) -> str:
    """Return what an error message calls prompt `p`: its number in the whole posterior, and its words."""
    return f"prompt {in_whole(posterior, np.array([p]))[1][0]} ({prompt_words(posterior.prompts[p])})"
