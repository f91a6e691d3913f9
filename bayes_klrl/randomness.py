"""Random numbers from explicit seeds, in streams that do not depend on how the work is split.

Every number comes from a NumPy generator on the host, for every backend. The draws of a method come in blocks, and each block
has a seed of its own: (seed, repeat, method, prompt, block). `stream_seed` makes one number of (seed, repeat, method), and
`Streams` adds the prompt and the block. So the first N draws of a prompt are the same whatever N is asked for, whichever other
prompts the posterior has, and however draws are spread over batches or processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.typing import FloatArray, TokenIds

__all__ = [
    "DRAWS_PER_BLOCK",
    "Generators",
    "PromptKey",
    "Streams",
    "check_seed",
    "generator",
    "prompt_keys",
    "stream_seed",
]

DRAWS_PER_BLOCK = 256
"""Number of draws of one prompt that share a generator."""

PromptKey = tuple[int, ...]

Generators = Sequence[np.random.Generator]
"""One generator for each prompt, or for each run of each prompt, so that none depends on the others."""


def check_seed(seed: object) -> int:
    """Return the seed as an int, refusing what is not a non-negative integer."""
    check_count("seed", seed, least=0)
    return int(seed)  # type: ignore[call-overload, no-any-return]


def generator(seed: object, *stream: int) -> np.random.Generator:
    """Return the generator of a seed; if numbers are given, the generator of that numbered stream of the seed."""
    return np.random.default_rng([check_seed(seed), *stream] if stream else check_seed(seed))


def stream_seed(seed: object, repeat: int, name: str) -> int:
    """Return the seed of one row of a comparison: it depends on (seed, repeat, name), not on the other rows.

    Examples
    --------
    >>> stream_seed(0, 0, "SMC") == stream_seed(0, 0, "SMC"), stream_seed(0, 0, "SMC") == stream_seed(0, 1, "SMC")
    (True, False)
    """
    entropy = np.random.SeedSequence([check_seed(seed), repeat, *name.encode()])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def prompt_keys(prompt_ids: Sequence[TokenIds]) -> list[PromptKey]:
    """Return the key of each prompt in the seed of a block: the number of equal prompts before it, and its token ids.

    A prompt keeps its key, and so its draws, when other prompts are added, removed or moved.

    Examples
    --------
    >>> prompt_keys([[5], [7, 8], [5]])
    [(0, 5), (0, 7, 8), (1, 5)]
    """
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for ids in prompt_ids:
        content = tuple(int(token) for token in ids)
        keys.append((seen[content], *content))
        seen[content] += 1
    return keys


@dataclass(frozen=True)
class Streams:
    """The random numbers of one method, a stream for each prompt.

    Parameters
    ----------
    entropy
        The seed, followed by numbers that tell several streams of one seed apart; `of` makes it.

    Examples
    --------
    >>> streams, keys = Streams.of(0), prompt_keys([[5], [7, 8]])
    >>> few, many = streams.uniforms(keys, 0, 2, 3), streams.uniforms(keys[1:], 0, 300, 3)
    >>> few.shape, bool((few[:, 2:] == many[:, :2]).all())
    ((3, 4), True)
    """

    entropy: tuple[int, ...]

    @classmethod
    def of(cls, seed: object, *stream: int) -> Streams:
        """Return the streams of a seed; if numbers are given, the streams of that number beside them."""
        return cls((check_seed(seed), *stream))

    def beside(self, *stream: int) -> Streams:
        """Return other streams of the same seed, for another purpose."""
        return Streams((*self.entropy, *stream))

    def generator(self, key: PromptKey, block: int) -> np.random.Generator:
        """Return the generator of one block of one prompt."""
        # lengths first, so that no two lists of parts make the same list of numbers
        return np.random.default_rng([len(self.entropy), *self.entropy, block, *key])

    def generators(self, prompt_ids: Sequence[TokenIds], runs: Sequence[int] = (0,)) -> list[np.random.Generator]:
        """Return a generator for each run of each prompt, prompt by prompt, for methods whose draws depend on one another."""
        return [self.generator(key, run) for key in prompt_keys(prompt_ids) for run in runs]

    def uniforms(self, keys: Sequence[PromptKey], first: int, num_draws: int, width: int) -> FloatArray:
        """Return numbers from [0, 1) for draws first, first + 1, ... of some prompts.

        Parameters
        ----------
        keys
            The keys of the P prompts, as `prompt_keys` returns them.
        first, num_draws
            The number of the first draw in each prompt's stream, and N, the number of draws per prompt.
        width
            Random numbers per draw: T for completions of at most T tokens.

        Returns
        -------
        The random numbers, shape (width, P * N), prompt by prompt.
        """
        rows = np.concatenate([self._of_prompt(key, first, num_draws, width) for key in keys])
        return np.ascontiguousarray(rows.T)

    def _of_prompt(self, key: PromptKey, first: int, num_draws: int, width: int) -> FloatArray:
        """Return the numbers of draws first, ..., first + N - 1 of one prompt, shape (N, width)."""
        blocks, last = [], first + num_draws
        for block in range(first // DRAWS_PER_BLOCK, -(-last // DRAWS_PER_BLOCK)):
            start = block * DRAWS_PER_BLOCK
            skipped = max(first - start, 0)
            rng = self.generator(key, block)
            rng.bit_generator.advance(skipped * width)  # type: ignore[attr-defined]  # PCG64, one step per number
            blocks.append(rng.random((min(DRAWS_PER_BLOCK, last - start) - skipped, width)))
        return np.concatenate(blocks)
