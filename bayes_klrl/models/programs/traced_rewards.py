"""Rewards of completions that are JAX arrays, concrete or traced.

    r(x) = sum_k c_k r_k(x)        factors k, each scaled to the product's alpha, as `Likelihood` does it

A `TokenReward` is called with JAX arrays and becomes part of the compiled program. All other factors (text, constraints,
automata, `TokenReward(..., callback=True)`) are computed on the host, in one callback for all of them, by the same code as in
every other algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from bayes_klrl.errors import RewardError
from bayes_klrl.likelihood import Factor, TokenReward
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import Array, FloatArray

__all__ = ["abstract", "check_traceable", "first_lines", "float_type", "host_errors", "is_traced", "traced_reward"]


def traced_reward(posterior: Posterior, tokens: Array, lengths: Array, prompt_index: Array) -> Array:
    """Return r(x, c) of M completions of any prompts, shape (M,), inside or outside of `jax.jit`, `jax.vmap` and `jax.grad`.

    The result is float32, or float64 if `jax_enable_x64` is on. Of a traced `TokenReward` only the shape is checked, during
    tracing; values computed on the host are checked as in every other algorithm.

    Parameters
    ----------
    posterior
        The posterior whose reward is computed.
    tokens, lengths, prompt_index
        The completions, shape (M, T), padded with `posterior.pad_token`; their lengths, shape (M,); and the index of the
        prompt of each, shape (M,), as for `Posterior.reward_of_rows`.

    Raises
    ------
    RewardError
        If a `TokenReward` cannot be traced; the message names it, repeats JAX's error and suggests `callback=True`. If a
        function on the host raises, this is a `RewardError` for concrete arrays and inside `host_errors`, else JAX's own error
        with this one in its text.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=2.0)
    >>> posterior = bk.Posterior(coin, longer ** 0.5 * longer, max_new_tokens=3)
    >>> tokens, lengths = np.array([[0, 1, 1], [1, 1, 1]]), np.array([2, 1])
    >>> jax.jit(lambda tokens, lengths: traced_reward(posterior, tokens, lengths, 0 * lengths))(tokens, lengths).tolist()
    [1.5, 0.75]
    """
    likelihood, numbers = posterior.likelihood, jnp.asarray(posterior.prompt_numbers)
    total = jnp.zeros(lengths.shape, dtype=float_type())
    for factor in likelihood.factors:
        if is_traced(factor):
            total = total + _values(factor, tokens, lengths, numbers[prompt_index]) * factor.scale_in(likelihood.alpha)
    if not all(map(is_traced, likelihood.factors)):
        total = total + _on_host(posterior, tokens, lengths, prompt_index)
    return total


def is_traced(factor: Factor) -> bool:
    """Return whether a factor becomes part of the compiled program; the others are called on the host."""
    return isinstance(factor, TokenReward) and not factor.callback


def float_type() -> Any:
    """Return the type that log-probs and rewards are summed in: float32, or float64 if `jax_enable_x64` is on."""
    return jnp.result_type(float)


def abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an abstract array, with a shape and a type but no values."""
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def check_traceable(posterior: Posterior) -> None:
    """Refuse a `TokenReward` that cannot be traced or returns the wrong shape, before anything is drawn."""
    tokens, per_row = abstract((3, posterior.max_new_tokens), jnp.int32), abstract((3,), jnp.int32)
    for factor in posterior.likelihood.factors:
        if is_traced(factor):
            jax.eval_shape(lambda *arrays: _values(factor, *arrays), tokens, per_row, per_row)  # noqa: B023  (called at once)


def _values(factor: Any, tokens: Array, lengths: Array, prompt_index: Array) -> Array:
    """Return a traced factor's reward, shape (M,)."""
    extra = dict.fromkeys(factor.asked_for, prompt_index)
    try:
        outcome = factor.fn(tokens, lengths, **extra)
        if outcome is None or isinstance(outcome, str | bytes):
            raise TypeError(f"it returned {outcome!r}")
        values = jnp.asarray(outcome)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            values = values.astype(float_type())
    except Exception as error:  # any error of a function that reads the values of a traced array
        raise RewardError(
            f"TokenReward {factor.label!r} cannot be traced by JAX, {type(error).__name__}: {first_lines(error)}. Write it "
            "in jax.numpy, with no loop or `if` over values and no assignment to an array, or have it called on the "
            "host: bk.TokenReward(..., callback=True)."
        ) from error
    if values.shape != lengths.shape:
        raise RewardError(
            f"TokenReward {factor.label!r} returned shape {values.shape} for {lengths.shape[0]} completions. It must return "
            "one float per completion, in order."
        )
    return values.astype(float_type())


def first_lines(error: Exception) -> str:
    """Return an error's message up to its first full stop; messages of JAX may be a page long."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def _on_host(posterior: Posterior, tokens: Array, lengths: Array, prompt_index: Array) -> Array:
    """Return the part of the reward that is computed on the host, shape (M,)."""
    arrays = (jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(prompt_index))
    function = _host_function(posterior)
    if not any(isinstance(array, jax.core.Tracer) for array in arrays):
        return jnp.asarray(function(*arrays))
    expected = abstract(lengths.shape, float_type())
    return jax.pure_callback(
        _with_collected_errors(posterior, function), expected, *arrays, vmap_method="broadcast_all"
    )


def _host_function(posterior: Posterior) -> Callable[..., np.ndarray]:
    """Return the sum of the factors that are not traced, as a function of arrays (..., M, T) and (..., M)."""
    alpha = posterior.likelihood.alpha
    factors = [factor for factor in posterior.likelihood.factors if not is_traced(factor)]
    dtype = np.dtype(float_type())

    def reward(tokens: Array, lengths: Array, prompt_index: Array) -> np.ndarray:
        rows = [np.asarray(array).astype(np.int64) for array in (tokens, lengths, prompt_index)]
        shape = rows[1].shape
        batch = posterior.batch(rows[0].reshape(-1, rows[0].shape[-1]), rows[1].ravel(), rows[2].ravel())
        total: FloatArray = sum(
            (factor.checked_values(batch) * factor.scale_in(alpha) for factor in factors), start=np.zeros(len(batch))
        )
        return total.reshape(shape).astype(dtype)

    return reward


_host_errors: WeakKeyDictionary[Posterior, list[BaseException]] = WeakKeyDictionary()
"""The exceptions that rewards raised inside a callback, for posteriors inside `host_errors`."""


@contextmanager
def host_errors(posterior: Posterior) -> Iterator[None]:
    """Raise at the end the exception that the posterior's reward raised on the host, instead of JAX's error about it.

    This includes `KeyboardInterrupt`. After an exception the callback returns NaN, so results computed inside must not be used
    if this raises.
    """
    errors = _host_errors[posterior] = []
    try:
        yield
    finally:
        del _host_errors[posterior]
        if errors:
            raise errors[0]


def _with_collected_errors(posterior: Posterior, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Return the function on the host, whose exceptions are stored for `host_errors` if that is active, else raised."""

    def called(tokens: Array, lengths: Array, prompt_index: Array) -> np.ndarray:
        try:
            return function(tokens, lengths, prompt_index)
        except BaseException as error:
            if posterior not in _host_errors:
                raise
            _host_errors[posterior].append(error)
            return np.full(np.shape(lengths), np.nan, dtype=np.dtype(float_type()))

    return called
