"""A language model as a NumPyro distribution over whole completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.distributions import Distribution, constraints

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.decoding import Decoding
from bayes_klrl.models.programs.traced_features import called_features, traced_features
from bayes_klrl.models.programs.traced_rewards import abstract, float_type
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.sequences import Sequences, completion_lengths, pad_token
from bayes_klrl.typing import Array, JaxModel, LanguageModel, TokenIds

__all__ = ["SequenceDistribution", "padded_past_eos"]


class SequenceDistribution(Distribution):
    """A language model as a NumPyro distribution over completions: batch shape (..., P), event shape (T,).

    A draw is a row of int32 token ids, padded past EOS. `log_prob` sums the tokens' log-probs, in float32 or, if
    `jax_enable_x64` is on, in float64; tokens past EOS are ignored. A model on JAX (`JaxLM`, or another with the methods of
    `JaxModel`) is traced, and differentiable in the parameters given to `with_parameters`. Any other model is called on the
    host and has no gradient.

    There is no reparametrisation, and the class says so by `has_rsample`. NumPyro would infer the contrary from an empty
    `arg_constraints`, and drop the score-function term of the gradient without any warning.

    Parameters
    ----------
    lm
        The language model that draws and scores.
    prompt_ids
        Token ids of the prompts, of which there may be more than P.
    max_new_tokens
        T, the largest length of a completion.
    chosen
        Indices of the P prompts that completions follow, shape (P,), possibly traced; None: all prompts, in order.
    batch_shape
        The batch shape (..., P); None: (P,).

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> one = SequenceDistribution(coin, [[0]], 3)
    >>> one.batch_shape, one.event_shape, one.has_rsample
    ((1,), (3,), False)
    >>> np.exp(one.log_prob(jnp.array([[0, 1, 0]]))).round(3).tolist()
    [0.25]

    A joint model: reward weights theta, completions x, and theta . f(x) as the reward.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model():
    ...     theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     with numpyro.plate("prompts", 1, dim=-1):
    ...         p = SequenceDistribution(coin, [()], 3)
    ...         x = numpyro.sample("x", p)
    ...         f = p.features(lambda tokens, lengths: jnp.stack([lengths, lengths == 3], axis=1), x)
    ...         numpyro.factor("likelihood", (theta * f).sum(-1) / 0.5)
    >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
    >>> trace["x"]["value"].shape, trace["likelihood"]["fn"].log_factor.shape
    ((1, 3), (1,))
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (the base class's own declaration)
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(
        self,
        lm: LanguageModel,
        prompt_ids: Sequence[TokenIds],
        max_new_tokens: int,
        *,
        chosen: Array | None = None,
        batch_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.lm = lm
        self.prompt_ids = tuple(tuple(ids) for ids in prompt_ids)
        self.chosen = jnp.arange(len(prompt_ids)) if chosen is None else chosen
        shape = self.chosen.shape if batch_shape is None else tuple(batch_shape)
        super().__init__(shape, (max_new_tokens,), validate_args=False)

    def tree_flatten(self) -> tuple[Any, Any]:
        """Return the arrays, which may be traced, and the static attributes."""
        parameters = self.lm.parameters if isinstance(self.lm, JaxModel) else None
        return (parameters, self.chosen), (self.lm, self.prompt_ids, self._batch_shape, self._event_shape)

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> SequenceDistribution:
        """Return the distribution from the results of `tree_flatten`; JAX may put placeholders in place of the arrays."""
        lm, prompt_ids, batch_shape, event_shape = aux_data
        parameters, chosen = params
        self = cls.__new__(cls)
        leaves = jax.tree.leaves(parameters)
        self.lm = lm.with_parameters(parameters) if leaves and hasattr(leaves[0], "shape") else lm
        self.prompt_ids, self.chosen = prompt_ids, chosen
        Distribution.__init__(self, batch_shape, event_shape, validate_args=False)
        return self

    def expand(self, batch_shape: Sequence[int]) -> SequenceDistribution:
        """Return the distribution with more leading batch dimensions."""
        shape, num_prompts = tuple(batch_shape), self._batch_shape[-1]
        if shape[-1:] != (num_prompts,):
            raise BayesKLRLError(
                f"The last batch dimension of a SequenceDistribution is its {num_prompts} prompts; it cannot be expanded to "
                f"{shape}. Use the dimensions before it for several completions per prompt."
            )
        return SequenceDistribution(
            self.lm, self.prompt_ids, self._event_shape[0], chosen=self.chosen, batch_shape=shape
        )

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Return independent completions, shape sample_shape + (..., P, T), int32."""
        shape = (*sample_shape, *self._batch_shape, *self._event_shape)
        num_prompts, num_tokens = shape[-2:]
        num_draws = int(np.prod(shape[:-2], dtype=np.int64))
        if isinstance(self.lm, JaxModel):
            uniforms = random.uniform(key, (num_prompts, num_draws, num_tokens))
            by_prompt, _ = self.lm.sample_tokens(self._padded_prompts(), uniforms)
        else:
            bits = random.bits(key, (num_prompts, num_draws, num_tokens, 2), jnp.uint32)
            expected = abstract((num_prompts, num_draws, num_tokens), jnp.int32)
            by_prompt = jax.pure_callback(self._drawn, expected, bits, self.chosen, vmap_method="broadcast_all")
        return by_prompt.swapaxes(0, 1).reshape(shape)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Return log p(x | c) of completions (..., P, T), shape (..., P)."""
        by_prompt, inside, batch_shape = self._by_prompt(value)
        if isinstance(self.lm, JaxModel):
            scores = self.lm.score_tokens(self._padded_prompts(), by_prompt)
            total = jnp.where(inside, scores, 0.0).sum(axis=2, dtype=float_type())
        else:
            expected = abstract(by_prompt.shape[:2], float_type())
            total = jax.pure_callback(self._scored, expected, by_prompt, self.chosen, vmap_method="broadcast_all")
        return total.T.reshape(batch_shape)

    def position_log_probs(self, value: Array) -> tuple[Array, Array, Array]:
        """Return log p(. | c, x_<t) at every position, (..., P, T, V), the tokens and the mask up to EOS, (..., P, T)."""
        if not hasattr(self.lm, "score_positions"):
            raise BayesKLRLError(
                f"The Rao-Blackwellised estimator needs score_positions, which {type(self.lm).__name__} lacks. Use the "
                "leave-one-out estimator."
            )
        by_prompt, inside, batch_shape = self._by_prompt(value)
        scores = self.lm.score_positions(self._padded_prompts(), by_prompt)
        arrays = (array.swapaxes(0, 1) for array in (scores, by_prompt, inside))
        log_probs, tokens, mask = (array.reshape((*batch_shape, *array.shape[2:])) for array in arrays)
        return log_probs, tokens, mask

    def features(self, fn: Callable[[Any, Any], Any], value: Array, *, callback: bool = False) -> Array:
        """Return f(x) of completions (..., P, T), shape (..., P) or (..., P, K), float32 or, as log-probs, float64.

        Parameters
        ----------
        fn
            A function `fn(tokens (M, T), lengths (M,))` that returns M numbers or M rows of K; positions past a length hold
            the EOS id (0 if there is none), as for `TokenReward`. It gets JAX arrays, which may be traced.
        value
            The completions, shape (..., P, T).
        callback
            True: call the function on the host with NumPy arrays, for functions that JAX cannot trace. The texts are
            `lm.decode([x[:n] for x, n in zip(tokens, lengths)])`.

        Raises
        ------
        RewardError
            If `fn` cannot be traced, or returns anything else, or NaN. Inside a compiled program NaN is found only with
            `callback`, and JAX raises its own error from this one.
        """
        rows, lengths = padded_past_eos(jnp.asarray(value).reshape(-1, value.shape[-1]), self.lm)
        found = called_features(fn, rows, self.lm) if callback else traced_features(fn, rows, lengths)
        return found.reshape(*value.shape[:-1], *found.shape[1:])

    def _padded_prompts(self) -> Any:
        """Return the chosen prompts as arrays."""
        padded = self.lm.pad_prompts(self.prompt_ids)  # type: ignore[attr-defined]
        return jax.tree.map(lambda array: jnp.asarray(array)[self.chosen], padded)

    def _by_prompt(self, value: Array) -> tuple[Array, Array, tuple[int, ...]]:
        """Return completions as (P, N, T), padded past EOS, with the mask of tokens up to EOS, and their batch shape."""
        batch_shape = np.broadcast_shapes(self._batch_shape, value.shape[:-1])
        tokens = jnp.broadcast_to(value, (*batch_shape, *self._event_shape)).astype(jnp.int32)
        by_prompt = tokens.reshape(-1, *tokens.shape[-2:]).swapaxes(0, 1)
        padded, lengths = padded_past_eos(by_prompt, self.lm)
        return padded, jnp.arange(padded.shape[-1]) < lengths[..., None], batch_shape

    def _drawn(self, bits: Array, chosen: Array) -> np.ndarray:
        """Return completions on the host, (..., P, N, T), from random bits (..., P, N, T, 2)."""
        high, low = np.moveaxis(np.asarray(bits).astype(np.uint64), -1, 0)
        uniforms = ((high >> np.uint64(5)) * 2.0**26 + (low >> np.uint64(6))) / 2.0**53
        return self._each_choice(self._decoded, uniforms, chosen).astype(np.int32)

    def _scored(self, tokens: Array, chosen: Array) -> np.ndarray:
        """Return log-probs of completions (..., P, N, T) on the host, (..., P, N)."""
        found = self._each_choice(self._completion_log_probs, np.asarray(tokens).astype(np.int64), chosen)
        return found.astype(np.dtype(float_type()))

    def _each_choice(self, function: Any, arrays: np.ndarray, chosen: Array) -> np.ndarray:
        """Return function(prompts, array), (..., P, N, ...), of arrays (..., P, N, T), by one call per choice of prompts."""
        leading, (num_prompts, num_draws) = arrays.shape[:-3], arrays.shape[-3:-1]
        flat = arrays.reshape(-1, *arrays.shape[-3:])
        choices = np.asarray(chosen).reshape(-1, num_prompts)
        found: list[Any] = [None] * len(flat)
        for choice in np.unique(choices, axis=0):
            members = np.flatnonzero((choices == choice).all(axis=1))
            joint = flat[members].swapaxes(0, 1).reshape(num_prompts, -1, arrays.shape[-1])
            prompts = [self.prompt_ids[index] for index in choice]
            result = function(prompts, joint)
            parts = result.reshape(num_prompts, len(members), num_draws, *result.shape[2:]).swapaxes(0, 1)
            for member, part in zip(members, parts, strict=True):
                found[member] = part
        return np.stack(found).reshape(*leading, *found[0].shape)

    def _decoded(self, prompts: Sequence[TokenIds], uniforms: np.ndarray) -> np.ndarray:
        """Return completions (P, N, T) drawn with given uniforms (P, N, T)."""
        decoding = Decoding((self.lm,), prompts, uniforms.shape[1], uniforms.shape[2])
        while not decoding.done:
            decoding.step(uniforms[..., decoding.step_count].ravel())
        return decoding.sequences().tokens

    def _completion_log_probs(self, prompts: Sequence[TokenIds], tokens: np.ndarray) -> np.ndarray:
        """Return log p(x | c) of completions (P, N, T)."""
        lengths = completion_lengths(tokens, self.lm.eos_token_ids)
        return completion_log_probs(self.lm, prompts, Sequences(tokens, lengths))


def padded_past_eos(tokens: Array, lm: LanguageModel) -> tuple[Array, Array]:
    """Return completions (..., T) with the padding id past their first EOS, and their lengths (...)."""
    is_eos = jnp.isin(tokens, jnp.array(sorted(lm.eos_token_ids), dtype=tokens.dtype))
    num_tokens = tokens.shape[-1]
    lengths = jnp.where(is_eos.any(axis=-1), is_eos.argmax(axis=-1) + 1, num_tokens)
    inside = jnp.arange(num_tokens) < lengths[..., None]
    return jnp.where(inside, tokens, pad_token(lm.eos_token_ids)), lengths
