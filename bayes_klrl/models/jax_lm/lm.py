"""GPT-2, Llama, Mistral, Qwen2 and Qwen3 checkpoints as a `LanguageModel` on JAX, without torch.

Each step is one jitted function of a parameter tree. A jitted function is compiled again for every new shape, which takes
seconds. To keep the number of shapes small, prompt lengths, rows, completions and cache capacities are rounded up to powers of
two, and surplus rows are cut off on the host.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayes_klrl.checks import check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.checkpoint_files import OWN_ENTRY, own_options
from bayes_klrl.models.jax_lm.config import architecture_of
from bayes_klrl.models.jax_lm.decoding import PaddedPrompts, Reading, StaticModels, Weights, read_tokens, sample_tokens
from bayes_klrl.models.jax_lm.forward import Parameters
from bayes_klrl.models.jax_lm.lockstep import JaxLockstep
from bayes_klrl.models.jax_lm.rows import (
    MIN_BUCKET,
    MIN_CAPACITY,
    Buffer,
    JaxState,
    chunk_size,
    cut,
    joined,
    left_padded,
    padded_to,
    read_rows,
    widest,
)
from bayes_klrl.models.jax_lm.steps import (
    bucket,
    gather_rows,
    next_log_probs,
    position_log_probs,
    prefill,
    score,
    step,
    token_features,
)
from bayes_klrl.models.token_ids import (
    check_ids,
    check_length,
    check_prompts,
    check_tokenizer_fits,
    decoded,
    decoded_after,
    encoded,
    first_token,
    require_tokenizer,
    resolved_eos,
)
from bayes_klrl.sequences import Sequences, completion_lengths
from bayes_klrl.typing import Array, IntArray, LanguageModel, TokenIds
from bayes_klrl.whole_files import named_path

__all__ = ["JaxLM"]


class JaxLM:
    """A causal language model on JAX as a distribution over completions.

        log p(x|c) = sum_t log softmax(logits(c, x_<t) / temperature)[x_t]

    Float32 throughout. See `LanguageModel` for the methods. Log-probs are differentiable in the parameters:

        jax.grad(lambda p: lm.with_parameters(p).token_log_probs(prompts, sequences).sum())(lm.parameters)

    Parameters
    ----------
    parameters
        The weights, as the tree {"outer": {name: array}, "layers": {name: array of all layers}}, like the `parameters` of a
        loaded model.
    config
        The content of a config.json of transformers; options that the forward does not support are refused.
    tokenizer
        The model's tokenizer; None: the model works on token ids only.
    eos_token_id
        The id or ids that end a completion; an empty collection for none. None: those of the configuration, else the
        tokenizer's.
    temperature
        The number by which the logits are divided, in sampling and in scoring.

    Raises
    ------
    CheckpointError
        If the configuration is outside the allow-list, or parameters or tokenizer do not fit it.
    BayesKLRLError
        If the temperature is not positive, or an EOS id is outside the vocabulary.

    Examples
    --------
    The model that is shipped with the package, as the prior of a posterior:

    >>> import bayes_klrl as bk
    >>> prior = bk.JaxLM.from_pretrained("austen")
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(prior, longer, prompts="It was a fine morning", max_new_tokens=24)

    Its next-token log-probs after the prompt:

    >>> log_probs = prior.next_log_probs(prior.prefill(posterior.prompt_ids))
    >>> log_probs.shape == (1, prior.vocab_size)
    True
    """

    def __init__(
        self,
        parameters: Parameters,
        config: Mapping[str, Any],
        tokenizer: Any | None = None,
        *,
        eos_token_id: int | Collection[int] | None = None,
        temperature: float = 1.0,
    ) -> None:
        from bayes_klrl.models.jax_lm.checkpoint import check_parameters

        check_positive("temperature", temperature)
        self._config = dict(config)
        self._architecture = architecture_of(config)
        check_parameters(self._architecture, parameters)
        check_tokenizer_fits(tokenizer, self._architecture.vocab_size)
        self._parameters, self._tokenizer = parameters, tokenizer
        self.temperature = float(temperature)
        self._eos_token_ids = resolved_eos(eos_token_id, config.get("eos_token_id"), tokenizer, self.vocab_size)

    def __repr__(self) -> str:
        shape = self._architecture
        return f"JaxLM({self._config.get('model_type')}, {shape.num_layers} x {shape.hidden_size}, V={self.vocab_size})"

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | os.PathLike[str], device: jax.Device | str | None = None, **options: Any
    ) -> JaxLM:
        """Load a folder or a model shipped with the package, in float32; torch is not imported.

        Parameters
        ----------
        name_or_folder
            An existing folder in Hugging Face's format (safetensors, tokenizer.json), else the name of a shipped model such
            as "austen".
        device
            The device to load the model to: one of JAX's devices, or the name of a platform such as "cpu"; None: JAX's
            default.
        options
            `eos_token_id` and `temperature` of `JaxLM`; by default those that `save_pretrained` stored.

        Raises
        ------
        CheckpointError
            If there is no such model, if weights are missing or left over, or if the forward does not support the
            configuration; the message says what to do.
        BayesKLRLError
            If the device does not exist, or an option is unknown.
        """
        from bayes_klrl.models.jax_lm.checkpoint import load

        unknown = options.keys() - {"eos_token_id", "temperature"}
        if unknown:
            raise BayesKLRLError(
                f"from_pretrained has no option {min(unknown)!r}; its options are eos_token_id and temperature."
            )
        place = named_device(device) if isinstance(device, str) else device
        parameters, config, tokenizer = load(name_or_folder)
        if place is not None:
            parameters = jax.device_put(parameters, place)
        return cls(parameters, config, tokenizer, **{**own_options(config.get(OWN_ENTRY)), **options})

    @property
    def parameters(self) -> Parameters:
        """The parameter tree, a pytree for `jax.grad`, optax and NumPyro."""
        return self._parameters

    def with_parameters(self, parameters: Parameters) -> JaxLM:
        """Return the same model with other parameters, which may be traced."""
        from bayes_klrl.models.jax_lm.checkpoint import check_parameters

        check_parameters(self._architecture, parameters)
        other = copy.copy(self)
        other._parameters = parameters
        return other

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel`: the width of the logits, which may exceed the tokenizer's size."""
        return self._architecture.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel`."""
        return self._eos_token_ids

    @property
    def full_support(self) -> bool:
        """True: a softmax of finite logits leaves nothing out."""
        return True

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel`."""
        return self._tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """The token that replaces an empty prompt: the tokenizer's BOS, else the configuration's, else None."""
        candidates = [getattr(self._tokenizer, "bos_token_id", None), self._config.get("bos_token_id")]
        return first_token(candidates, self.vocab_size)

    @property
    def context_length(self) -> int:
        """Largest number of tokens of prompt and completion together."""
        return self._architecture.context_length

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel`. A final EOS that the tokenizer adds is removed."""
        return encoded(require_tokenizer(self, "encode"), texts, keep_eos=False)

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return decoded(require_tokenizer(self, "decode"), ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return decoded_after(require_tokenizer(self, "decode"), self.decode, prompts, ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> JaxState:
        """See `LanguageModel`."""
        self._check_prompts(prompts, num_new=0)
        tokens, padding = left_padded(prompts, bucket(len(prompts)))
        features, cache = prefill(self._architecture, self._parameters, tokens, padding)
        num_tokens = np.array([len(prompt) for prompt in prompts])
        return JaxState(features, Buffer(cache, tokens.shape[1]), tokens.shape[1], padding, num_tokens)

    def next_log_probs(self, state: JaxState) -> Array:
        """See `LanguageModel`. Shape (R, V), float32."""
        log_probs = next_log_probs(self._architecture, self._parameters, state.features, self.temperature)
        return cut(log_probs, len(state.num_tokens))

    def next_log_probs_of(self, state: JaxState, rows: IntArray) -> Array:
        """Return `next_log_probs` of some rows, (len(rows), V), without a copy of their caches."""
        picked = padded_to(rows, bucket(len(rows), MIN_BUCKET))
        return self.next_log_probs(replace(state, features=state.features[picked], num_tokens=state.num_tokens[rows]))

    def append(self, state: JaxState, tokens: IntArray) -> JaxState:
        """See `LanguageModel`."""
        tokens = np.asarray(tokens)
        check_ids(tokens, self.vocab_size)
        if tokens.shape != state.num_tokens.shape:
            raise BayesKLRLError(f"One token for each of {len(state.num_tokens)} rows; got shape {tokens.shape}.")
        num_tokens = state.num_tokens + 1
        check_length(int(num_tokens.max(initial=0)), self.context_length)
        buffer = state.buffer
        if buffer.filled != state.length or buffer.capacity == state.length:
            buffer = self.select(state, np.arange(len(num_tokens)), always=True).buffer
        num_rows = len(state.padding)
        fed = padded_to(tokens, num_rows)
        length = np.int32(state.length)
        features, buffer.arrays = step(self._architecture, self._parameters, buffer.arrays, fed, state.padding, length)
        buffer.filled = state.length + 1
        return JaxState(features, buffer, buffer.filled, state.padding, num_tokens)

    def select(self, state: JaxState, rows: IntArray, *, always: bool = False) -> JaxState:
        """See `LanguageModel`. Selecting all rows in order copies nothing, unless `always` asks for a copy."""
        rows = np.asarray(rows)
        if not always and np.array_equal(rows, np.arange(len(state.num_tokens))):
            return state
        rows = np.arange(len(state.num_tokens))[rows]  # refuses rows that only fill a bucket
        num_rows = len(state.padding) if always else bucket(len(rows), MIN_BUCKET)
        picked = padded_to(rows, num_rows)
        capacity = bucket(state.length + 1, MIN_CAPACITY)
        features, cache = gather_rows(state.features, state.buffer.arrays, picked, capacity)
        buffer = Buffer(cache, state.length)
        return JaxState(features, buffer, state.length, state.padding[picked], state.num_tokens[rows])

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Array:
        """See `LanguageModel`. Shape (P, N, T), float32, differentiable in the parameters."""
        return self._read(score, prompts, sequences)

    def position_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Array:
        """Return log p(. | c, x_<t) at every position, shape (P, N, T, V), 0 past each completion's length.

        Differentiable. The whole table must fit into memory.
        """
        return self._read(position_log_probs, prompts, sequences, self.vocab_size)

    def features(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Array:
        """Return the last hidden states, which predict every token, shape (P, N, T, F), 0 past each completion's length."""
        return self._read(token_features, prompts, sequences, self._architecture.hidden_size)

    def pad_prompts(self, prompts: Sequence[TokenIds], max_new_tokens: int = 0) -> PaddedPrompts:
        """Return prompts as arrays for `sample_tokens` and `score_tokens`; refuse those too long for `max_new_tokens` more."""
        self._check_prompts(prompts, num_new=max_new_tokens)
        return PaddedPrompts(*map(jnp.asarray, left_padded(prompts, len(prompts))))

    def sample_tokens(self, prompts: PaddedPrompts, uniforms: Array) -> tuple[Array, Array]:
        """Return completions and their log-probs, shape (P, N, T) each: int32 and float32, without a gradient.

        This is one program on the device, whose inputs may all be traced, including the parameters of `with_parameters`.
        Positions past EOS hold the lowest EOS id (0 if there is none) and log-probs of 0. Every new shape is compiled.

        Parameters
        ----------
        prompts
            Prompts from `pad_prompts`, which checks that T more tokens fit.
        uniforms
            Uniform random numbers in [0, 1), shape (P, N, T); each token is drawn by inverse CDF in float32.
        """
        uniforms = jnp.asarray(uniforms, dtype=jnp.float32)
        self._check_rows(prompts, uniforms)
        static, weights = (
            StaticModels((self._architecture,), self._eos),
            Weights((self._parameters,), (self.temperature,)),
        )
        tokens, log_probs = sample_tokens(static, weights, prompts, uniforms)
        return tokens, log_probs[0]

    def score_tokens(self, prompts: PaddedPrompts, tokens: Array) -> Array:
        """Return log p(x_t | c, x_<t) of completions that may be traced, shape (P, N, T), 0 past the first EOS.

        The same numbers as those of `token_log_probs`, and differentiable too. Lengths are computed inside the program, every
        new shape is compiled, and a traced token outside the vocabulary is not refused.
        """
        return self._read_tokens(score, prompts, tokens)

    def score_positions(self, prompts: PaddedPrompts, tokens: Array) -> Array:
        """Return log p(. | c, x_<t) at every position, shape (P, N, T, V), 0 past the first EOS; see `score_tokens`."""
        return self._read_tokens(position_log_probs, prompts, tokens)

    def copy(self) -> JaxLM:
        """Return an independent copy, for example as a guide that starts from this model."""
        return self.with_parameters(jax.tree.map(jnp.copy, self._parameters))

    def lockstep(self, models: Sequence[LanguageModel]) -> JaxLockstep | None:
        """See `LanguageModel`. Return a loop on the device if all models are `JaxLM`."""
        if any(type(model) is not JaxLM for model in models):  # a subclass may compute something else
            return None
        same: Any = models
        static = StaticModels(tuple(model._architecture for model in same), self._eos)
        parameters = tuple(model.parameters for model in same)
        return JaxLockstep(static, Weights(parameters, tuple(model.temperature for model in same)))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder that `from_pretrained` of `JaxLM` and of `TorchLM` reads: weights, tokenizer, EOS ids.

        Temperature and EOS ids are written to config.json, from which `from_pretrained` reads them, and to the generation
        config, for Hugging Face's `generate`.

        Raises
        ------
        OutputError
            If it cannot be written. A new folder is then not there; one that held a model is as it was.
        """
        from bayes_klrl.models.jax_lm.checkpoint import save

        save(self._parameters, self._config, self._tokenizer, named_path(folder), self._eos_token_ids, self.temperature)

    def _read(self, reading: Reading, prompts: Sequence[TokenIds], sequences: Sequences, depth: int = 0) -> Array:
        """Return the output of a reading for every token, shape (P, N, T), or (P, N, T, depth)."""
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        if num_prompts != len(prompts):
            raise BayesKLRLError(
                f"{len(prompts)} prompts but completions of {num_prompts}. Give N completions for each prompt."
            )
        longest = int(sequences.lengths.max(initial=0))
        if longest == 0:
            return jnp.zeros((num_prompts, num_draws, num_tokens, *[depth] * bool(depth)), dtype=jnp.float32)
        self._check_prompts(prompts, num_new=longest)
        check_ids(sequences.tokens[sequences.mask], self.vocab_size)
        owners = np.arange(num_prompts).repeat(num_draws)
        tokens = sequences.tokens[..., :longest].reshape(-1, longest)
        rows = prompts, owners, tokens, sequences.lengths.reshape(-1)
        read = read_rows(reading, self._architecture, self._parameters, self.temperature, *rows)
        return joined(read, (num_prompts, num_draws, num_tokens))

    def _read_tokens(self, reading: Reading, prompts: PaddedPrompts, tokens: Array) -> Array:
        """Return the output of a reading for completions that may be traced."""
        tokens = jnp.asarray(tokens)
        self._check_rows(prompts, tokens)
        if not isinstance(tokens, jax.core.Tracer):
            check_ids(inside_ids(np.asarray(tokens), self._eos), self.vocab_size)
        rows_at_once = chunk_size(tokens.shape[2] * widest(self._architecture))
        model = self._architecture, self._eos, self._parameters, self.temperature
        return read_tokens(reading, rows_at_once, *model, prompts, tokens)

    @property
    def _eos(self) -> tuple[int, ...]:
        return tuple(sorted(self._eos_token_ids))

    def _check_rows(self, prompts: PaddedPrompts, rows: Array) -> None:
        """Refuse arrays whose shape is not (P, N, T) for these prompts."""
        num_prompts = len(prompts.padding)
        if rows.ndim != 3 or rows.shape[0] != num_prompts or rows.shape[2] == 0:
            raise BayesKLRLError(
                f"{num_prompts} prompts need an array (P, N, T) = ({num_prompts}, N, T) with T >= 1; got {rows.shape}."
            )

    def _check_prompts(self, prompts: Sequence[TokenIds], num_new: int) -> None:
        check_prompts(prompts, self.vocab_size, self.bos_token_id)
        check_length(max(map(len, prompts)) + num_new, self.context_length)


def named_device(platform: str) -> jax.Device:
    """Return the first device of a platform."""
    try:
        return jax.devices(platform)[0]
    except RuntimeError as error:
        present = sorted({device.platform for device in jax.devices()})
        raise BayesKLRLError(f"JAX has no device {platform!r} here; it has {', '.join(present)}.") from error


def inside_ids(tokens: np.ndarray, eos_token_ids: Collection[int]) -> IntArray:
    """Return the ids up to each row's first EOS, as one flat array."""
    ids: IntArray = tokens[np.arange(tokens.shape[-1]) < completion_lengths(tokens, eos_token_ids)[..., None]]
    return ids
