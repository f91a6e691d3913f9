"""The protocols that every other file uses, with the shapes of their arguments.

Letters: P prompts, N draws or particles, T tokens (max_new_tokens), V vocabulary, R rows of a decoding state.
`Array` is an array of the model's own backend: NumPy, torch or JAX.
"""

from __future__ import annotations

import inspect
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
    "is_algorithm",
]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
TokenIds: TypeAlias = Sequence[int]
Array: TypeAlias = Any
State: TypeAlias = Any


class Lockstep(Protocol):
    """A function that draws completions from the first of several models and scores them under all models, in one call.

    With an attribute `bounds_tables` that is true it bounds the memory of tables (R, V) itself, and gets all rows at once.
    """

    def is_faster(self, num_rows: int, num_prefixes: int) -> bool:
        """Return whether one call is faster than steps, which compute a prefix that several rows share only once."""

    def __call__(
        self, states: Sequence[State], state_rows: IntArray, newest: IntArray, uniforms: FloatArray
    ) -> tuple[IntArray, FloatArray, int]:
        """Return the rest of R completions.

        Parameters
        ----------
        states
            The decoding state of each model, without the newest tokens; the states stay usable.
        state_rows
            Row of the states that each completion continues, shape (R,).
        newest
            The newest token of each completion, shape (R,).
        uniforms
            Uniform random numbers in [0, 1), shape (T, R): row t draws token t by inverse CDF.

        Returns
        -------
        T more tokens (R, T), with arbitrary ids past EOS; their log-prob up to EOS under each model (models, R), in nats,
        float64; and the number of tokens that went through a model.
        """


@runtime_checkable
class LanguageModel(Protocol):
    """A distribution over completions of a prompt, which samples and scores with the same numbers.

    The model only knows the next-token distribution p(a | c, x_<t). EOS is a token like any other; the code that decodes
    stops at it (convention "absorb"). Log-probs are in nats, float32 or better, and normalised over the vocabulary; -inf is
    legal, NaN is not.

    States are values: `append` and `select` return new states and leave the old ones usable.

    A model may also have `context_length: int` (for prompt and completion together, or for each by itself if `prompt_apart`
    is true; absent or None: unlimited) and `bos_token_id: int` (an empty prompt becomes this token; absent or None: an empty
    prompt is refused unless `accepts_empty_prompt` is true).

    A model whose single steps are slow may have `lockstep(models) -> Lockstep | None`. It returns a function that draws from
    the first of several models (itself) and scores under all of them without single steps, or None if it cannot do so for
    these models. The tokens must be those that the steps would draw.

    A model whose tokenizer drops the space of the first token that it decodes, as those of SentencePiece's kind do, may have
    `decode_after(prompts, ids) -> list[str]`. It returns the text of each completion as it follows its own prompt of token
    ids, one prompt per completion, so that the texts of prompt and completion together are what the model wrote. Absent:
    rewards and draws show what `decode` returns.

    A table (R, V) of more than 128 MB is computed some rows at a time. A model whose `select` copies much, such as caches, may
    have `next_log_probs_of(state, rows) -> Array`, which returns the same as `next_log_probs(select(state, rows))`.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> isinstance(coin, bk.LanguageModel), coin.vocab_size, sorted(coin.eos_token_ids)
    (True, 2, [1])
    >>> state = coin.append(coin.prefill([[]]), np.array([0]))
    >>> np.exp(coin.next_log_probs(state))
    array([[0.5, 0.5]])
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
        """The tokenizer, which turns text into ids; None if the model works on token ids only."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the prompt ids of each text, BOS included where the tokenizer adds it."""

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """Return the text of each completion, special tokens skipped."""

    def prefill(self, prompts: Sequence[TokenIds]) -> State:
        """Return the decoding state after each prompt: R = len(prompts) rows, in order."""

    def next_log_probs(self, state: State) -> Array:
        """Return log p(. | prompt, tokens so far) for every row, shape (R, V)."""

    def append(self, state: State, tokens: IntArray) -> State:
        """Return the state after one more token per row, `tokens` of shape (R,) on the host."""

    def select(self, state: State, rows: IntArray) -> State:
        """Return the state whose row i is row `rows[i]` of the given one; rows may repeat, be dropped or permuted."""

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Array:
        """Return log p(x_t | c, x_<t), shape (P, N, T), 0 past each completion's length.

        Differentiable in the model's parameters where the backend differentiates.
        """


@runtime_checkable
class JaxModel(Protocol):
    """A language model that is a function of a parameter tree, and draws and scores inside one compiled JAX program.

    It has these methods in addition to those of `LanguageModel`, and all of them accept traced arrays. `JaxLM` is one.
    """

    @property
    def parameters(self) -> Any:
        """The parameters, a tree of arrays."""

    def with_parameters(self, parameters: Any) -> Any:
        """Return the same model with other parameters."""

    def pad_prompts(self, prompts: Sequence[TokenIds]) -> Any:
        """Return P prompts as a tree of arrays, each with P as its first axis."""

    def sample_tokens(self, prompts: Any, uniforms: Array) -> tuple[Array, Array]:
        """Return completions drawn with uniforms (P, N, T), padded past EOS, and their log-probs, both (P, N, T)."""

    def score_tokens(self, prompts: Any, tokens: Array) -> Array:
        """Return log p(x_t | c, x_<t) of completions (P, N, T), 0 past EOS, differentiable in the parameters."""


@runtime_checkable
class Algorithm(Protocol):
    """An inference method for a posterior: a frozen set of options with the one method `run`.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> isinstance(bk.SMC(num_particles=256), bk.Algorithm)
    True

    Every algorithm runs on every posterior in the same way:

    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> [algorithm.run(posterior, seed=0).shape for algorithm in (bk.ImportanceSampling(50), bk.SMC(20))]
    [(1, 50), (1, 20)]
    """

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """Return draws from (an approximation of) the posterior; the same seed gives the same draws."""


def is_algorithm(kind: type) -> bool:
    """Return whether a class is an `Algorithm`: its `run` must be given a posterior and a seed, and nothing else.

    `isinstance` alone looks at the name of the method only, and a `Fit` has a `run` of its own.
    """
    run = getattr(kind, "run", None)
    if run is None:
        return False
    parameters = list(inspect.signature(run).parameters.values())[1:]
    return [each.name for each in parameters if each.default is inspect.Parameter.empty] == ["posterior", "seed"]


@runtime_checkable
class GuideRecipe(Algorithm, Protocol):
    """An algorithm that trains a guide and then draws from it: `SVI`, `BayesianSVI`. It is accepted wherever a proposal is."""

    @property
    def num_draws(self) -> int:
        """Completions per prompt that `run` draws."""

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Fit:
        """Return the trained guide with its history."""

    def trains_like(self, other: object) -> bool:
        """Return whether another recipe would train the same guide under one seed: all but `num_draws` is equal."""


@runtime_checkable
class Twist(Protocol):
    """An estimate log psi_t(x_1:t) of log E_p0[likelihood | x_1:t], up to a constant that depends on the prompt only.

    A twist that reads nothing of a prefix but its log p0(x_1:t | c) may have
    `of_log_prior(posterior, prompt_index, num_tokens, log_prior) -> FloatArray`, which returns log psi (R,) of prefixes of
    `num_tokens` tokens from their `log_prior` (R,). SMC then calls it instead, with the sums that decoding has made in any
    case. One that has the values of all extensions of a prefix at once may have `next_log_psi` for a "twisted" proposal; see
    `bayes_klrl.models.twists.simple.next_log_psi`.

    Examples
    --------
    The reward that a prefix has collected so far, as the twist of SMC:

    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> def tokens_so_far(posterior, prompt_index, prefixes):
    ...     return np.full(len(prefixes), prefixes.shape[1] / posterior.alpha)
    >>> draws = bk.SMC(num_particles=256, twist=tokens_so_far).run(posterior, seed=0)
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> bool(abs(draws.log_evidence[0] - exact.log_evidence[0]) < 0.1)
    True
    """

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """Return log psi of R unfinished prefixes.

        Parameters
        ----------
        posterior
            The posterior that is being sampled.
        prompt_index
            Index of the prompt that each prefix follows, shape (R,).
        prefixes
            The tokens so far, shape (R, t); t = 0 asks for the start value.

        Returns
        -------
        log psi of each prefix in nats, shape (R,), float64.
        """


@runtime_checkable
class TwistRecipe(Protocol):
    """A recipe for a twist that has to be made for each posterior: estimated from prior draws, or learned."""

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Twist:
        """Return the twist; its attribute `training`, a `Cost`, holds the seconds and tokens that it took to make it."""
