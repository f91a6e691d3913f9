"""Checks of arguments: each raises a `BayesKLRLError` that names the argument, the rule and the value."""

from __future__ import annotations

import re

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import LanguageModel

__all__ = [
    "check_count",
    "check_finite",
    "check_fraction",
    "check_language_model",
    "check_positive",
    "check_posterior_given",
    "check_unicode",
]

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse a value that is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise BayesKLRLError(f"{name} must be an integer of at least {least}; got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Refuse a value that is not a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < np.inf:
        raise BayesKLRLError(f"{name} must be a positive finite number; got {value!r}.")


def check_finite(name: str, value: object) -> None:
    """Refuse a value that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise BayesKLRLError(f"{name} must be a finite number; got {value!r}.")


def check_fraction(name: str, value: object) -> None:
    """Refuse a value that is not a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= 1:
        raise BayesKLRLError(f"{name} must be a number from 0 to 1; got {value!r}.")


def check_unicode(what: str, text: str) -> None:
    """Refuse a text with half a surrogate pair, which no tokenizer and no file takes."""
    found = _SURROGATE.search(text)
    if found:
        raise BayesKLRLError(
            f"{what} has the lone surrogate {found[0]!r} at character {found.start()}, which is no Unicode character. Leave "
            "it out: text.encode('utf-8', 'ignore').decode()."
        )


def check_prompts_per_step(prompts_per_step: int | None, num_prompts: int) -> None:
    """Refuse a subsample of fewer than one prompt, or of more prompts than there are; None means all of them."""
    if prompts_per_step is not None:
        check_count("prompts_per_step", prompts_per_step)
        if prompts_per_step > num_prompts:
            raise BayesKLRLError(f"prompts_per_step = {prompts_per_step}, but the posterior has {num_prompts} prompts.")


def check_posterior_given(given: object, name: str = "posterior") -> None:
    """Refuse an object that lacks the parts of a `Posterior` that every algorithm reads."""
    if not all(hasattr(given, part) for part in ("prior", "likelihood", "prompt_ids")):
        raise BayesKLRLError(f"{name} must be a bk.Posterior; got {given!r}.")


def check_language_model(what: str, lm: object) -> None:
    """Refuse an object that lacks an attribute or method of the `LanguageModel` protocol."""
    missing = [name for name in vars(LanguageModel) if not name.startswith("_") and not hasattr(lm, name)]
    if missing:
        if hasattr(lm, "guide"):
            raise BayesKLRLError(f"{what} must be a language model; of a {type(lm).__name__} give its `guide`.")
        raise BayesKLRLError(
            f"{what} must be a language model, such as bk.TorchLM.from_pretrained(...); a {type(lm).__name__} has no "
            f"{', '.join(missing)}. See bk.LanguageModel."
        )
