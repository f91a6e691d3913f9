"""Features of completions for linear rewards: a user's function of text or tokens, or hidden states of a model.

`FeatureMap` standardises features by the training set, z = (f - mean) @ projection / scale, so that one prior scale suits all
weights, and does not depend on the units of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.batch import Batch
from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError, RewardError, TextRewardError
from bayes_klrl.posterior import encoded_prompts
from bayes_klrl.reward_functions.calls import called_on_text, called_on_tokens
from bayes_klrl.reward_functions.signatures import TextCall, accepts
from bayes_klrl.sequences import Sequences, pad_token
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, TokenIds

__all__ = ["FeatureMap", "Features", "HiddenStates", "TextFeatures", "TokenFeatures", "as_features"]

_FLOATS_PER_CHUNK = 2**24


class Features(Protocol):
    """A function of M completions to J numbers each."""

    def __call__(self, batch: Batch) -> FloatArray:
        """Return the features, shape (M, J), float64, finite."""

    def of(self, prior: LanguageModel) -> Features:
        """Return the features for a reward that is learned from completions of this prior."""

    def check(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """Refuse, before any work, features that need what this prior and these columns do not have."""


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """Features given by a function of text with the signature of a `Reward`'s, which returns J numbers per completion.

    `RewardModel` makes one of a bare function.
    """

    fn: Callable[..., Any]

    def of(self, prior: LanguageModel) -> TextFeatures:
        """See `Features`."""
        return self

    def check(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Features`; also refuses a function of text if the prior cannot decode its tokens."""
        if TextCall.of(self.fn, columns, _label(self.fn)).reads_text and prior.tokenizer is None:
            raise TextRewardError(
                f"The features {_label(self.fn)!r} read text, but the prior has no tokenizer. Give the model a tokenizer, or "
                "use bk.TokenFeatures."
            )

    def __call__(self, batch: Batch) -> FloatArray:
        """See `Features`."""
        return _checked(called_on_text(self.fn, _label(self.fn), batch), _label(self.fn), batch)


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Features given by a function of token arrays.

    Parameters
    ----------
    fn
        `fn(tokens (N, T) int, lengths (N,) int) -> (N, J)` on NumPy arrays; the arguments are those of a `TokenReward`.

    Examples
    --------
    Two features per completion, its first token and its length, for a reward model:

    >>> import bayes_klrl as bk
    >>> features = bk.TokenFeatures(lambda tokens, lengths: np.stack([tokens[:, 0], lengths], axis=1))
    >>> bk.RewardModel(features).features is features
    True
    """

    fn: Callable[..., Any]

    def of(self, prior: LanguageModel) -> TokenFeatures:
        """See `Features`."""
        return self

    def check(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Features`."""
        if not callable(self.fn) or not (
            accepts(self.fn, None, None) or accepts(self.fn, None, None, prompt_index=None)
        ):
            raise RewardError(
                f"The features {_label(self.fn)!r} must take (tokens, lengths), and may ask for prompt_index."
            )

    def __call__(self, batch: Batch) -> FloatArray:
        """See `Features`."""
        return _checked(called_on_tokens(self.fn, _label(self.fn), batch), _label(self.fn), batch)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The last hidden state of a language model after it has read the prompt and the completion's last token but EOS.

    The model predicts the next token from this state; in a finished completion, it predicted EOS from it.

    Parameters
    ----------
    lm
        A model with `features(prompts, sequences) -> (P, N, T, F)`, such as `TorchLM`, over the same tokens as the prior.
        None: the prior itself.

    Examples
    --------
    Hidden states have many dimensions, so a reward model weighs their principal components:

    >>> import bayes_klrl as bk
    >>> model = bk.RewardModel(bk.HiddenStates(), num_components=4)
    >>> model.features.lm is None, model.num_components
    (True, 4)
    """

    lm: Any | None = None

    def of(self, prior: LanguageModel) -> HiddenStates:
        """Return features whose model is fixed, even if later completions are drawn from another model; see `Features`."""
        return HiddenStates(prior) if self.lm is None else self

    def check(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Features`."""
        lm = prior if self.lm is None else self.lm
        if not hasattr(lm, "features"):
            raise BayesKLRLError(f"A {type(lm).__name__} has no hidden states; use a bk.TorchLM, or your own function.")
        if lm.vocab_size != prior.vocab_size:
            raise BayesKLRLError(
                f"The hidden states are those of a model of {lm.vocab_size} tokens, and the prior has {prior.vocab_size}: "
                "they must share their tokens."
            )

    def check_room(self, prompt_ids: Sequence[TokenIds], max_new_tokens: int, prior: LanguageModel) -> None:
        """Refuse prompts too long for the context, which must hold T + 1 new tokens: the last state predicts token T + 1."""
        lm = prior if self.lm is None else self.lm
        context, longest, read = getattr(lm, "context_length", None), max(map(len, prompt_ids)), max_new_tokens + 1
        needed = max(longest, read) if getattr(lm, "prompt_apart", False) else longest + read
        if context is not None and needed > context:
            raise BayesKLRLError(
                f"A prompt of {longest} tokens, max_new_tokens = {max_new_tokens} and one more token, which the last "
                f"hidden state predicts, exceed the model's context of {context} tokens. Shorten one of them."
            )

    def __call__(self, batch: Batch) -> FloatArray:
        """See `Features`."""
        lm = batch.prior if self.lm is None else self.lm
        read = batch.lengths - batch.sequences.finished(batch.prior.eos_token_ids)[0]
        prompt_ids = encoded_prompts(tuple(batch.prompts), lm)
        # the state after t tokens predicts token t + 1, so there must be one; any token will do
        room = int(read.max(initial=0)) + 1
        tokens = np.full((len(batch), room), pad_token(batch.prior.eos_token_ids))
        kept = min(room, batch.tokens.shape[1])
        inside = np.arange(kept) < read[:, None]
        tokens[:, :kept] = np.where(inside, batch.tokens[:, :kept], tokens[:, :kept])
        result: FloatArray | None = None
        for prompts, rows in _equal_groups(
            batch.prompt_index
        ):  # prompts (P,) with as many completions each, rows (P, N)
            states = self._states(lm, [prompt_ids[p] for p in prompts], tokens[rows], read[rows])
            result = np.empty((len(batch), states.shape[-1])) if result is None else result
            result[rows] = states
        return _checked(result, "hidden states", batch)

    def _states(self, lm: Any, prompts: list[Any], tokens: IntArray, read: IntArray) -> FloatArray:
        """Return the state after `read` (P, N) tokens of `tokens` (P, N, T + 1), shape (P, N, F), in chunks of draws."""
        parts: list[np.ndarray] = []
        start, step = 0, 1
        while start < tokens.shape[1]:
            chunk = slice(start, start + step)
            with no_gradient():
                features = lm.features(prompts, Sequences(tokens[:, chunk], read[:, chunk] + 1))
                p, n = np.indices(read[:, chunk].shape)
                parts.append(to_host(features[p, n, read[:, chunk]]).astype(np.float64))
            start += step
            step = max(1, _FLOATS_PER_CHUNK // (len(prompts) * tokens.shape[2] * parts[0].shape[-1]))
        return np.concatenate(parts, axis=1)


def as_features(given: Any) -> Features:
    """Return features as they are, and a bare function as features of text."""
    if isinstance(given, TextFeatures | TokenFeatures | HiddenStates):
        return given
    if not callable(given):
        raise BayesKLRLError(
            f"features is a function of completions, bk.TokenFeatures(fn) or bk.HiddenStates(lm); got {given!r}."
        )
    return TextFeatures(given)


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Features with their standardisation by the training set.

    Parameters
    ----------
    features
        Function from M completions to raw features (M, F).
    mean
        Means of the raw features over the training set, shape (F,).
    projection
        Principal components, shape (F, J); None: no projection, J = F.
    scale
        Standard deviations of the projected features over the training set, shape (J,).
    """

    features: Features
    mean: FloatArray
    projection: FloatArray | None
    scale: FloatArray

    @classmethod
    def fitted(cls, features: Features, raw: FloatArray, num_components: int | None = None) -> FeatureMap:
        """Return the map that gives the rows of `raw`, (M, F), mean 0 and standard deviation 1.

        Raises
        ------
        BayesKLRLError
            If a feature does not vary, or fewer components exist than are asked for.
        """
        with np.errstate(over="ignore"):
            too_large = ~np.isfinite(np.square(raw).sum(axis=0))
        if too_large.any():
            j = int(too_large.argmax())
            raise BayesKLRLError(
                f"Feature {j} is as large as {np.abs(raw[:, j]).max():.3g} over the training set: its variance overflows. "
                "Divide it by a constant."
            )
        mean = raw.mean(axis=0)
        centred = raw - mean
        constant = np.ptp(raw, axis=0) <= 1e-12 * np.abs(raw).max(axis=0, initial=0.0)
        if constant.all() or (constant.any() and num_components is None):
            which = "All features are" if constant.all() else f"The features {np.flatnonzero(constant).tolist()} are"
            raise BayesKLRLError(
                f"{which} constant over the training set: nothing can be learned of their weights. Leave them out, or use "
                "num_components."
            )
        projection = None
        if num_components is not None:
            check_count("num_components", num_components)
            _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
            rank = int((sizes > 1e-9 * sizes[0]).sum())
            if num_components > rank:
                raise BayesKLRLError(
                    f"num_components = {num_components}, but {len(raw)} completions span only {rank} directions of the "
                    f"{raw.shape[1]} features. Ask for at most {rank}."
                )
            projection = directions[:num_components].T
            centred = centred @ projection
        return cls(features, mean, projection, centred.std(axis=0))

    @property
    def num_features(self) -> int:
        """J, the number of features after the projection."""
        return len(self.scale)

    def __call__(self, batch: Batch) -> FloatArray:
        """Return the standardised features, shape (M, J)."""
        return self.standardised(self.features(batch))

    def standardised(self, raw: FloatArray) -> FloatArray:
        """Return raw features (M, F) standardised, (M, J)."""
        if raw.ndim != 2 or raw.shape[1] != len(self.mean):
            raise BayesKLRLError(
                f"The features must have the shape (M, {len(self.mean)}), as in training; got {raw.shape}. The function must "
                "return the same number of features for every completion."
            )
        centred = raw - self.mean
        result: FloatArray = (centred if self.projection is None else centred @ self.projection) / self.scale
        return result


def _label(fn: Any) -> str:
    """Return the name of a feature function in error messages."""
    return f"features {getattr(fn, '__name__', type(fn).__name__)}"


def _checked(outcome: Any, label: str, batch: Batch) -> FloatArray:
    """Return features as float64 (M, J); an error says which value is wrong, and for which completion."""
    num = len(batch)
    if outcome is None or isinstance(outcome, str | bytes) or not hasattr(outcome, "__len__") or len(outcome) != num:
        got = f"{len(outcome)} rows" if hasattr(outcome, "__len__") else repr(outcome)
        raise RewardError(
            f"The {label} returned {got} for {num} completions. Return one row of numbers per completion."
        )
    rows = to_host(outcome.double()) if hasattr(outcome, "detach") else outcome
    try:
        values = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        widths = [np.size(row) for row in rows]
        odd = next((i for i, width in enumerate(widths) if width != widths[0]), 0)
        raise RewardError(
            f"The {label} returned {rows[odd]!r} for {batch.describe(odd)} and {rows[0]!r} for completion 0. Return the same "
            "number of features, all of them numbers, for every completion."
        ) from None
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] == 0:
        raise RewardError(f"The {label} returned the shape {values.shape}; the shape is (M, J) with J >= 1 features.")
    bad = ~np.isfinite(values)
    if bad.any():
        row, j = np.argwhere(bad)[0]
        raise RewardError(
            f"Feature {j} of the {label} is {values[row, j]} for {batch.describe(int(row))}. Features are finite."
        )
    return values


def _equal_groups(prompt_index: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Return groups of prompts that have equally many rows: for each group its prompts (P,) and their rows (P, N)."""
    prompts, counts = np.unique(prompt_index, return_counts=True)
    by_prompt = np.split(np.argsort(prompt_index, kind="stable"), np.cumsum(counts)[:-1])
    groups = []
    for count in np.unique(counts):
        chosen = np.flatnonzero(counts == count)
        groups.append((prompts[chosen], np.stack([by_prompt[p] for p in chosen])))
    return groups
