"""Weighted sums of several reward functions of text, as TRL's `reward_funcs` and `reward_weights` have them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bayes_klrl.batch import Batch
from bayes_klrl.errors import BayesKLRLError, RewardError, TextRewardError
from bayes_klrl.reward_functions.calls import called_together
from bayes_klrl.reward_functions.returned import check_numbers, floats_where_given
from bayes_klrl.reward_functions.signatures import TextCall, function_name, is_reward_model
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["check_text_functions", "checked_functions", "checked_weights", "weighted_sum"]


def checked_functions(fn: Any) -> Any:
    """Return one function as it is and several as a tuple; refuse what is none."""
    functions = tuple(fn) if isinstance(fn, list | tuple) else (fn,)
    for each in functions:
        if is_reward_model(each):
            what = f"the model {each!r}" if isinstance(each, str) else f"a {type(each).__name__}"
            raise BayesKLRLError(
                f"A reward is a function of completions; got {what}. For a reward model or a classifier take "
                "bk.ClassifierReward(model_or_folder, alpha=...); bk.Reward(...) * bk.ClassifierReward(...) at one alpha adds "
                "their rewards."
            )
        if not callable(each):
            raise BayesKLRLError(f"A reward is a function of completions; got {fn!r}.")
    if not functions:
        raise BayesKLRLError(f"A reward is a function of completions; got {fn!r}, an empty list of them.")
    return functions if isinstance(fn, list | tuple) else fn


def checked_weights(weights: Any, num_functions: int) -> tuple[float, ...]:
    """Return the weights as floats, one for each function; None: all are 1."""
    if weights is None:
        return (1.0,) * num_functions
    try:
        given = np.atleast_1d(np.asarray(weights, dtype=np.float64))
    except (TypeError, ValueError):
        given = np.array([np.nan])
    if given.shape != (num_functions,) or not np.isfinite(given).all():
        raise BayesKLRLError(
            f"weights needs one finite number for each function, {num_functions} in all; got {weights!r}."
        )
    return tuple(given.tolist())


def check_text_functions(
    functions: Sequence[Callable[..., Any]], name: str | None, prior: LanguageModel, columns: frozenset[str]
) -> None:
    """Refuse functions that ask for what this posterior cannot give them, such as text of a prior that decodes none."""
    for fn, label in zip(functions, _labels(functions, name), strict=True):
        if TextCall.of(fn, columns, label).reads_text and prior.tokenizer is None:
            raise TextRewardError(
                f"Reward {label!r} reads text, but the prior has no tokenizer. Give the model a tokenizer, or use "
                "bk.TokenReward (or a reward that asks for `completion_ids` alone)."
            )


def weighted_sum(
    functions: Sequence[Callable[..., Any]],
    weights: Sequence[float],
    name: str | None,
    batch: Batch,
    *,
    said: set[str] | None,
) -> FloatArray:
    """Return sum_k w_k r_k(x) of M completions, shape (M,); where r_k is None it contributes 0, so that its factor is 1.

    Parameters
    ----------
    functions, weights
        The K functions of text, and their weights; a function of weight 0 contributes nothing, though it may be -inf.
    name
        The name of a single function in messages; None: its own.
    batch
        The completions.
    said
        What has been said already; it is added to. None: a function that returns None is an error.

    Raises
    ------
    RewardError
        If a function raises, or returns something else than numbers below +inf, and None.
    """
    labels = _labels(functions, name)
    total, applies = np.zeros(len(batch)), np.zeros(len(batch), dtype=bool)
    for outcome, weight, label in zip(called_together(functions, labels, batch), weights, labels, strict=True):
        values, given = floats_where_given(outcome, label, batch)
        check_numbers(values, label, batch)
        if said is None and not given.all():
            raise RewardError(
                f"Reward {label!r} returned None for {batch.describe(int(given.argmin()))}. Every completion needs a score "
                "here, because the scores are ranked."
            )
        if said is not None and not given.all():
            _say_once(
                f"Reward {label!r} returned None for {batch.describe(int(given.argmin()))}. Where a reward is None it does "
                "not apply: it contributes 0, so that its factor of the likelihood is 1.",
                label,
                said,
            )
        total += np.zeros(len(batch)) if weight == 0 else weight * values
        applies |= given
    if said is not None and len(functions) > 1 and not applies.all():
        _say_once(
            f"All functions of the reward {' + '.join(labels)!r} returned None for {batch.describe(int(applies.argmin()))}. "
            "Where none applies, the reward is 0 and the posterior follows the prior.",
            "",
            said,
        )
    return total


def _labels(functions: Sequence[Callable[..., Any]], name: str | None) -> list[str]:
    """Return the names of functions in error messages: their own, or for a single one the given name."""
    return [name] if name and len(functions) == 1 else [function_name(fn) for fn in functions]


def _say_once(message: str, topic: str, said: set[str]) -> None:
    """Warn, unless this has been said."""
    if topic not in said:
        said.add(topic)
        warnings.warn(message, stacklevel=2)
