"""Ready-made reward functions on text, with the signature that TRL gives them.

They return plain numbers; `bk.Reward(fn, alpha=...)` turns them into likelihoods. They need `pip install
'bayes_klrl[rewards]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from bayes_klrl.errors import needs

__all__ = ["sentiment", "similarity_to"]


def sentiment(completions: Sequence[str]) -> list[float]:
    """Return the VADER compound sentiment of each text, from -1 (gloomy) to 1 (cheerful); Hutto and Gilbert (2014).

    Examples
    --------
    >>> cheerful, gloomy = sentiment(["What a delightful, happy day!", "He was a cruel and miserable man."])
    >>> cheerful > 0.5, gloomy < -0.5
    (True, True)
    """
    analyser = _vader()
    return [float(analyser.polarity_scores(text)["compound"]) for text in completions]


def similarity_to(target: str) -> Callable[[Sequence[str]], list[float]]:
    """Return a reward function for closeness to a target text: 1 minus the normalised Levenshtein distance, from 0 to 1.

    Examples
    --------
    >>> similarity_to("tea")(["tea", "pea", ""])[0]
    1.0
    """
    with needs("bk.rewards.similarity_to", "rewards", "rapidfuzz"):
        from rapidfuzz.distance import Levenshtein

    def similarity(completions: Sequence[str]) -> list[float]:
        return [float(Levenshtein.normalized_similarity(text, target)) for text in completions]

    return similarity


@cache
def _vader() -> Any:
    """Return VADER's analyser; reading its lexicon takes a tenth of a second."""
    with needs("bk.rewards.sentiment", "rewards", "vaderSentiment"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()
