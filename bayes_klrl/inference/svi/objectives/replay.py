"""Earlier draws that a training uses again: completions with the prior's log-prob and the reward that they had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["Replay"]

_SAME_PRIOR = 1e-3  # nats per token


class Replay:
    """The newest `size` draws of each prompt; log p0 and r never change, so they are kept.

    Examples
    --------
    >>> replay = Replay(3)
    >>> replay.add([0], np.array([[[1, 2], [3, 0]]]), np.array([[2, 1]]), np.zeros((1, 2)), np.ones((1, 2)))
    >>> tokens, lengths, log_prior, reward = replay.of([0])
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
        reward: FloatArray,
    ) -> None:
        """Keep draws: tokens (P, N, T), the other arrays (P, N), for P prompts by their indices."""
        for row, p in enumerate(prompts):
            new = (tokens[row], lengths[row], log_prior[row], reward[row])
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
        tokens, lengths, log_prior, reward = (np.stack([part[-count:] for part in each]) for each in parts)
        return tokens, lengths, log_prior, reward

    def fill(self, posterior: Posterior, draws: Draws) -> None:
        """Keep draws of any method.

        Raises
        ------
        BayesKLRLError
            If they are of other prompts or of another prior: its log-probs are computed anew, and compared.
        """
        sequences = posterior.sequences(draws)
        log_prior = posterior.log_prior(sequences)
        furthest = np.abs(log_prior - draws.log_prior).max()
        if not furthest <= _SAME_PRIOR * sequences.lengths.max():
            raise BayesKLRLError(
                f"The draws to replay are of another prior, or of other prompts: their log p0 differ by up to {furthest:.3g} "
                "nats from this posterior's. Take draws that were made with its prior and prompts."
            )
        reward = posterior.reward(sequences)
        if not np.isfinite(reward).all():
            raise BayesKLRLError("Some draws to replay have likelihood 0, where log w is -inf. Leave these out.")
        self.add(range(posterior.num_prompts), sequences.tokens, sequences.lengths, log_prior, reward)

    def state(self) -> dict[str, Any]:
        """Return all draws as arrays by name, for a checkpoint."""
        names = ("tokens", "lengths", "log_prior", "reward")
        return {f"{p}.{name}": part for p, kept in self._kept.items() for name, part in zip(names, kept, strict=True)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        prompts = sorted({int(key.split(".")[0]) for key in state})
        names = ("tokens", "lengths", "log_prior", "reward")
        self._kept = {}
        for p in prompts:
            tokens, lengths, log_prior, reward = (np.asarray(state[f"{p}.{name}"]) for name in names)
            self._kept[p] = tokens, lengths, log_prior, reward
