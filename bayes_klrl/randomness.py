"""Explicit seeds: every draw comes from a NumPy generator made here."""

from __future__ import annotations

import numpy as np

from bayes_klrl.checks import check_count

__all__ = ["check_seed", "generator", "stream_seed"]


def check_seed(seed: object) -> int:
    """Return the seed as an int, refusing what is not a non-negative integer."""
    check_count("seed", seed, least=0)
    return int(seed)  # type: ignore[call-overload, no-any-return]


def generator(seed: object, *stream: int) -> np.random.Generator:
    """Return the generator of a seed; of a numbered stream beside it, if numbers are given."""
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
