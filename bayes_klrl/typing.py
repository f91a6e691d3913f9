"""The protocols that every other file is written against, with the shapes in them.

Letters: P prompts, N draws or particles, T tokens (max_new_tokens), V vocabulary, R rows of a decoding state.
`Array` is an array of the model's own backend: NumPy, torch or JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bayes_klrl.draws import Draws
    from bayes_klrl.inference.svi.fit import Fit
    from bayes_klrl.posterior import Posterior
    from bayes_klrl.sequences import Sequences

__all__ = [
    "Algorithm",
    "Array",
    "FloatArray",
    "GuideRecipe",
    "IntArray",
    "JaxModel",
    "LanguageModel",
    "Lockstep",
    "State",
    "TokenIds",
    "Twist",
    "TwistRecipe",
]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
TokenIds: TypeAlias = Sequence[int]
Array: TypeAlias = Any
State: TypeAlias = Any


class Lockstep(Protocol):
    """Several models that draw and score to the end in one go: independent completions, the first model's."""

    def pays(self, num_rows: int, num_prefixes: int) -> bool:
        """Return whether this is faster than steps, which compute a prefix that rows share only once."""

    def __call__(
        self, states: Sequence[State], state_rows: IntArray, newest: IntArray, uniforms: FloatArray
    ) -> tuple[IntArray, FloatArray, int]:
        """Return the rest of R completions.

        Parameters
        ----------
        states
            Each model's, which lack the newest tokens; they stay usable.
        state_rows
            Which of their rows each completion goes on from, shape (R,).
        newest
            The newest token of each, shape (R,).
        uniforms
            From [0, 1), shape (T, R): row t draws token t by inverse CDF.

        Returns
        -------
        T more tokens (R, T), anything past EOS; the log-prob of these up to EOS under each model (models, R), float64;
        and how many tokens went through a model.
        """


@runtime_checkable
class LanguageModel(Protocol):
    """A distribution over completions of a prompt, which samples and scores with the same numbers.

    The next-token distribution p(a | c, x_<t) is all it knows; EOS is a token like any other, and what to do with it
    (stop, convention "absorb") is the business of the code that decodes. Log-probs are in nats, float32 or better, and
    normalised over the vocabulary; -inf is legal, NaN is not.

    States are values: `append` and `select` return new states and leave the old ones usable.

    A model may also have `context_length: int` (prompt and completion together, each by itself if `prompt_apart` is true;
    absent or None: unlimited) and `bos_token_id: int` (what an empty prompt becomes; absent or None: an empty prompt is
    refused unless `accepts_empty_prompt` is true).

    Where steps one by one are slow, it may have `lockstep(models) -> Lockstep | None`: how to go on drawing from the first
    of several models (itself) and scoring by all of them without steps; None if it cannot for these. The tokens must be
    those of the steps.
    """

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens that can be drawn."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a completion; may be empty."""

    @property
    def full_support(self) -> bool:
        """Whether every token has positive probability after every prefix."""

    @property
    def tokenizer(self) -> Any | None:
        """What turns text into ids, or None if the model works on token ids only."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the prompt ids of each text, BOS included where the tokenizer adds it."""

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """Return the text of each completion, special tokens skipped."""

    def prefill(self, prompts: Sequence[TokenIds]) -> State:
        """Return the decoding state after each prompt: R = len(prompts) rows, in order."""

    def next_log_probs(self, state: State) -> Array:
        """Return log p(. | prompt, tokens so far) for every row, shape (R, V)."""

    def append(self, state: State, tokens: IntArray) -> State:
        """Return the state after one more token a row, `tokens` of shape (R,) on the host."""

    def select(self, state: State, rows: IntArray) -> State:
        """Return the state whose row i is row `rows[i]` of the given one; rows may repeat, be dropped or permuted."""

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Array:
        """Return log p(x_t | c, x_<t), shape (P, N, T), 0 past each completion's length.

        Differentiable in the model's parameters where the backend differentiates.
        """


@runtime_checkable
class JaxModel(Protocol):
    """A language model that is a function of a parameter tree, and draws and scores inside one compiled JAX program.

    Beside the methods of `LanguageModel`; all of these may be called with traced arrays. `JaxLM` is one.
    """

    @property
    def parameters(self) -> Any:
        """The parameters, a tree of arrays."""

    def with_parameters(self, parameters: Any) -> Any:
        """Return the same model with other parameters."""

    def pad_prompts(self, prompts: Sequence[TokenIds]) -> Any:
        """Return prompts as a tree of arrays, each with P as its first axis."""

    def sample_tokens(self, prompts: Any, uniforms: Array) -> tuple[Array, Array]:
        """Return completions drawn with uniforms (P, N, T), padded past EOS, and their log-probs, both (P, N, T)."""

    def score_tokens(self, prompts: Any, tokens: Array) -> Array:
        """Return log p(x_t | c, x_<t) of completions (P, N, T), 0 past EOS, differentiable in the parameters."""


@runtime_checkable
class Algorithm(Protocol):
    """A way of answering a posterior: a frozen set of options with one method."""

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """Return draws from (an approximation of) the posterior; the same seed gives the same draws."""


@runtime_checkable
class GuideRecipe(Algorithm, Protocol):
    """An algorithm that trains a guide and then draws from it: `SVI`, `BayesianSVI`. It may stand wherever a proposal may."""

    @property
    def num_draws(self) -> int:
        """Completions per prompt that `run` draws."""

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Fit:
        """Return the trained guide with its history."""

    def trains_like(self, other: object) -> bool:
        """Return whether another recipe would train the same guide under one seed: all but `num_draws` is equal."""


@runtime_checkable
class Twist(Protocol):
    """log psi_t(x_1:t), an estimate of log E_p0[likelihood | x_1:t], up to a constant that depends on the prompt only."""

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """Return log psi of R unfinished prefixes.

        Parameters
        ----------
        posterior
            The posterior that is being sampled.
        prompt_index
            Which prompt each prefix follows, shape (R,).
        prefixes
            The tokens so far, shape (R, t); t = 0 asks for the start value.

        Returns
        -------
        Shape (R,), float64.
        """


@runtime_checkable
class TwistRecipe(Protocol):
    """A twist that has to be made for a posterior: estimated from prior draws, or learned."""

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Twist:
        """Return the twist, which says as its attribute `training`, a `Cost`, what it took to make it."""
