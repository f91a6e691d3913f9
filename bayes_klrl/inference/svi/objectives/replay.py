"""Earlier draws that a training uses again: completions with the prior's log-prob and the likelihood that they had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["Replay"]


class Replay:
    """The newest `size` draws of each prompt; log p0 and r / alpha never change, so they are kept.

    Examples
    --------
    >>> replay = Replay(3)
    >>> replay.add([0], np.array([[[1, 2], [3, 0]]]), np.array([[2, 1]]), np.zeros((1, 2)), np.ones((1, 2)))
    >>> tokens, lengths, log_prior, log_likelihood = replay.of([0])
    >>> tokens.shape, lengths.tolist()
    ((1, 2, 2), [[2, 1]])
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[int, tuple[IntArray, IntArray, FloatArray, FloatArray]] = {}

    def add(
        self,
        prompts: Sequence[int],
        tokens: IntArray,
        lengths: IntArray,
        log_prior: FloatArray,
        log_likelihood: FloatArray,
    ) -> None:
        """Keep draws: tokens (P, N, T), the other arrays (P, N), for P prompts by their indices."""
        for row, p in enumerate(prompts):
            new = (tokens[row], lengths[row], log_prior[row], log_likelihood[row])
            old = self._kept.get(int(p))
            joined = new if old is None else tuple(np.concatenate(pair) for pair in zip(old, new, strict=True))
            first, second, third, fourth = (part[-self.size :] for part in joined)
            self._kept[int(p)] = first, second, third, fourth

    def of(self, prompts: Sequence[int]) -> tuple[IntArray, IntArray, FloatArray, FloatArray] | None:
        """Return the newest draws of some prompts, as many of each as the one with the fewest has; None if there are none."""
        count = min((len(self._kept[int(p)][1]) if int(p) in self._kept else 0 for p in prompts), default=0)
        if count == 0:
            return None
        parts = zip(*(self._kept[int(p)] for p in prompts), strict=True)
        tokens, lengths, log_prior, log_likelihood = (np.stack([part[-count:] for part in each]) for each in parts)
        return tokens, lengths, log_prior, log_likelihood

    def state(self) -> dict[str, Any]:
        """Return all draws as arrays by name, for a checkpoint."""
        names = ("tokens", "lengths", "log_prior", "log_likelihood")
        return {f"{p}.{name}": part for p, kept in self._kept.items() for name, part in zip(names, kept, strict=True)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        prompts = sorted({int(key.split(".")[0]) for key in state})
        names = ("tokens", "lengths", "log_prior", "log_likelihood")
        self._kept = {}
        for p in prompts:
            tokens, lengths, log_prior, log_likelihood = (np.asarray(state[f"{p}.{name}"]) for name in names)
            self._kept[p] = tokens, lengths, log_prior, log_likelihood
