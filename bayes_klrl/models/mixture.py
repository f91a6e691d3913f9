"""The mixture of several language models as one language model, `MixtureLM`.

    p(x) = sum_s w_s p_s(x)

Token by token, the next-token distributions are averaged with the weights that the models have *after* the tokens so far,

    p(a | x_<t) = sum_s w_s(x_<t) p_s(a | x_<t),    w_s(x_<t) = w_s p_s(x_<t) / sum_u w_u p_u(x_<t).

A decoding state holds these weights. An average with the constant weights w_s would be another distribution, one that may
switch between models in the middle of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayes_klrl.arrays import to_host
from bayes_klrl.batch import completion_texts
from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.passes import fits, next_log_probs_of, passes
from bayes_klrl.models.token_ids import check_ids
from bayes_klrl.posterior import check_language_model
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State, TokenIds
from bayes_klrl.weights import logsumexp

__all__ = ["MixtureLM"]

_FLOATS_AT_ONCE = 2**21  # of all models' log-probs in float64 (16 MB)


@dataclass(eq=False)
class MixtureState:
    """The state of R rows: the state of every model, and the weight of every model after the tokens so far."""

    states: tuple[State, ...]
    log_weights: FloatArray  # (S, R), normalised over S
    tables: list[np.ndarray] | None = field(default=None, repr=False)  # S arrays (R, V) of the models; None unless kept


class MixtureLM:
    """A `LanguageModel` that is the exact mixture of others, in sampling and in scoring.

    It is the predictive distribution of a Bayesian policy, sum_s p_s(x) / S with p_s drawn from the posterior, and the
    *defensive mixture* `MixtureLM([q, prior], [1 - eps, eps])`: as a proposal its importance weights are at most
    exp(r / alpha) / eps, so that a mode which q has lost is still drawn, and with bounded weights (Hesterberg 1995).

    Parameters
    ----------
    models
        The S language models, on one vocabulary.
    weights
        S positive numbers, which are normalised; None: all equal.

    Raises
    ------
    CheckpointError
        If vocabulary sizes or EOS ids differ.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> always_a = bk.NgramLM(np.log([0.98, 0.01, 0.01]), eos_token_id=2)
    >>> always_b = bk.NgramLM(np.log([0.01, 0.98, 0.01]), eos_token_id=2)
    >>> both = MixtureLM([always_a, always_b])
    >>> start = both.prefill([[]])
    >>> np.exp(both.next_log_probs(start)).round(3), np.exp(both.next_log_probs(both.append(start, [0]))).round(3)
    (array([[0.495, 0.495, 0.01 ]]), array([[0.97, 0.02, 0.01]]))
    """

    def __init__(self, models: Sequence[LanguageModel], weights: Sequence[float] | FloatArray | None = None) -> None:
        if not hasattr(models, "__len__") or len(models) == 0:
            raise BayesKLRLError(f"A mixture is of a list of language models, at least one; got {models!r}.")
        self._models = tuple(models)
        for s, model in enumerate(self._models):
            check_language_model(f"Model {s} of a mixture", model)
        self._log_weights = np.log(checked_weights(weights, len(self._models)))
        first = self._models[0]
        for s, model in enumerate(self._models):
            if model.vocab_size != first.vocab_size or model.eos_token_ids != first.eos_token_ids:
                raise CheckpointError(
                    f"Model {s} of the mixture has {model.vocab_size} tokens and EOS {sorted(model.eos_token_ids)}, model 0 "
                    f"has {first.vocab_size} and {sorted(first.eos_token_ids)}. They must share one vocabulary."
                )

    def __repr__(self) -> str:
        names = sorted({type(model).__name__ for model in self._models})
        return f"MixtureLM({len(self._models)} x {', '.join(names)})"

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        """The S language models."""
        return self._models

    @property
    def num_models(self) -> int:
        """Number of models that every token goes through."""
        return sum(getattr(model, "num_models", 1) for model in self._models)

    @property
    def weights(self) -> FloatArray:
        """The models' weights before the first token, shape (S,), with sum 1."""
        weights: FloatArray = np.exp(self._log_weights)
        return weights

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel`."""
        return self._models[0].vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel`."""
        return self._models[0].eos_token_ids

    @property
    def full_support(self) -> bool:
        """True if at least one model has full support: such a model never loses all its weight."""
        return any(model.full_support for model in self._models)

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel`; the first tokenizer that one of the models has."""
        return self._attribute("tokenizer", None)

    @property
    def context_length(self) -> int | None:
        """See `LanguageModel`; the shortest of the models' context lengths."""
        lengths = [getattr(model, "context_length", None) for model in self._models]
        return min((length for length in lengths if length is not None), default=None)

    @property
    def prompt_apart(self) -> bool:
        """See `LanguageModel`; true if it is true for all models."""
        return all(getattr(model, "prompt_apart", False) for model in self._models)

    @property
    def accepts_empty_prompt(self) -> bool:
        """See `LanguageModel`."""
        return all(getattr(model, "accepts_empty_prompt", False) for model in self._models)

    @property
    def bos_token_id(self) -> int | None:
        """See `LanguageModel`; the first BOS id that one of the models has."""
        bos: int | None = self._attribute("bos_token_id", None)
        return bos

    @property
    def half_precision(self) -> bool:
        """True if the weights of at least one model have fewer bits than float32."""
        return any(getattr(model, "half_precision", False) for model in self._models)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel`."""
        return self._with_tokenizer().encode(texts)

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return self._with_tokenizer().decode(ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return completion_texts(self._with_tokenizer(), prompts, ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> MixtureState:
        """See `LanguageModel`."""
        states = tuple(model.prefill(prompts) for model in self._models)
        return MixtureState(states, np.repeat(self._log_weights[:, None], len(prompts), axis=1))

    def next_log_probs(self, state: MixtureState) -> FloatArray:
        """See `LanguageModel`. Shape (R, V), float64 on the host."""
        return averaged(state.log_weights, self._kept(state))

    def next_log_probs_of(self, state: MixtureState, rows: IntArray) -> FloatArray:
        """Return the next-token log-probs of some rows, (len(rows), V); nothing is kept for `append`."""
        return averaged(state.log_weights[:, rows], self._tables(state, rows))

    def append(self, state: MixtureState, tokens: IntArray) -> MixtureState:
        """See `LanguageModel`: what was read says which model wrote it."""
        tokens = np.asarray(tokens)
        check_ids(tokens, self.vocab_size)
        joint = state.log_weights + self._read(state, tokens)
        total = logsumexp_over_models(joint)
        impossible = np.isneginf(total)  # no model can have written it: whatever is said after it has probability 0
        log_weights = np.where(impossible, state.log_weights, joint - np.where(impossible, 0.0, total))
        states = tuple(model.append(part, tokens) for model, part in zip(self._models, state.states, strict=True))
        return MixtureState(states, log_weights)

    def select(self, state: MixtureState, rows: IntArray) -> MixtureState:
        """See `LanguageModel`."""
        states = tuple(model.select(part, rows) for model, part in zip(self._models, state.states, strict=True))
        known = None if state.tables is None else [table[rows] for table in state.tables]
        return MixtureState(states, state.log_weights[:, rows], known)

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """See `LanguageModel`; float64 on the host, not differentiable: train the models, not their mixture."""
        per_model = self._scored(prompts, sequences)
        before = self._log_weights[:, None, None, None]
        prefix = logsumexp_over_models(before + per_model.cumsum(axis=3))  # log p(x_1:t), (P, N, T)
        previous = np.concatenate([np.zeros_like(prefix[..., :1]), prefix[..., :-1]], axis=2)
        possible = np.isfinite(
            previous
        )  # after a token of probability 0 the conditional is undefined: 0 keeps the sum right
        found = np.where(possible, prefix - np.where(possible, previous, 0.0), 0.0)
        return np.where(sequences.mask, found, 0.0)

    def _scored(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """Return every model's log p_s(x_t | c, x_<t), shape (S, P, N, T)."""
        return np.stack(
            [to_host(model.token_log_probs(prompts, sequences)).astype(np.float64) for model in self._models]
        )

    def _kept(self, state: MixtureState) -> list[np.ndarray]:
        """Return every model's next-token log-probs, S arrays (R, V); the models are called once for each state."""
        if state.tables is None:
            pairs = zip(self._models, state.states, strict=True)
            state.tables = [to_host(model.next_log_probs(part)) for model, part in pairs]
        return state.tables

    def _tables(self, state: MixtureState, rows: IntArray) -> list[np.ndarray]:
        """Return every model's next-token log-probs of some rows, S arrays (len(rows), V)."""
        if state.tables is not None:
            return [table[rows] for table in state.tables]
        pairs = zip(self._models, state.states, strict=True)
        return [to_host(next_log_probs_of(model, part, rows)) for model, part in pairs]

    def _read(self, state: MixtureState, tokens: IntArray) -> FloatArray:
        """Return every model's log-prob of one token per row, shape (S, R); computed anew if the tables are not kept."""
        every = np.arange(len(tokens))
        if fits(len(tokens), self.vocab_size):
            return taken_from(self._kept(state), tokens)
        parts = passes(every, self.vocab_size)
        return np.concatenate([taken_from(self._tables(state, rows), tokens[rows]).T for rows in parts]).T

    def _attribute(self, name: str, default: Any) -> Any:
        """Return the first value of an attribute that is not None."""
        values = (getattr(model, name, None) for model in self._models)
        return next((value for value in values if value is not None), default)

    def _with_tokenizer(self) -> LanguageModel:
        """Return the first model that has a tokenizer, else the first."""
        return next((model for model in self._models if model.tokenizer is not None), self._models[0])


def taken_from(tables: Sequence[np.ndarray], tokens: IntArray) -> FloatArray:
    """Return the log-prob of one token per row in each of S tables (R, V), shape (S, R); row by row in memory."""
    rows = np.arange(len(tokens))
    return np.stack([table[rows, tokens].astype(np.float64) for table in tables], axis=1).T


def averaged(log_weights: FloatArray, tables: Sequence[np.ndarray]) -> FloatArray:
    """Return log sum_s w_s p_s, (R, V), of log-weights (S, R) and S tables (R, V), computed for some rows at a time."""
    num_rows, vocab_size = tables[0].shape
    mixed = np.empty((num_rows, vocab_size))
    step = max(1, _FLOATS_AT_ONCE // (len(tables) * vocab_size))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        log_probs = np.stack([table[rows].astype(np.float64) for table in tables])
        mixed[rows] = logsumexp_over_models(log_weights[:, rows, None] + log_probs)
    return mixed


def logsumexp_over_models(log_values: FloatArray) -> FloatArray:
    """Return logsumexp over the first axis."""
    return logsumexp(np.moveaxis(log_values, 0, -1))


def checked_weights(weights: Sequence[float] | FloatArray | None, num_models: int) -> FloatArray:
    """Return the weights, normalised to sum 1."""
    if weights is None:
        return np.full(num_models, 1.0 / num_models)
    try:
        given = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):  # strings, or rows of different lengths
        given = np.empty(0)
    if given.shape != (num_models,) or not (np.isfinite(given).all() and (given > 0).all()):
        raise BayesKLRLError(
            f"A mixture of {num_models} models needs as many positive weights; got {weights!r}. Leave a model out rather than "
            "give it the weight 0."
        )
    normalised: FloatArray = given / given.sum()
    return normalised
