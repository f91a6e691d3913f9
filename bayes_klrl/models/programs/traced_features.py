"""Features f(x) of completions that are JAX arrays, traced with the program or computed by NumPy on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayes_klrl.errors import RewardError
from bayes_klrl.models.programs.completion_features import features_error, host_features
from bayes_klrl.models.programs.traced_rewards import abstract, first_lines, float_type
from bayes_klrl.sequences import pad_token
from bayes_klrl.typing import Array, LanguageModel

__all__ = ["called_features", "traced_features"]


def traced_features(fn: Callable[[Array, Array], Any], tokens: Array, lengths: Array) -> Array:
    """Return f(x) of M completions, padded past EOS, shape (M,) or (M, K), from a function that JAX traces.

    Raises
    ------
    RewardError
        If the function cannot be traced, or its result has another shape, or, for concrete arrays, contains NaN.
    """
    try:
        found = jnp.asarray(fn(tokens, lengths)).astype(float_type())
    except Exception as error:  # any error of a function that reads the values of a traced array
        raise RewardError(
            f"Features cannot be traced by JAX, {type(error).__name__}: {first_lines(error)}. Write them in jax.numpy, with "
            "no loop or `if` over values and no assignment to an array, or let them be computed on the host: "
            "features(..., callback=True)."
        ) from error
    has_nan = not isinstance(found, jax.core.Tracer) and bool(jnp.isnan(found).any())
    if found.ndim not in (1, 2) or len(found) != len(tokens) or has_nan:
        raise features_error(len(tokens), found.shape, has_nan=has_nan)
    return found


def called_features(fn: Callable[[Any, Any], Any], tokens: Array, lm: LanguageModel) -> Array:
    """Return f(x) of M completions, shape (M,) or (M, K), from a function of NumPy arrays, called on the host.

    For traced arrays the function is called once with two empty completions to find K, the number of features.

    Raises
    ------
    RewardError
        If the function returns anything else. While a compiled program runs, JAX raises its own error from this one.
    """
    if not isinstance(tokens, jax.core.Tracer):
        return jnp.asarray(host_features(fn, np.asarray(tokens).astype(np.int64), lm), dtype=float_type())
    probe = np.full((2, tokens.shape[1]), pad_token(lm.eos_token_ids), dtype=np.int64)
    columns = host_features(fn, probe, lm).shape[1:]

    def called(rows: Array) -> np.ndarray:
        host = np.asarray(rows).astype(np.int64)
        found = host_features(fn, host.reshape(-1, host.shape[-1]), lm)
        if found.shape[1:] != columns:
            raise features_error(len(found), found.shape)
        return found.reshape(*host.shape[:-1], *columns).astype(np.dtype(float_type()))

    expected = abstract((len(tokens), *columns), float_type())
    return jax.pure_callback(called, expected, tokens, vmap_method="broadcast_all")
