"""A style classifier: does a text read like speech, or like narration, in Jane Austen's novels?

Logistic regression on hashed words and pairs of words; quotation marks are not read, so that a text cannot look like speech
by punctuation alone. `examples/train_style.py` trains the weights, which are shipped.

    log odds(speech | x) = b + w . phi(x) / |phi(x)|,      phi(x) the counts of words and pairs of words, hashed

As a reward it is log P(speech | x): at alpha = 1 the posterior is Bayes' rule itself, p0(x) P(speech | x) / P(speech), and
the log evidence is the log-probability that the prior's text is speech.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayes_klrl.errors import CheckpointError
from bayes_klrl.typing import FloatArray

__all__ = ["FOLDER", "StyleClassifier", "features", "hashed", "held_out"]

NUM_FEATURES = 2**15
LEAST = 1e-4  # the least probability of a style, so that the reward is bounded
FOLDER = Path(__file__).parents[1] / "shipped" / "style"
_WORDS = re.compile(r"[\w']+|[^\w\s\"]")


def features(text: str) -> list[int]:
    """Return the hashed words and pairs of words of a text; quotation marks are left out.

    >>> len(features('"Pray, do not."')), features('"Pray"') == features("pray")
    (9, True)
    """
    words = [word.strip("'") or word for word in _WORDS.findall(text.lower())]
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return [zlib.crc32(entry.encode()) % NUM_FEATURES for entry in [*words, *pairs]]


def hashed(texts: Sequence[str]) -> tuple[FloatArray, np.ndarray, np.ndarray]:
    """Return phi / |phi| of each text in the form of `scipy.sparse.csr_matrix`: values, columns, and where rows begin."""
    values, columns, starts = [], [], [0]
    for text in texts:
        found, counts = np.unique(np.array(features(text), dtype=np.int64), return_counts=True)
        values.append(counts / max(float(np.linalg.norm(counts)), 1.0))
        columns.append(found)
        starts.append(starts[-1] + len(found))
    return (
        np.concatenate([np.zeros(0), *values]),
        np.concatenate([np.zeros(0, dtype=np.int64), *columns]),
        np.array(starts),
    )


@dataclass(frozen=True, eq=False)
class StyleClassifier:
    """The classifier, as it was trained.

    Parameters
    ----------
    weights
        w, one weight for each hashed feature, shape (NUM_FEATURES,).
    bias
        b, the log odds of a text without words.
    """

    weights: FloatArray
    bias: float

    @classmethod
    def shipped(cls) -> StyleClassifier:
        """Return the classifier that ships with the package.

        Raises
        ------
        CheckpointError
            If its file is missing, or is not one of this class.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            stored = load_file(FOLDER / "style.safetensors")
            return cls(stored["weights"].astype(np.float64), float(stored["bias"][0]))
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"The style classifier in {str(FOLDER)!r} cannot be read ({error}). Train it anew: python "
                "examples/train_style.py, or install the package again."
            ) from error

    def log_odds(self, texts: Sequence[str]) -> FloatArray:
        """Return log P(speech | x) - log P(narration | x) of each text, shape (N,)."""
        values, columns, starts = hashed(texts)
        sums = np.concatenate([[0.0], np.cumsum(values * self.weights[columns])])
        odds: FloatArray = self.bias + sums[starts[1:]] - sums[starts[:-1]]
        return odds

    def log_probs(self, completions: Sequence[str]) -> list[float]:
        """Return log P(speech | x) of each text, not below log `LEAST`: a reward function."""
        odds = self.log_odds(completions)
        logs: list[float] = np.maximum(-np.logaddexp(0.0, -odds), np.log(LEAST)).tolist()
        return logs


def held_out() -> list[tuple[bool, str]]:
    """Return sentences of chapters that neither the classifier nor the prior was trained on, and whether each is speech."""
    content: list[list[object]] = json.loads((FOLDER / "held_out.json").read_text(encoding="utf-8"))
    return [(bool(is_speech), str(text)) for is_speech, text in content]
